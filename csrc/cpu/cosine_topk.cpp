// cosine_topk: streams over the keys in blocks, in the type they are stored in, and keeps the k best per
// query.
#include <memory>
#include <vector>

#include "cosine.h"
#include "kernels.h"
#include "ops.h"
#include "tensors.h"

namespace clara_fast::cpu {
namespace {

constexpr int64_t kKeyBlock = 32;     // a block of keys, widened, stays in the L2 cache
constexpr int64_t kQueryBlock = 64;   // so does a block of queries over one chunk of columns
constexpr int64_t kQueryGroup = 256;  // queries that share one pass over a block of keys

struct Problem {
  const Queries& queries;
  int64_t num_queries;
  const Rows& keys;
  const RowKernels& rows;
  const float* scales;  // null: all 1
  int64_t num_keys, columns;
  int64_t element_bytes;

  float scale(int64_t key) const { return scales == nullptr ? 1.0f : scales[key]; }
};

// A thread's working memory.
struct Scratch {
  float scores[kQueryGroup * kKeyBlock];
  float wide[kKeyBlock * kChunk];
  float squares[kKeyBlock];
  float factors[kKeyBlock];
  KeyKind kinds[kKeyBlock];
  int32_t picked[kKeyBlock];
};

// Dots of one or two queries with a block of keys, straight from the stored keys.
void few_dots(const Problem& problem, int64_t first_key, int64_t count, int64_t first_query,
              int64_t num_queries, Scratch& scratch) {
  const float* queries[kFewQueries];
  for (int64_t q = 0; q < num_queries; ++q) queries[q] = problem.queries[first_query + q];
  for (int64_t j = 0; j < count; j += kTileKeys) {
    const int64_t used = std::min(kTileKeys, count - j);
    const void* keys[kTileKeys];  // a short tile repeats its first key and drops the result
    for (int64_t t = 0; t < kTileKeys; ++t) keys[t] = problem.keys[first_key + (t < used ? j + t : j)];
    float dots[kFewQueries * kTileKeys];
    float squares[kTileKeys];
    problem.rows.dots(keys, queries, num_queries, problem.columns, dots, squares);
    for (int64_t t = 0; t < used; ++t) {
      scratch.squares[j + t] = squares[t];
      for (int64_t q = 0; q < num_queries; ++q)
        scratch.scores[q * kKeyBlock + j + t] = dots[q * kTileKeys + t];
    }
  }
}

// Dots of many queries with a block of keys, which is widened to float32 once, a chunk of columns at a time.
void many_dots(const Problem& problem, int64_t first_key, int64_t count, int64_t first_query,
               int64_t num_queries, Scratch& scratch) {
  std::fill_n(scratch.scores, num_queries * kKeyBlock, 0.0f);
  std::fill_n(scratch.squares, count, 0.0f);
  for (int64_t column = 0; column < problem.columns; column += kChunk) {
    const int64_t n = std::min(kChunk, problem.columns - column);
    const int64_t padded = ceil_div(n, kPad) * kPad;
    for (int64_t j = 0; j < count; ++j) {
      const char* key =
          static_cast<const char*>(problem.keys[first_key + j]) + column * problem.element_bytes;
      scratch.squares[j] += problem.rows.widen(key, n, padded, scratch.wide + j * kChunk);
    }
    for (int64_t q = 0; q < num_queries; q += kQueryBlock) {
      kernels().block_dots(scratch.wide, kChunk, count, problem.queries[first_query + q] + column,
                           problem.queries.stride(), std::min(kQueryBlock, num_queries - q), padded,
                           scratch.scores + q * kKeyBlock, kKeyBlock);
    }
  }
}

void search(const Problem& problem, int64_t begin_key, int64_t end_key, int64_t begin_query,
            int64_t end_query, Best* best, Scratch& scratch) {
  // By the whole number of queries: a score must not depend on how the queries are split.
  const bool few = problem.num_queries <= kFewQueries;
  for (int64_t first_key = begin_key; first_key < end_key; first_key += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, end_key - first_key);
    for (int64_t first = begin_query; first < end_query; first += kQueryGroup) {
      const int64_t group = std::min(kQueryGroup, end_query - first);
      (few ? few_dots : many_dots)(problem, first_key, count, first, group, scratch);
      for (int64_t j = 0; j < count && first == begin_query; ++j) {
        const KeyFactor key = key_factor(problem.rows, problem.keys[first_key + j], problem.columns,
                                         scratch.squares[j], problem.scale(first_key + j));
        scratch.factors[j] = key.factor;
        scratch.kinds[j] = key.kind;
      }
      for (int64_t q = 0; q < group; ++q) {
        Best& kept = best[first + q];
        float* scores = scratch.scores + q * kKeyBlock;
        const int64_t hits =
            kernels().scale_and_pick(scores, count, scratch.factors, problem.queries.inverse(first + q),
                                     kept.threshold(), scratch.picked);
        for (int64_t h = 0; h < hits; ++h) {
          const int64_t j = scratch.picked[h];
          float score = scores[j] + 0.0f;  // -0 becomes 0
          if (std::isnan(score)) {
            score = special_score(problem.rows, problem.keys[first_key + j], problem.columns,
                                  scratch.kinds[j], problem.scale(first_key + j), problem.queries, first + q);
          }
          kept.offer({score, first_key + j});
        }
      }
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> cosine_topk(Tensor queries, Tensor keys, int64_t k,
                                       std::optional<Tensor> key_scales) {
  const Storage query_storage = storage_of(queries, "queries");
  const Storage key_storage = storage_of(keys, "keys", true);
  STD_TORCH_CHECK(queries.dim() == 2, "queries must have 2 dimensions, not ", queries.dim());
  STD_TORCH_CHECK(keys.dim() == 2, "keys must have 2 dimensions, not ", keys.dim());
  const int64_t num_queries = queries.size(0);
  const int64_t columns = queries.size(1);
  const int64_t num_keys = keys.size(0);
  check_shape(queries, "queries", {num_queries, columns});
  check_shape(keys, "keys", {num_keys, columns});
  STD_TORCH_CHECK(k >= 0 && k <= num_keys, "k (", k, ") must be at least 0 and at most the number of keys (",
                  num_keys, ")");
  if (key_scales.has_value()) {
    check_shape(*key_scales, "key_scales", {num_keys});
    check_type(*key_scales, "key_scales", ScalarType::Float);
  }

  Tensor scores = torch::stable::new_empty(queries, {num_queries, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(queries, {num_queries, k}, ScalarType::Long);
  if (num_queries == 0 || k == 0) return {scores, indices};

  const Queries prepared(queries, query_storage, num_queries, columns);
  const Rows rows(keys, key_storage, columns);
  const Problem problem{
      prepared,
      num_queries,
      rows,
      kernels()[key_storage],
      key_scales.has_value() ? static_cast<const float*>(key_scales->const_data_ptr()) : nullptr,
      num_keys,
      columns,
      element_size(key_storage)};

  // Threads share out the keys; where there are few, the queries too.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = ceil_div(num_keys, kKeyBlock);
  const int64_t useful = num_queries * num_keys / std::max<int64_t>(1, grain(columns)) + 1;
  const int64_t key_parts = std::min({threads, blocks, useful});
  const int64_t query_parts =
      std::clamp<int64_t>(std::min(threads, useful) / key_parts, 1, ceil_div(num_queries, kQueryBlock));
  const int64_t kept_per_part = std::min(k, ceil_div(blocks, key_parts) * kKeyBlock);

  std::vector<Scored> entries(key_parts * num_queries * kept_per_part);
  std::vector<Best> best;
  best.reserve(key_parts * num_queries);
  for (int64_t i = 0; i < key_parts * num_queries; ++i) {
    best.emplace_back(entries.data() + i * kept_per_part, kept_per_part);
  }
  const int64_t tasks = key_parts * query_parts;
  const std::unique_ptr<Scratch[]> scratch(new Scratch[tasks]);  // not cleared: it is large
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t key_part = task / query_parts;
      const int64_t query_part = task % query_parts;
      search(problem, part_begin(blocks, key_part, key_parts) * kKeyBlock,
             std::min(num_keys, part_begin(blocks, key_part + 1, key_parts) * kKeyBlock),
             part_begin(num_queries, query_part, query_parts),
             part_begin(num_queries, query_part + 1, query_parts), best.data() + key_part * num_queries,
             scratch[task]);
    }
  });

  float* out_scores = static_cast<float*>(scores.mutable_data_ptr());
  int64_t* out_indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  std::vector<Scored> merged(num_queries * key_parts * kept_per_part);
  torch::stable::parallel_for(0, num_queries, grain(key_parts * kept_per_part),
                              [&](int64_t first, int64_t last) {
                                for (int64_t q = first; q < last; ++q) {
                                  Scored* const begin = merged.data() + q * key_parts * kept_per_part;
                                  Scored* end = begin;
                                  for (int64_t part = 0; part < key_parts; ++part) {
                                    const Best& kept = best[part * num_queries + q];
                                    end = std::copy(kept.begin(), kept.end(), end);
                                  }
                                  std::partial_sort(begin, begin + k, end, better);
                                  for (int64_t i = 0; i < k; ++i) {
                                    out_scores[q * k + i] = begin[i].score;
                                    out_indices[q * k + i] = begin[i].index;
                                  }
                                }
                              });
  return {scores, indices};
}

}  // namespace clara_fast::cpu
