// pool_memory: one pass over the hidden states forward, one backward, which gets the means' difference.
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "tensors.h"

namespace clara_fast::cpu {
namespace {

// Rows whose scales or partial sums a task holds at a time.
constexpr int64_t kRowBlock = 32;
// grad_norm_weight is summed in so many parts, whatever the number of threads.
constexpr int64_t kWeightParts = 32;

// The arguments that forward and backward share.
struct Pool {
  Storage storage;
  const RowKernels& rows;
  int64_t segments, columns, num_memory;
  Rows hidden;
  const int32_t* offsets;
  std::vector<float> weight;  // empty: no norm
  float eps;

  Pool(const Tensor& hidden_, const Tensor& offsets_, int64_t num_memory_,
       const std::optional<Tensor>& norm_weight, double norm_eps)
      : storage(storage_of(hidden_, "hidden")),
        rows(kernels()[storage]),
        segments(offsets_.numel() - 1),
        columns(hidden_.dim() == 2 ? hidden_.size(1) : 0),
        num_memory(num_memory_),
        hidden(hidden_, storage, columns),
        offsets(static_cast<const int32_t*>(offsets_.const_data_ptr())),
        eps(static_cast<float>(norm_eps)) {
    STD_TORCH_CHECK(hidden_.dim() == 2, "hidden must have 2 dimensions, not ", hidden_.dim());
    STD_TORCH_CHECK(hidden_.is_contiguous(), "hidden must be contiguous");
    check_type(offsets_, "offsets", ScalarType::Int);
    STD_TORCH_CHECK(segments >= 0, "offsets must hold at least 1 number");
    check_shape(offsets_, "offsets", {segments + 1});
    STD_TORCH_CHECK(num_memory >= 1, "num_memory (", num_memory, ") must be at least 1");
    STD_TORCH_CHECK(offsets[0] >= 0, "offsets[0] (", offsets[0], ") must be at least 0");
    for (int64_t s = 0; s < segments; ++s) {
      STD_TORCH_CHECK(int64_t{offsets[s + 1]} - offsets[s] >= num_memory, "segment ", s, " has ",
                      int64_t{offsets[s + 1]} - offsets[s], " rows, and must have at least num_memory (",
                      num_memory, ")");
    }
    STD_TORCH_CHECK(offsets[segments] <= hidden_.size(0), "the last of offsets (", offsets[segments],
                    ") must be at most the number of rows of hidden (", hidden_.size(0), ")");
    if (norm_weight.has_value()) {
      check_shape(*norm_weight, "norm_weight", {columns});
      weight.resize(columns);
      kernels()[storage_of(*norm_weight, "norm_weight")].widen(norm_weight->const_data_ptr(), columns,
                                                               columns, weight.data());
    }
  }

  bool normed() const { return !weight.empty(); }

  float row_scale(int64_t row) const {
    return 1.0f / std::sqrt(rows.square_sum(hidden[row], columns) / static_cast<float>(columns) + eps);
  }

  // Writes the sum of rows [begin, end), normed where asked for, over `total`.
  void sum(int64_t begin, int64_t end, float* total) const {
    std::fill_n(total, columns, 0.0f);
    float scale[kRowBlock];
    for (int64_t row = begin; row < end; row += kRowBlock) {
      const int64_t count = std::min(kRowBlock, end - row);
      if (!normed()) {
        rows.sum_rows(hidden[row], count, columns, total);
        continue;
      }
      for (int64_t r = 0; r < count; ++r) scale[r] = row_scale(row + r);
      rows.sum_normed_rows(hidden[row], count, columns, scale, weight.data(), total);
    }
  }

  // mean of the document rows - mean of the memory rows, over `difference`; 0 where there is no document row.
  void mean_difference(int64_t segment, float* difference, float* scratch) const {
    const int64_t begin = offsets[segment];
    const int64_t end = offsets[segment + 1];
    const int64_t memory = end - num_memory;
    if (begin == memory) {
      std::fill_n(difference, columns, 0.0f);
      return;
    }
    sum(begin, memory, difference);
    sum(memory, end, scratch);
    const float document_count = static_cast<float>(memory - begin);
    const float memory_count = static_cast<float>(num_memory);
    for (int64_t i = 0; i < columns; ++i)
      difference[i] = difference[i] / document_count - scratch[i] / memory_count;
  }

