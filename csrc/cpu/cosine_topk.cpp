// cosine_topk: streams over the keys in blocks, in the type they are stored in, and keeps the best per query.
#include <memory>
#include <vector>

#include "cosine.h"
#include "kernels.h"
#include "ops.h"
#include "tensors.h"
#include "topk_operands.h"
#include "topk_search.h"

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

// The k best of what the parts of the keys kept for a query.
void merge(Best* const* parts, int64_t num_parts, int64_t query, int64_t k, std::vector<Scored>& merged,
           float* scores, int64_t* indices) {
  merged.clear();
  for (int64_t part = 0; part < num_parts; ++part) {
    Best& best = parts[part][query];
    best.cut();
    merged.insert(merged.end(), best.begin(), best.end());
  }
  if (num_parts > 1) std::nth_element(merged.begin(), merged.begin() + (k - 1), merged.end(), better);
  std::sort(merged.begin(), merged.begin() + k, better);
  for (int64_t i = 0; i < k; ++i) {
    scores[i] = merged[i].score;
    indices[i] = merged[i].index;
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
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = ceil_div(num_keys, kKeyBlock);
  const int64_t useful = num_queries * num_keys / grain(columns) + 1;
  const int64_t parts = std::min({threads, blocks, useful});
  const int64_t group = group_of(num_queries, columns, parts == 1 ? std::min(threads, useful) : 1);
  const int64_t groups = ceil_div(num_queries, group);

  const auto search_group = [&](int64_t first_query) {
    const int64_t count = std::min(group, num_queries - first_query);
    const Queries prepared(queries, query_storage, first_query, count, columns);
    const Operands operands(plan, prepared, count, columns);
    const int64_t keys_per_part = ceil_div(blocks, parts) * kKeyBlock;
    const int64_t kept = std::min(k, keys_per_part);
    const int64_t room = Best::room(kept, keys_per_part);
    const std::unique_ptr<Scored[]> entries(new Scored[parts * count * room]);  // not cleared: it is large
    std::vector<Best> best;
    std::vector<Best*> best_of;
    std::vector<Search> searches;
    best.reserve(parts * count);
    for (int64_t part = 0; part < parts; ++part) {
      best_of.push_back(best.data() + part * count);
      for (int64_t q = 0; q < count; ++q)
        best.emplace_back(entries.get() + (part * count + q) * room, kept, room);
      searches.emplace_back(bank, plan, prepared, operands);
    }
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        searches[part].run(part_begin(blocks, part, parts) * kKeyBlock,
                           std::min(num_keys, part_begin(blocks, part + 1, parts) * kKeyBlock),
                           best_of[part]);
      }
    });
    torch::stable::parallel_for(0, count, grain(parts * kept), [&](int64_t first, int64_t last) {
      std::vector<Scored> merged;
      for (int64_t q = first; q < last; ++q) {
        const int64_t row = (first_query + q) * k;
        merge(best_of.data(), parts, q, k, merged, out_scores + row, out_indices + row);
      }
    });
  };
  if (parts > 1) {
    for (int64_t g = 0; g < groups; ++g) search_group(g * group);
  } else {
    torch::stable::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) search_group(g * group);
    });
  }
  return {scores, indices};
}

}  // namespace clara_fast::cpu
