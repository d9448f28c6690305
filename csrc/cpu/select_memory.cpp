// select_memory: top-k by cosine forward, the straight-through gradient of its softmax backward.
#include <cstring>
#include <vector>

#include "cosine.h"
#include "kernels.h"
#include "ops.h"
#include "tensors.h"

namespace clara_fast::cpu {
namespace {

// Sizes and mask that forward and backward share.
struct Candidates {
  Storage storage;
  const RowKernels& rows;
  int64_t batch, count, columns, memory_columns;
  const bool* valid_mask;  // null: all valid

  Candidates(const Tensor& query, const Tensor& keys, const Tensor& memory,
             const std::optional<Tensor>& valid)
      : storage(storage_of(keys, "keys")), rows(kernels()[storage]) {
    STD_TORCH_CHECK(keys.dim() == 3, "keys must have 3 dimensions, not ", keys.dim());
    STD_TORCH_CHECK(memory.dim() == 4, "memory must have 4 dimensions, not ", memory.dim());
    batch = keys.size(0);
    count = keys.size(1);
    columns = keys.size(2);
    memory_columns = memory.size(2) * memory.size(3);
    check_shape(query, "query", {batch, columns});
    check_shape(keys, "keys", {batch, count, columns});
    check_shape(memory, "memory", {batch, count, memory.size(2), memory.size(3)});
    check_type(query, "query", keys.scalar_type());
    storage_of(memory, "memory");
    valid_mask = nullptr;
    if (valid.has_value()) {
      check_shape(*valid, "valid", {batch, count});
      check_type(*valid, "valid", ScalarType::Bool);
      valid_mask = static_cast<const bool*>(valid->const_data_ptr());
    }
  }

  bool valid(int64_t b, int64_t i) const { return valid_mask == nullptr || valid_mask[b * count + i]; }
};

// The softmax p_j of every slot j of one row of the batch, over what the slots before it left. Kept as its
// logarithm's normaliser, so that nothing of size [k, N] is.
struct Slots {
  const int64_t* indices;  // [k], -1 from the first slot that is empty
  int64_t count;           // slots before that
  double taken_logit;
  const double* logits;  // [N], -inf where not valid
  double* normaliser;    // [k]

  // `left` is scratch of N.
  void normalise(int64_t num_candidates, double* left) {
    std::copy_n(logits, num_candidates, left);
    for (int64_t j = 0; j < count; ++j) {
      const double highest = *std::max_element(left, left + num_candidates);
      double total = 0.0;
      for (int64_t i = 0; i < num_candidates; ++i) total += std::exp(left[i] - highest);
      normaliser[j] = highest + std::log(total);
      left[indices[j]] += taken_logit;
    }
  }

  // Calls visit(j, p_ji) for every slot whose p_ji is not 0.
  template <class Visit>
  void visit(int64_t candidate, Visit visit) const {
    double logit = logits[candidate];
    for (int64_t j = 0; j < count; ++j) {
      const double share = std::exp(logit - normaliser[j]);
      if (share != 0.0) visit(j, share);
      if (indices[j] == candidate) logit += taken_logit;
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> select_memory_forward(Tensor query, Tensor keys, Tensor memory, int64_t k,
                                                         double /*temperature*/,
                                                         std::optional<Tensor> valid) {
  const Candidates all(query, keys, memory, valid);
  STD_TORCH_CHECK(k >= 0, "k (", k, ") must be at least 0");
  const Storage memory_storage = storage_of(memory, "memory");
  Tensor selected = torch::stable::new_empty(memory, {all.batch, k, memory.size(2), memory.size(3)});
  Tensor indices = torch::stable::new_empty(memory, {all.batch, k}, ScalarType::Long);
  Tensor scores = torch::stable::new_empty(memory, {all.batch, all.count}, ScalarType::Float);
  float* score = static_cast<float*>(scores.mutable_data_ptr());
  int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr());

  const Queries queries(query, all.storage, 0, all.batch, all.columns);
  const Rows key_rows(keys, all.storage, all.columns);
  const int64_t tiles = ceil_div(all.count, kTileKeys);
  torch::stable::parallel_for(
      0, all.batch * tiles, grain(kTileKeys * all.columns), [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) {
          const int64_t b = item / tiles;
          const int64_t begin = item % tiles * kTileKeys;
          int64_t members[kTileKeys];  // invalid candidates are never read
          int64_t used = 0;
          for (int64_t i = begin; i < std::min(begin + kTileKeys, all.count); ++i) {
            score[b * all.count + i] = 0.0f;
            if (all.valid(b, i)) members[used++] = i;
          }
          if (used == 0) continue;
          const void* tile[kTileKeys];
          for (int64_t t = 0; t < kTileKeys; ++t)
            tile[t] = key_rows[b * all.count + members[t < used ? t : 0]];
          float dots[kTileKeys];
          float squares[kTileKeys];
          all.rows.dots(tile, queries[b], all.columns, dots, squares);
          for (int64_t t = 0; t < used; ++t) {
            const KeyFactor key = key_factor(all.rows, tile[t], all.columns, squares[t], {});
            float result = dots[t] * key.factor * queries.inverse(b) + 0.0f;
            if (std::isnan(result)) {
              result = special_score(all.rows, tile[t], all.columns, key.kind, {}, queries, b);
            }
            score[b * all.count + members[t]] = result;
          }
        }
      });

  const int64_t kept = std::min(k, all.count);
  const int64_t room = Best::room(kept, all.count);
  std::vector<Scored> entries(all.batch * room);
  torch::stable::parallel_for(0, all.batch, grain(all.count), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      Best best(entries.data() + b * room, kept, room);
      for (int64_t i = 0; i < all.count; ++i) {
        if (all.valid(b, i)) best.offer({score[b * all.count + i], i});
      }
      best.cut();
      std::sort(best.begin(), best.end(), better);
      for (int64_t j = 0; j < k; ++j) index[b * k + j] = j < best.count() ? best.begin()[j].index : -1;
    }
  });