  int64_t tasks() const {
    const int64_t rows_in_use = segments > 0 ? offsets[segments] - offsets[0] : 0;
    if (rows_in_use * columns < grain(1)) return 1;
    return std::clamp<int64_t>(segments, 1, 4 * torch::stable::get_num_threads());
  }
};

float mean_square(const float* x, int64_t n) {
  return kernels()[Storage::kFloat32].square_sum(x, n) / static_cast<float>(n);
}

// One segment's gradient. `step` and `grad` are scratch rows; grad_weight is added to (only with a norm).
void segment_backward(const Pool& pool, int64_t segment, const Rows& grad_memory, float grad_mse,
                      const float* difference, float* step, float* grad, const MutableRows& grad_hidden,
                      float* grad_weight) {
  const int64_t columns = pool.columns;
  const int64_t begin = pool.offsets[segment];
  const int64_t end = pool.offsets[segment + 1];
  const int64_t memory = end - pool.num_memory;

  // d mse / d (difference of means)
  const float factor = 2.0f * grad_mse / static_cast<float>(columns);
  for (int64_t i = 0; i < columns; ++i) step[i] = difference[i] * factor;
  const float document_share = 1.0f / static_cast<float>(std::max<int64_t>(1, memory - begin));
  const float memory_share = -1.0f / static_cast<float>(pool.num_memory);

  const auto normed_row = [&](int64_t row) {
    const float scale = pool.row_scale(row);
    const float dot = pool.rows.weighted_dot(pool.hidden[row], columns, grad, pool.weight.data());
    const float pull = dot / static_cast<float>(columns) * scale * scale * scale;
    pool.rows.norm_row_grad(pool.hidden[row], columns, grad, pool.weight.data(), scale, pull,
                            grad_hidden[row], grad_weight);
  };

  for (int64_t i = 0; i < columns; ++i) grad[i] = step[i] * document_share;
  for (int64_t row = begin; row < memory; ++row) {
    if (pool.normed()) {
      normed_row(row);
    } else if (row == begin) {
      pool.rows.narrow(grad, columns, grad_hidden[row]);
    } else {
      std::memcpy(grad_hidden[row], grad_hidden[begin], static_cast<size_t>(grad_hidden.stride));
    }
  }
  for (int64_t j = 0; j < pool.num_memory; ++j) {
    const void* from_above = grad_memory[segment * pool.num_memory + j];
    if (pool.normed()) {
      pool.rows.widen(from_above, columns, columns, grad);
      for (int64_t i = 0; i < columns; ++i) grad[i] += memory_share * step[i];
      normed_row(memory + j);
    } else {
      pool.rows.add_scaled(from_above, columns, memory_share, step, grad_hidden[memory + j]);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> pool_memory_forward(Tensor hidden, Tensor offsets, int64_t num_memory,
                                                       std::optional<Tensor> norm_weight, double norm_eps) {
  const Pool pool(hidden, offsets, num_memory, norm_weight, norm_eps);
  const int64_t columns = pool.columns;
  Tensor memory = torch::stable::new_empty(hidden, {pool.segments, num_memory, columns});
  Tensor mse = torch::stable::new_empty(hidden, {pool.segments}, ScalarType::Float);
  Tensor differences = torch::stable::new_empty(hidden, {pool.segments, columns}, ScalarType::Float);
  const MutableRows memory_rows(memory, pool.storage, columns);
  float* difference_rows = static_cast<float*>(differences.mutable_data_ptr());
  float* losses = static_cast<float*>(mse.mutable_data_ptr());

  const int64_t tasks = pool.tasks();
  std::vector<float> scratch(tasks * columns);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t end = part_begin(pool.segments, task + 1, tasks);
      for (int64_t s = part_begin(pool.segments, task, tasks); s < end; ++s) {
        float* difference = difference_rows + s * columns;
        pool.mean_difference(s, difference, scratch.data() + task * columns);
        losses[s] = mean_square(difference, columns);
        const int64_t first_memory = pool.offsets[s + 1] - num_memory;
        for (int64_t j = 0; j < num_memory; ++j) {
          const void* row = pool.hidden[first_memory + j];
          void* out = memory_rows[s * num_memory + j];
          if (pool.normed()) {
            pool.rows.norm_row(row, columns, pool.row_scale(first_memory + j), pool.weight.data(), out);
          } else {
            std::memcpy(out, row, static_cast<size_t>(memory_rows.stride));
          }
        }
      }
    }
  });
  return {memory, mse, differences};
}

std::tuple<Tensor, Tensor> pool_memory_backward(Tensor grad_memory, Tensor grad_mse, Tensor difference,
                                                Tensor hidden, Tensor offsets, int64_t num_memory,
                                                std::optional<Tensor> norm_weight, double norm_eps) {
  const Pool pool(hidden, offsets, num_memory, norm_weight, norm_eps);
  const int64_t columns = pool.columns;
  check_shape(grad_memory, "grad_memory", {pool.segments, num_memory, columns});
  check_type(grad_memory, "grad_memory", hidden.scalar_type());
  check_shape(grad_mse, "grad_mse", {pool.segments});
  check_type(grad_mse, "grad_mse", ScalarType::Float);
  check_shape(difference, "difference", {pool.segments, columns});
  check_type(difference, "difference", ScalarType::Float);
  Tensor grad_hidden = new_large(hidden, hidden.sizes());
  Tensor grad_weight = torch::stable::new_empty(hidden, {pool.normed() ? columns : 0}, ScalarType::Float);
  const Rows memory_rows(grad_memory, pool.storage, columns);
  const MutableRows hidden_rows(grad_hidden, pool.storage, columns);
  const float* losses = static_cast<const float*>(grad_mse.const_data_ptr());
  const float* difference_rows = static_cast<const float*>(difference.const_data_ptr());

  // Rows outside every segment
  std::memset(hidden_rows[0], 0, static_cast<size_t>(pool.offsets[0] * hidden_rows.stride));
  std::memset(hidden_rows[pool.offsets[pool.segments]], 0,
              static_cast<size_t>((hidden.size(0) - pool.offsets[pool.segments]) * hidden_rows.stride));

  // With a norm the split decides how grad_norm_weight is summed, so it must not depend on the threads.
  const int64_t tasks = pool.normed() ? std::clamp<int64_t>(pool.segments, 1, kWeightParts) : pool.tasks();
  // Per task: the mean's gradient, an incoming gradient, a segment's and the task's weight gradient.
  std::vector<float> scratch(tasks * 4 * columns, 0.0f);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      float* step = scratch.data() + task * 4 * columns;
      float* grad = step + columns;
      float* segment_weight = grad + columns;
      float* task_weight = segment_weight + columns;
      const int64_t end = part_begin(pool.segments, task + 1, tasks);
      for (int64_t s = part_begin(pool.segments, task, tasks); s < end; ++s) {
        segment_backward(pool, s, memory_rows, losses[s], difference_rows + s * columns, step, grad,
                         hidden_rows, segment_weight);
        if (pool.normed()) {
          for (int64_t i = 0; i < columns; ++i) task_weight[i] += segment_weight[i];
          std::fill_n(segment_weight, columns, 0.0f);
        }
      }
    }
  });

  if (pool.normed()) {
    float* total = static_cast<float*>(grad_weight.mutable_data_ptr());
    std::fill_n(total, columns, 0.0f);
    for (int64_t task = 0; task < tasks; ++task) {
      const float* part = scratch.data() + (task * 4 + 3) * columns;
      for (int64_t i = 0; i < columns; ++i) total[i] += part[i];
    }
  }
  return {grad_hidden, grad_weight};
}

}  // namespace clara_fast::cpu
