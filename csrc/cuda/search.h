// What the kernels of cosine_topk take. Plain structures, for device and host.
#pragma once

#include <cstdint>

namespace clara_fast::cuda {

enum class Type : int { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8 };

constexpr int element_bytes(Type type) {
  return type == Type::kFloat32 ? 4 : type == Type::kBFloat16 || type == Type::kFloat16 ? 2 : 1;
}

// Queries become 16-bit terms that add up to them: bfloat16 ones beside keys whose range is that of float32,
// else float16 ones.
constexpr bool uses_bfloat16(Type keys) { return keys == Type::kBFloat16 || keys == Type::kFloat32; }

// Where float32 sums of squares of keys may overflow or vanish, so that some keys need exact lengths.
constexpr bool has_wide_range(Type keys) { return uses_bfloat16(keys); }

constexpr int kMaxK = 1024;
constexpr int kKeysPerTile = 128;
constexpr int kSearchThreads = 128;
constexpr int kSearchWarps = kSearchThreads / 32;
constexpr int kHistogramBins = 256;  // a warp's, to select the best

// Columns of a staged tile; the columns of a query's terms are padded to a multiple of the larger.
constexpr int tile_columns(Type keys) { return keys == Type::kFloat32 ? 32 : 64; }
constexpr int kColumnGroup = 64;
// Blocks that a multiprocessor's registers are to hold, and the stages of a block's tiles.
constexpr int resident_blocks(int queries_per_tile) { return queries_per_tile > 8 ? 2 : 4; }
constexpr int num_stages(int queries_per_tile) { return queries_per_tile > 8 ? 3 : 4; }

// Bytes of shared memory that stay beside the stages: thresholds, floors, inverses, counts; histograms.
constexpr int kept_bytes(int queries_per_tile) {
  return queries_per_tile * (8 + 4 + 4 + 4) + kSearchWarps * kHistogramBins * 4;
}

struct PrepareParams {
  const void* queries;  // [num_queries, columns]
  Type query_type, key_type;
  int64_t num_queries, padded_queries;
  int64_t columns, padded_columns;
  int num_terms;
  uint16_t* terms;  // [num_terms, padded_queries, padded_columns], columns permuted: see column_at
  float* inverse;   // [padded_queries]: 1 / length of the terms' sum; 0 for a zero query, NaN for a bad one
};

// A candidate is one integer: the score's bits, made to order, above the complement of the key's index.
// Larger is better, no two are equal, and 0 is none.
struct SearchParams {
  PrepareParams queries;
  const void* keys;         // [num_keys, columns]
  const float* key_scales;  // [num_keys], or null: all 1
  int64_t num_keys;
  int copy_bytes;  // what the keys' address and row size are multiples of: 16, 4 or 1
  int k, capacity;
  uint64_t* candidates;  // [blocks, queries_per_tile, capacity], or null: in shared memory
  uint64_t* lists;       // [parts, num_queries, k]: out, the best of each part of the keys, in any order
  float* special;        // [blocks, kKeysPerTile, queries_per_tile], used for keys of extreme length
};

struct MergeParams {
  const uint64_t* lists;  // [parts, num_queries, k]
  int64_t parts, num_queries;
  int k, capacity;
  float* scores;     // [num_queries, k]
  int64_t* indices;  // [num_queries, k]
};

}  // namespace clara_fast::cuda