  const Rows memory_rows(memory, memory_storage, all.memory_columns);
  const MutableRows selected_rows(selected, memory_storage, all.memory_columns);
  torch::stable::parallel_for(0, all.batch * k, grain(all.memory_columns), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const size_t bytes = static_cast<size_t>(selected_rows.stride);
      if (index[item] < 0) {
        std::memset(selected_rows[item], 0, bytes);
      } else {
        std::memcpy(selected_rows[item], memory_rows[item / k * all.count + index[item]], bytes);
      }
    }
  });
  return {selected, indices, scores};
}

namespace {

// Gradients with respect to memory and, of a_ji = <grad_selected_j, memory_i>, the sums that d loss / d
// logit_i = sum_j p_ji (a_ji - sum_i' p_ji' a_ji') is made of, in one pass over the candidates.
struct MemoryPass {
  const Candidates& all;
  const RowKernels& grad_rows_of;
  const RowKernels& memory_rows_of;
  int64_t k;
  Rows grads, memories;
  MutableRows grad_memories;
  int64_t grad_bytes, memory_bytes;
  const int64_t* index;
  const Slots* slots;  // [B]
  int64_t parts;       // of a row's candidates, each summed up by itself: the sums do not depend on threads
  float* affinity;     // [B, parts, k, kTileKeys] scratch
  double* own;         // [B, N] sum_j p_ji a_ji
  double* means;       // [B, parts, k] sum_i p_ji a_ji

  // a of every slot and up to kTileKeys candidates of row b, a chunk of columns at a time.
  void affinities(int64_t b, const int64_t* members, int64_t used, float* a) const {
    float wide[kTileKeys * kChunk];
    float grad[kChunk];
    std::fill_n(a, k * kTileKeys, 0.0f);
    for (int64_t column = 0; column < all.memory_columns; column += kChunk) {
      const int64_t n = std::min(kChunk, all.memory_columns - column);
      const int64_t padded = ceil_div(n, kPad) * kPad;
      for (int64_t t = 0; t < used; ++t) {
        const char* row =
            static_cast<const char*>(memories[b * all.count + members[t]]) + column * memory_bytes;
        memory_rows_of.widen(row, n, padded, wide + t * kChunk);
      }
      for (int64_t j = 0; j < k; ++j) {
        if (index[b * k + j] < 0) continue;
        const char* row = static_cast<const char*>(grads[b * k + j]) + column * grad_bytes;
        grad_rows_of.widen(row, n, padded, grad);
        float dots[kTileKeys] = {};
        kernels().block_dots(wide, kChunk, used, grad, kChunk, 1, padded, dots, kTileKeys);
        for (int64_t t = 0; t < used; ++t) a[j * kTileKeys + t] += dots[t];
      }
    }
  }

  // grad_memory of candidate i: the gradients of the slots that took it.
  void gather(int64_t b, int64_t i) const {
    char* out = static_cast<char*>(grad_memories[b * all.count + i]);
    float total[kChunk];
    float grad[kChunk];
    for (int64_t column = 0; column < all.memory_columns; column += kChunk) {
      const int64_t n = std::min(kChunk, all.memory_columns - column);
      bool taken = false;
      for (int64_t j = 0; j < k; ++j) {
        if (index[b * k + j] != i) continue;
        const char* row = static_cast<const char*>(grads[b * k + j]) + column * grad_bytes;
        grad_rows_of.widen(row, n, n, taken ? grad : total);
        for (int64_t c = 0; c < n && taken; ++c) total[c] += grad[c];
        taken = true;
      }
      if (taken) {
        memory_rows_of.narrow(total, n, out + column * memory_bytes);
      } else {
        std::memset(out + column * memory_bytes, 0, static_cast<size_t>(n * memory_bytes));
      }
    }
  }

