// cosine_topk: streams over the keys in blocks, in the type they are stored in, and keeps the best per query.
#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "cosine.h"
#include "kernels.h"
#include "key_pieces.h"
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
  const std::vector<KeyBank>& banks;
  Plan plan;
  int64_t k;
  int64_t threads;
  std::function<void(size_t bank)> done;  // with all keys of a bank; may be empty
  float* scores;
  int64_t* indices;
};

// `count` queries from `first_query` on. `Search` is how a piece is searched.
template <class Search>
void search_group(const Task& task, int64_t first_query, int64_t count) {
  const KeyBank& like = task.banks[0];
  const QueryGroup group(task.plan, task.queries, task.query_storage, first_query, count, like.columns);
  KeyPieces pieces(task.banks, task.threads, task.k);
  const int64_t lists = task.threads * Search::kParts;  // of the best, for each query
  // A list has its part of every piece, and all pieces of a bank but the last are whole blocks.
  static_assert(kKeyBlock % Search::kParts == 0);
  const int64_t most_keys =
      ceil_div(pieces.most_keys(), Search::kParts) + static_cast<int64_t>(task.banks.size()) - 1;
  const int64_t kept = std::min(task.k, most_keys);
  const int64_t room = Best::room(kept, most_keys);
  const std::unique_ptr<Scored[]> entries(new Scored[lists * count * room]);  // not cleared: it is large
  std::vector<Best> best;
  std::vector<Search> searches;
  best.reserve(lists * count);
  for (int64_t i = 0; i < lists * count; ++i) best.emplace_back(entries.get() + i * room, kept, room);
  searches.reserve(task.threads);
  for (int64_t i = 0; i < task.threads; ++i) searches.emplace_back(like, group);
  std::vector<std::atomic<int64_t>> missing(task.banks.size());
  for (size_t b = 0; b < missing.size(); ++b) missing[b] = task.banks[b].count;
  torch::stable::parallel_for(0, task.threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      Best* const own = best.data() + thread * Search::kParts * count;
      pieces.each(thread, [&](size_t bank, int64_t begin, int64_t end) {
        searches[thread].run(task.banks[bank], begin, end, own);
        if (task.done && missing[bank].fetch_sub(end - begin) == end - begin) task.done(bank);
      });
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

// The tensor that goes with tensor `i`, if there are such.
const Tensor* at(const std::vector<Tensor>& tensors, size_t i) {
  return tensors.empty() ? nullptr : &tensors[i];
}

KeyBank bank_of(const Tensor& keys, const Tensor* scales, const Tensor* allowed, int64_t first) {
  STD_TORCH_CHECK(keys.dim() == 2, "keys must have 2 dimensions, not ", keys.dim());
  const int64_t count = keys.size(0), columns = keys.size(1);
  check_shape(keys, "keys", {count, columns});
  const Storage storage = storage_of(keys, "keys", true);
  KeyBank bank{Rows(keys, storage, columns), storage, count, columns, first, 1, nullptr, nullptr};
  if (scales != nullptr) {
    bank.groups = scales->dim() == 2 ? scales->size(1) : 1;
    STD_TORCH_CHECK(bank.groups == 1 || (bank.groups > 1 && columns % bank.groups == 0 &&
                                         columns / bank.groups % kSpanAlign == 0),
                    "key_scales must be [N] or [N, G] with groups of a multiple of ", kSpanAlign,
                    " columns, not ", columns, " / ", bank.groups);
    if (scales->dim() == 2) {
      check_shape(*scales, "key_scales", {count, bank.groups});
    } else {
      check_shape(*scales, "key_scales", {count});
    }
    check_type(*scales, "key_scales", ScalarType::Float);
    bank.scales = static_cast<const float*>(scales->const_data_ptr());
  }
  if (allowed != nullptr && allowed->numel() > 0) {
    check_shape(*allowed, "allowed", {count});
    check_type(*allowed, "allowed", ScalarType::Bool);
    bank.allowed = static_cast<const bool*>(allowed->const_data_ptr());
  }
  return bank;
}

int64_t number_allowed(const KeyBank& bank) {
  return bank.allowed == nullptr ? bank.count : std::count(bank.allowed, bank.allowed + bank.count, true);
}

}  // namespace

std::tuple<Tensor, Tensor> cosine_topk_parts(Tensor queries, std::vector<Tensor> keys, int64_t k,
                                             std::vector<Tensor> key_scales, std::vector<Tensor> allowed,
                                             bool release) {
  STD_TORCH_CHECK(!keys.empty(), "keys must hold at least one tensor");
  STD_TORCH_CHECK(key_scales.empty() || key_scales.size() == keys.size(), "key_scales must go with keys");
  STD_TORCH_CHECK(allowed.empty() || allowed.size() == keys.size(), "allowed must go with keys");
  const Storage query_storage = storage_of(queries, "queries");
  STD_TORCH_CHECK(queries.dim() == 2, "queries must have 2 dimensions, not ", queries.dim());
  const int64_t num_queries = queries.size(0);
  const int64_t columns = queries.size(1);
  check_shape(queries, "queries", {num_queries, columns});
  std::vector<KeyBank> banks;
  int64_t num_keys = 0, num_allowed = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    banks.push_back(bank_of(keys[i], at(key_scales, i), at(allowed, i), num_keys));
    const KeyBank& bank = banks.back();
    STD_TORCH_CHECK(
        bank.columns == columns && bank.storage == banks[0].storage && bank.groups == banks[0].groups,
        "keys must have the width of queries, and one type and number of scales");
    num_keys += bank.count;
    num_allowed += number_allowed(bank);
  }
  STD_TORCH_CHECK(k >= 0 && k <= num_allowed, "k (", k,
                  ") must be at least 0 and at most the number of keys (", num_allowed, ")");

  Tensor scores = torch::stable::new_empty(queries, {num_queries, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(queries, {num_queries, k}, ScalarType::Long);
  if (num_queries == 0 || k == 0) return {scores, indices};

  const Plan plan = choose_plan(query_storage, banks[0].storage, num_queries);

  // Threads share out the keys; where there are few, groups of queries.
  const int64_t useful = num_queries * num_keys / grain(columns) + 1;
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), useful);
  const int64_t threads = std::min(most, ceil_div(num_keys, kKeyBlock));
  const int64_t group = group_of(num_queries, columns, threads == 1 ? most : 1);
  const int64_t groups = ceil_div(num_queries, group);

  Task task{queries,
            query_storage,
            banks,
            plan,
            k,
            threads,
            {},
            static_cast<float*>(scores.mutable_data_ptr()),
            static_cast<int64_t*>(indices.mutable_data_ptr())};
  const auto search = [&](int64_t g) {
    const int64_t count = std::min(group, num_queries - g * group);
    plan.streams ? search_group<StreamSearch>(task, g * group, count)
                 : search_group<TileSearch>(task, g * group, count);
  };
  const auto release_bank = [&](size_t bank) {
    release_pages(keys[bank]);
    if (!key_scales.empty()) release_pages(key_scales[bank]);
  };
  if (threads > 1 || most == 1) {
    for (int64_t g = 0; g < groups; ++g) {
      if (release && g == groups - 1) task.done = release_bank;
      search(g);
    }
  } else {
    torch::stable::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) search(g);
    });
    for (size_t bank = 0; bank < banks.size() && release; ++bank) release_bank(bank);
  }
  return {scores, indices};
}

std::tuple<Tensor, Tensor> cosine_topk(Tensor queries, Tensor keys, int64_t k,
                                       std::optional<Tensor> key_scales) {
  std::vector<Tensor> scales;
  if (key_scales.has_value()) scales.push_back(*key_scales);
  return cosine_topk_parts(queries, {keys}, k, scales, {}, false);
}

}  // namespace clara_fast::cpu
