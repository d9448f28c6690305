// cosine_topk: streams over the keys in blocks, in the type they are stored in, and keeps the best per query.
#include <atomic>
#include <memory>
#include <vector>

#include "cosine.h"
#include "kernels.h"
#include "ops.h"
#include "stream_search.h"
#include "tensors.h"
#include "tile_search.h"
#include "topk_operands.h"

namespace clara_fast::cpu {
namespace {

// Queries that share one pass over the keys: many, yet so few that they and their best fit into memory.
int64_t group_of(int64_t num_queries, int64_t columns, int64_t groups_wanted) {
  constexpr int64_t kMostQueries = 256;
  constexpr int64_t kMostNumbers = 1 << 24;
  const int64_t group =
      std::min(ceil_div(num_queries, groups_wanted), kMostNumbers / std::max<int64_t>(1, columns));
  return ceil_div(std::clamp<int64_t>(group, 1, kMostQueries), kLanes) * kLanes;
}

// The k best of several lists, `apart` from each other.
void merge(Best* best, int64_t lists, int64_t apart, int64_t k, std::vector<Scored>& merged, float* scores,
           int64_t* indices) {
  merged.clear();
  for (int64_t list = 0; list < lists; ++list, best += apart) {
    best->cut();
    merged.insert(merged.end(), best->begin(), best->end());
  }
  if (lists > 1) std::nth_element(merged.begin(), merged.begin() + (k - 1), merged.end(), better);
  std::sort(merged.begin(), merged.begin() + k, better);
  for (int64_t i = 0; i < k; ++i) {
    scores[i] = merged[i].score;
    indices[i] = merged[i].index;
  }
}

struct Task {
  const Tensor& queries;
  Storage query_storage;
  const KeyBank& keys;
  Plan plan;
  int64_t k;
  int64_t threads;
  float* scores;
  int64_t* indices;
};

// How the keys are shared out. Threads seldom get equal shares of a machine's memory, so each takes a piece
// when it has done the one before: long ones first, since long streams are read fastest, and short ones at
// the end, so that none waits for long. Where k is large every thread has one piece, since what it keeps
// would need room for all keys.
class Pieces {
 public:
  Pieces(const KeyBank& keys, int64_t threads, int64_t k)
      : keys_(keys),
        threads_(threads),
        blocks_(ceil_div(keys.count, kKeyBlock)),
        least_(k > kMostInTurn ? ceil_div(blocks_, threads)
                               : kLeastBytes / std::max<int64_t>(1, keys.rows.stride * kKeyBlock) + 1),
        in_turn_(k <= kMostInTurn) {}

  // What a thread may get in all.
  int64_t most_keys() const { return in_turn_ ? keys_.count : least_ * kKeyBlock; }

  // search(begin, end) for each piece that falls to a thread, in order.
  template <class Search>
  void each(int64_t thread, const Search& search) {
    const auto searched = [&](int64_t block, int64_t count) {
      if (block >= blocks_) return false;
      search(block * kKeyBlock, std::min(keys_.count, (block + count) * kKeyBlock));
      return true;
    };
    if (!in_turn_) {
      searched(thread * least_, least_);
      return;
    }
    for (int64_t block = next_, count;;) {
      count = std::max(least_, (blocks_ - block) / (kShare * threads_));
      if (!next_.compare_exchange_weak(block, block + count)) continue;
      if (!searched(block, count)) return;
      block = next_;
    }
  }

 private:
  static constexpr int64_t kMostInTurn = 1024;
  static constexpr int64_t kLeastBytes = 1 << 18;
  static constexpr int64_t kShare = 4;  // of a thread in what is left, that it takes at a time