  void run() const {
    const int64_t tiles = ceil_div(all.count, kTileKeys);
    const int64_t work = grain(ceil_div(tiles, parts) * kTileKeys * all.memory_columns * k);
    torch::stable::parallel_for(0, all.batch * parts, work, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / parts;
        const int64_t end = part_begin(tiles, item % parts + 1, parts);
        for (int64_t tile = part_begin(tiles, item % parts, parts); tile < end; ++tile) {
          run_tile(b, tile * kTileKeys, affinity + item * k * kTileKeys, means + item * k);
        }
      }
    });
  }

  void run_tile(int64_t b, int64_t begin, float* a, double* mean) const {
    int64_t members[kTileKeys];  // invalid candidates are never read
    int64_t used = 0;
    for (int64_t i = begin; i < std::min(begin + kTileKeys, all.count); ++i) {
      if (all.valid(b, i)) members[used++] = i;
      gather(b, i);
    }
    if (used == 0) return;
    affinities(b, members, used, a);
    for (int64_t t = 0; t < used; ++t) {
      double sum = 0.0;
      slots[b].visit(members[t], [&](int64_t j, double share) {
        sum += share * a[j * kTileKeys + t];
        mean[j] += share * a[j * kTileKeys + t];
      });
      own[b * all.count + members[t]] = sum;
    }
  }
};

// Length of a stored key, in float64 where float32 squares would not do.
double key_norm(const RowKernels& rows, const void* key, int64_t columns) {
  const float square = rows.square_sum(key, columns);
  if (square >= kSmallestSquare && square <= kLargestSquare) return std::sqrt(static_cast<double>(square));
  std::vector<float> wide(columns);
  rows.widen(key, columns, columns, wide.data());
  return exact_norm(wide.data(), columns);
}

// The cosine's backward for one row of the batch: coefficients per candidate, then one pass over the keys.
struct KeyCoefficients {
  std::vector<float> query;  // grad_query takes this much of each key (0: the key is not read)
  std::vector<float> key;    // grad_key = key * (unit * query - pull * key)
  std::vector<float> pull;
  std::vector<float> unit;  // [B] 1 / |query|, 0 for a zero query
  std::vector<float> self;  // [B] grad_query takes this much of the query
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> select_memory_backward(Tensor grad_selected, Tensor grad_scores,
                                                          Tensor query, Tensor keys, Tensor memory,
                                                          Tensor indices, Tensor scores, double temperature,
                                                          double taken_logit, std::optional<Tensor> valid) {
  const Candidates all(query, keys, memory, valid);
  STD_TORCH_CHECK(indices.dim() == 2, "indices must have 2 dimensions, not ", indices.dim());
  const int64_t k = indices.size(1);
  check_shape(grad_selected, "grad_selected", {all.batch, k, memory.size(2), memory.size(3)});
  check_shape(grad_scores, "grad_scores", {all.batch, all.count});
  check_type(grad_scores, "grad_scores", ScalarType::Float);
  check_shape(indices, "indices", {all.batch, k});
  check_type(indices, "indices", ScalarType::Long);
  check_shape(scores, "scores", {all.batch, all.count});
  check_type(scores, "scores", ScalarType::Float);
  const Storage grad_storage = storage_of(grad_selected, "grad_selected");
  const Storage memory_storage = storage_of(memory, "memory");
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < all.batch * k; ++i) {
    STD_TORCH_CHECK(index[i] >= -1 && index[i] < all.count, "indices (", index[i],
                    ") must be at least -1 and below the number of candidates (", all.count, ")");
  }
  Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  Tensor grad_keys = new_large(keys, keys.sizes());
  Tensor grad_memory = new_large(memory, memory.sizes());

