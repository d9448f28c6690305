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

// Columns of a query's terms are padded to this many, and permuted in groups of 16: see key_tile.cuh.
constexpr int kColumnGroup = 64;

struct PrepareParams {
  const void* queries;  // [num_queries, columns]
  Type query_type, key_type;
  int64_t num_queries, padded_queries;
  int64_t columns, padded_columns;
  int num_terms;
  uint16_t* terms;  // [num_terms, padded_queries, padded_columns]
  float* inverse;   // [padded_queries]: 1 / length of the sum of terms; 0 for a zero query, NaN for one with
                    // NaN or Inf
};

}  // namespace clara_fast::cuda
