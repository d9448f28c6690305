// What attention's forward and backward share: the layout as read, views of tensors, and the sharing of
// tasks.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "attention_kernels.h"
#include "tensors.h"

namespace clara_fast::cpu {

// A ContextLayout's values, checked against the numbers of rows.
class Layout {
 public:
  Layout(const Tensor& q_start, const Tensor& q_len, const Tensor& kv_start, const Tensor& kv_len,
         const Tensor& contexts, int64_t query_rows, int64_t key_rows);

  struct Segment {
    int64_t q_start, q_len, kv_start, kv_len;
    int64_t context_keys;
    // Its contexts' key rows, then its own: ranges()[first_range .. last_range).
    int64_t first_range, last_range;
    // Own key j is seen by position i where j <= i + offset.
    int64_t offset() const { return kv_len - q_len; }
  };
  const std::vector<Segment>& segments() const { return segments_; }
  const KeyRange* ranges() const { return ranges_.data(); }
  int64_t rows_of_segments() const { return rows_of_segments_; }

 private:
  std::vector<Segment> segments_;
  std::vector<KeyRange> ranges_;
  int64_t rows_of_segments_ = 0;
};

// Copies a tensor [rows, heads, size] with gaps within a head; all other strides are taken as they are.
inline void make_dense(Tensor& tensor) {
  if (tensor.dim() == 3 && tensor.stride(2) != 1) tensor = torch::stable::contiguous(tensor);
}

// [rows, heads, size] without gaps within a head.
class HeadsOf {
 public:
  HeadsOf(const Tensor& tensor, const char* name, Storage storage);

  int64_t rows, heads, size;
  // Heads first_head, first_head + 1, ... from `row` on.
  ConstHeads at(int64_t row, int64_t first_head) const {
    return {data_ + row * position_ + first_head * head_, position_, head_};
  }
  Heads mutable_at(int64_t row, int64_t first_head) const {
    return {const_cast<char*>(data_) + row * position_ + first_head * head_, position_, head_};
  }

 private:
  const char* data_;
  int64_t position_, head_;
};

inline AttentionShape attention_shape(const HeadsOf& query, const HeadsOf& key, const HeadsOf& value,
                                      double scale) {
  STD_TORCH_CHECK(key.heads > 0 && query.heads % key.heads == 0, "query heads (", query.heads,
                  ") must be a multiple of key heads (", key.heads, ")");
  STD_TORCH_CHECK(query.size == key.size, "query head size (", query.size, ") must be that of key (",
                  key.size, ")");
  STD_TORCH_CHECK(value.rows == key.rows && value.heads == key.heads,
                  "value must have the rows and heads of key");
  return {query.heads / key.heads, query.size, value.size, static_cast<float>(scale)};
}

// Uninitialised floats on a cache line.
class Floats64 {
 public:
  explicit Floats64(int64_t count) : memory_(new float[static_cast<size_t>(count) + 16]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data = memory_.get() + (64 - address % 64) % 64 / sizeof(float);
  }
  float* data;

 private:
  std::unique_ptr<float[]> memory_;
};

// Runs run(task, scratch) for each task, on as many threads as `work` multiplications are worth; a thread
// takes the next task when it is done with one. Which thread runs a task has no influence on its result.
template <class Run>
void run_tasks(int64_t tasks, double work, int64_t scratch_size, const Run& run) {
  constexpr double kWorth = 1e6;
  const auto worth = static_cast<int64_t>(std::min(work / kWorth, 1e6)) + 1;
  const int64_t workers = std::min({tasks, worth, static_cast<int64_t>(torch::stable::get_num_threads())});
  const int64_t stride = ceil_div(scratch_size, 16) * 16;
  const Floats64 scratch(workers * stride);
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) run(task, scratch.data);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t task = next++; task < tasks; task = next++) run(task, scratch.data + worker * stride);
    }
  });
}

}  // namespace clara_fast::cpu