  // Logits and each slot's softmax
  const float* score = static_cast<const float*>(scores.const_data_ptr());
  const int64_t total = all.batch * all.count;
  std::vector<double> logits(total), own(total), normalisers(all.batch * k);
  std::vector<Slots> slots(all.batch);
  torch::stable::parallel_for(0, all.batch, grain(all.count * (k + 1)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      double* logit = logits.data() + b * all.count;
      for (int64_t i = 0; i < all.count; ++i) {
        logit[i] = all.valid(b, i) ? score[b * all.count + i] / temperature
                                   : -std::numeric_limits<double>::infinity();
      }
      const int64_t* row = index + b * k;
      slots[b] = {row, std::find_if(row, row + k, [](int64_t i) { return i < 0; }) - row, taken_logit, logit,
                  normalisers.data() + b * k};
      slots[b].normalise(all.count, own.data() + b * all.count);
    }
  });

  constexpr int64_t kParts = 16;
  const int64_t parts = std::clamp<int64_t>(ceil_div(all.count, kTileKeys), 1, kParts);
  std::vector<float> affinity(all.batch * parts * k * kTileKeys);
  std::vector<double> means(all.batch * parts * k);
  const MemoryPass memory_pass{all,
                               kernels()[grad_storage],
                               kernels()[memory_storage],
                               k,
                               Rows(grad_selected, grad_storage, all.memory_columns),
                               Rows(memory, memory_storage, all.memory_columns),
                               MutableRows(grad_memory, memory_storage, all.memory_columns),
                               element_size(grad_storage),
                               element_size(memory_storage),
                               index,
                               slots.data(),
                               parts,
                               affinity.data(),
                               own.data(),
                               means.data()};
  memory_pass.run();

  // Lengths and the coefficients of the cosine's backward
  const Rows key_rows(keys, all.storage, all.columns);
  const Rows query_rows(query, all.storage, all.columns);
  const float* score_gradient = static_cast<const float*>(grad_scores.const_data_ptr());
  KeyCoefficients of{std::vector<float>(total), std::vector<float>(total), std::vector<float>(total),
                     std::vector<float>(all.batch), std::vector<float>(all.batch)};
  std::vector<float> wide_query(all.batch * all.columns);
  torch::stable::parallel_for(
      0, all.batch, grain(all.count * (all.columns + k)), [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
          float* q = wide_query.data() + b * all.columns;
          all.rows.widen(query_rows[b], all.columns, all.columns, q);
          const double query_norm = exact_norm(q, all.columns);
          const double unit = query_norm == 0.0 ? 0.0 : 1.0 / query_norm;
          of.unit[b] = static_cast<float>(unit);

          double* mean = means.data() + b * parts * k;  // of all parts, in the first one's place
          for (int64_t part = 1; part < parts; ++part) {
            for (int64_t j = 0; j < k; ++j) mean[j] += mean[part * k + j];
          }

          double self = 0.0;
          for (int64_t i = 0; i < all.count; ++i) {
            const int64_t at = b * all.count + i;
            if (!all.valid(b, i) || unit == 0.0) continue;
            const double norm = key_norm(all.rows, key_rows[at], all.columns);
            if (norm == 0.0) continue;
            double gradient = own[at];
            slots[b].visit(i, [&](int64_t j, double share) { gradient -= share * mean[j]; });
            const double cosine_gradient = gradient / temperature + score_gradient[at];
            of.query[at] = static_cast<float>(cosine_gradient * unit / norm);
            of.key[at] = static_cast<float>(cosine_gradient / norm);
            of.pull[at] = static_cast<float>(score[at] / norm);
            self += cosine_gradient * score[at];
          }
          of.self[b] = static_cast<float>(-self * unit * unit);
        }
      });

  // One pass over the keys, which reads each and writes its gradient.
  const MutableRows grad_key_rows(grad_keys, all.storage, all.columns);
  const MutableRows grad_query_rows(grad_query, all.storage, all.columns);
  const int64_t bytes = element_size(all.storage);
  const int64_t chunks = ceil_div(all.columns, kChunk);
  torch::stable::parallel_for(
      0, all.batch * chunks, grain(all.count * kChunk), [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) {
          const int64_t b = item / chunks;
          const int64_t column = item % chunks * kChunk;
          const int64_t n = std::min(kChunk, all.columns - column);
          const float* q = wide_query.data() + b * all.columns + column;
          float to_query[kChunk];
          for (int64_t i = 0; i < n; ++i) to_query[i] = of.self[b] * q[i];
          for (int64_t i = 0; i < all.count; ++i) {
            const int64_t at = b * all.count + i;
            const char* key = static_cast<const char*>(key_rows[at]) + column * bytes;
            char* out = static_cast<char*>(grad_key_rows[at]) + column * bytes;
            if (of.key[at] == 0.0f) {
              std::memset(out, 0, static_cast<size_t>(n * bytes));
            } else {
              all.rows.cosine_grad(key, q, n, of.query[at], of.key[at], of.unit[b], of.pull[at], to_query,
                                   out);
            }
          }
          all.rows.narrow(to_query, n, static_cast<char*>(grad_query_rows[b]) + column * bytes);
        }
      });
  return {grad_query, grad_keys, grad_memory};
}

}  // namespace clara_fast::cpu