  const KeyBank& keys_;
  const int64_t threads_, blocks_, least_;
  const bool in_turn_;
  std::atomic<int64_t> next_{0};
};

// `count` queries from `first_query` on. `Search` is how a piece is searched.
template <class Search>
void search_group(const Task& task, int64_t first_query, int64_t count) {
  const Queries queries(task.queries, task.query_storage, first_query, count, task.keys.columns);
  const Operands operands(task.plan, queries, count, task.keys.columns);
  Pieces pieces(task.keys, task.threads, task.k);
  const int64_t lists = task.threads * Search::kParts;  // of the best, for each query
  // A list has its part of every piece, and all pieces but the last are whole blocks.
  static_assert(kKeyBlock % Search::kParts == 0);
  const int64_t most_keys = ceil_div(pieces.most_keys(), Search::kParts);
  const int64_t kept = std::min(task.k, most_keys);
  const int64_t room = Best::room(kept, most_keys);
  const std::unique_ptr<Scored[]> entries(new Scored[lists * count * room]);  // not cleared: it is large
  std::vector<Best> best;
  std::vector<Search> searches;
  best.reserve(lists * count);
  for (int64_t i = 0; i < lists * count; ++i) best.emplace_back(entries.get() + i * room, kept, room);
  searches.reserve(task.threads);
  for (int64_t i = 0; i < task.threads; ++i) searches.emplace_back(task.keys, task.plan, queries, operands);
  torch::stable::parallel_for(0, task.threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      Best* const own = best.data() + thread * Search::kParts * count;
      pieces.each(thread, [&](int64_t begin, int64_t end) { searches[thread].run(begin, end, own); });
    }
  });
  torch::stable::parallel_for(0, count, grain(lists * kept), [&](int64_t first, int64_t last) {
    std::vector<Scored> merged;
    for (int64_t q = first; q < last; ++q) {
      const int64_t row = (first_query + q) * task.k;
      merge(best.data() + q, lists, count, task.k, merged, task.scores + row, task.indices + row);
    }
  });
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
  int64_t scale_groups = 1;
  if (key_scales.has_value()) {
    scale_groups = key_scales->dim() == 2 ? key_scales->size(1) : 1;
    STD_TORCH_CHECK(scale_groups == 1 || (scale_groups > 1 && columns % scale_groups == 0 &&
                                          columns / scale_groups % kSpanAlign == 0),
                    "key_scales must be [N] or [N, G] with groups of a multiple of ", kSpanAlign,
                    " columns, not ", columns, " / ", scale_groups);
    if (key_scales->dim() == 2) {
      check_shape(*key_scales, "key_scales", {num_keys, scale_groups});
    } else {
      check_shape(*key_scales, "key_scales", {num_keys});
    }
    check_type(*key_scales, "key_scales", ScalarType::Float);
  }

  Tensor scores = torch::stable::new_empty(queries, {num_queries, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(queries, {num_queries, k}, ScalarType::Long);
  if (num_queries == 0 || k == 0) return {scores, indices};

  const Rows rows(keys, key_storage, columns);
  const KeyBank bank{
      rows,
      key_storage,
      key_scales.has_value() ? static_cast<const float*>(key_scales->const_data_ptr()) : nullptr,
      scale_groups,
      num_keys,
      columns};
  const Plan plan = choose_plan(query_storage, key_storage, num_queries);
  float* out_scores = static_cast<float*>(scores.mutable_data_ptr());
  int64_t* out_indices = static_cast<int64_t*>(indices.mutable_data_ptr());

  // Threads share out the keys; where there are few, groups of queries.
  const int64_t useful = num_queries * num_keys / grain(columns) + 1;
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), useful);
  const int64_t threads = std::min(most, ceil_div(num_keys, kKeyBlock));
  const int64_t group = group_of(num_queries, columns, threads == 1 ? most : 1);
  const int64_t groups = ceil_div(num_queries, group);

  const Task task{queries, query_storage, bank, plan, k, threads, out_scores, out_indices};
  const auto search = [&](int64_t g) {
    const int64_t count = std::min(group, num_queries - g * group);
    plan.streams ? search_group<StreamSearch>(task, g * group, count)
                 : search_group<TileSearch>(task, g * group, count);
  };
  if (threads > 1) {
    for (int64_t g = 0; g < groups; ++g) search(g);
  } else {
    torch::stable::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) search(g);
    });
  }
  return {scores, indices};
}

}  // namespace clara_fast::cpu
