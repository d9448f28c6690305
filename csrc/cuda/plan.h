// How a search is laid out on a device: tiles, parts and memory. Plain C++, also for the tests without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "search.h"

namespace clara_fast::cuda {

struct Device {
  int64_t multiprocessors;
  int64_t shared_per_multiprocessor;  // bytes; a block may have all but 1024 of them
};

struct Plan {
  int queries_per_tile;
  int num_terms;
  int64_t padded_queries, padded_columns;
  int64_t query_tiles, parts;
  int capacity;
  int64_t shared_bytes;  // of a block of the search
  int merge_threads;
  // Where each part of the workspace begins, in bytes, and where the last ends.
  int64_t terms, inverse, lists, candidates, special, workspace_bytes;
  bool candidates_in_shared;
};

inline int64_t ceil_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// 16-bit terms whose sum is a query, to float32 accuracy. bfloat16 holds 8 bits, so that three make up a
// float32 and two a float16; two float16, with 11 bits each, make up a float32.
inline int terms_of(Type queries, Type keys) {
  if (queries == Type::kBFloat16) return 1;
  if (uses_bfloat16(keys)) return queries == Type::kFloat32 ? 3 : 2;
  return queries == Type::kFloat32 ? 2 : 1;
}

// Few parts, so that merging is cheap, but enough to keep all multiprocessors busy to the end.
inline int64_t choose_parts(int64_t query_tiles, int64_t key_tiles, int64_t blocks_at_once) {
  int64_t best = 1;
  double best_cost = 1e300;
  for (int64_t waves = 1; waves <= 8; ++waves) {
    const int64_t parts = std::clamp<int64_t>(waves * blocks_at_once / query_tiles, 1, key_tiles);
    const int64_t used = (query_tiles * parts + blocks_at_once - 1) / blocks_at_once;
    const double cost = static_cast<double>(used) / static_cast<double>(parts);
    if (cost < 0.95 * best_cost) {
      best = parts;
      best_cost = cost;
    }
  }
  return best;
}

inline Plan make_plan(const Device& device, Type query_type, Type key_type, int64_t num_queries,
                      int64_t num_keys, int64_t columns, int64_t k) {
  Plan plan{};
  plan.num_terms = terms_of(query_type, key_type);
  // What every block takes of a multiprocessor's shared memory, and how many blocks of so many bytes fit.
  constexpr int64_t kReserved = 1024;
  const auto blocks_of = [&](int64_t bytes) {
    return device.shared_per_multiprocessor / (bytes + kReserved);
  };
  const auto staged_of = [&](int tile) {
    const int64_t stage = static_cast<int64_t>(tile_columns(key_type)) *
                          (kKeysPerTile * element_bytes(key_type) + plan.num_terms * tile * 2);
    return num_stages(tile) * stage + kept_bytes(tile);
  };
  int tile = num_queries <= 8 ? 8 : num_queries <= 32 ? 32 : 64;
  if (tile == 64 && blocks_of(staged_of(tile)) == 0) tile = 32;
  plan.queries_per_tile = tile;
  plan.padded_queries = ceil_to(num_queries, tile);
  plan.padded_columns = ceil_to(columns, kColumnGroup);
  plan.query_tiles = plan.padded_queries / tile;

  // Room for k and as many again, so that a buffer is thinned out once in k acceptances. That is also at
  // least k rounded up to a power of two, which the merge sorts.
  plan.capacity = 2 * static_cast<int>(std::max<int64_t>(k, 32));
  // The buffers are in shared memory where that costs no second block on a multiprocessor. Else they are in
  // global memory, which for them is the L2 cache: a buffer is touched k log(keys / k) times, while a smaller
  // tile of queries would read all the keys more often.
  const int64_t staged = staged_of(tile);
  const int64_t buffered = std::min<int64_t>(tile, num_queries) * plan.capacity * 8;
  plan.candidates_in_shared = blocks_of(staged + buffered) >= std::clamp<int64_t>(blocks_of(staged), 1, 2);
  plan.shared_bytes = staged + (plan.candidates_in_shared ? buffered : 0);

  const int64_t resident =
      std::clamp<int64_t>(blocks_of(plan.shared_bytes), 1, resident_blocks(plan.queries_per_tile));
  const int64_t key_tiles = (num_keys + kKeysPerTile - 1) / kKeysPerTile;
  plan.parts = choose_parts(plan.query_tiles, key_tiles, device.multiprocessors * resident);
  plan.merge_threads = static_cast<int>(std::clamp<int64_t>(ceil_to(plan.parts * k / 4, 128), 128, 1024));

  int64_t end = 0;
  const auto place = [&](int64_t bytes) {
    const int64_t begin = end;
    end += ceil_to(bytes, 256);
    return begin;
  };
  const int64_t blocks = plan.query_tiles * plan.parts;
  plan.terms = place(plan.num_terms * plan.padded_queries * plan.padded_columns * 2);
  plan.inverse = place(plan.padded_queries * 4);
  plan.lists = place(plan.parts * num_queries * k * 8);
  plan.candidates = place(plan.candidates_in_shared ? 0 : blocks * plan.queries_per_tile * plan.capacity * 8);
  plan.special = place(has_wide_range(key_type) ? blocks * kKeysPerTile * plan.queries_per_tile * 4 : 0);
  plan.workspace_bytes = end;
  return plan;
}

struct Problem {
  const void* queries;
  Type query_type;
  const void* keys;
  Type key_type;
  const float* key_scales;
  int64_t num_queries, num_keys, columns;
  int k;
};

inline SearchParams search_params(const Problem& problem, const Plan& plan, void* workspace) {
  char* const base = static_cast<char*>(workspace);
  SearchParams params{};
  params.queries = {problem.queries,
                    problem.query_type,
                    problem.key_type,
                    problem.num_queries,
                    plan.padded_queries,
                    problem.columns,
                    plan.padded_columns,
                    plan.num_terms,
                    reinterpret_cast<uint16_t*>(base + plan.terms),
                    reinterpret_cast<float*>(base + plan.inverse)};
  params.keys = problem.keys;
  params.key_scales = problem.key_scales;
  params.num_keys = problem.num_keys;
  const uint64_t row_bytes = static_cast<uint64_t>(problem.columns) * element_bytes(problem.key_type);
  const uint64_t alignment = reinterpret_cast<uint64_t>(problem.keys) | row_bytes;
  params.copy_bytes = alignment % 16 == 0 ? 16 : alignment % 4 == 0 ? 4 : 1;
  params.k = problem.k;
  params.capacity = plan.capacity;
  params.candidates =
      plan.candidates_in_shared ? nullptr : reinterpret_cast<uint64_t*>(base + plan.candidates);
  params.lists = reinterpret_cast<uint64_t*>(base + plan.lists);
  params.special = reinterpret_cast<float*>(base + plan.special);
  return params;
}

inline MergeParams merge_params(const Problem& problem, const Plan& plan, const SearchParams& search,
                                float* scores, int64_t* indices) {
  return {search.lists, plan.parts, problem.num_queries, problem.k, plan.capacity, scores, indices};
}

}  // namespace clara_fast::cuda
