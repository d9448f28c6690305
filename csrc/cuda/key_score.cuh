// What a key's length makes of its dot products, also where float32 squares overflow or vanish.
#pragma once

#include "device.cuh"
#include "key_tile.cuh"
#include "search.h"

namespace clara_fast::cuda {

// Float32 sums of squares in this range lost nothing to overflow or underflow.
constexpr float kSmallestSquare = 1e-30f;
constexpr float kLargestSquare = 1e30f;

// 1 / length of a key, with the sign of its scale: 0 for a zero key, NaN for a bad one. `extreme` where its
// length is not to be had from a float32 sum of squares.
__device__ __forceinline__ float key_factor(float square, float scale, bool wide_range, bool& extreme) {
  extreme = false;
  if (square != square || !(fabsf(scale) < INFINITY)) return __uint_as_float(0x7fc00000u);
  if (scale == 0.0f) return 0.0f;
  if (square >= kSmallestSquare && square <= kLargestSquare) return copysignf(1.0f / sqrtf(square), scale);
  extreme = wide_range;
  return square == 0.0f ? 0.0f : __uint_as_float(0x7fc00000u);
}

__device__ __forceinline__ double sum_of_warp(double value) {
  for (int other = kWarp / 2; other > 0; other /= 2) value += __shfl_xor_sync(kAllLanes, value, other);
  return value;
}

// A warp computes the scores of one key of extreme length in float64. Rare, so not fast.
__device__ __forceinline__ void score_extreme_key(const SearchParams& params, Type key_type, int64_t key,
                                                  float scale, int64_t first_query, int num_queries,
                                                  float* scores) {
  const int lane = threadIdx.x % kWarp;
  const int64_t columns = params.queries.columns;
  double key_square = 0.0;
  for (int64_t i = lane; i < columns; i += kWarp) {
    const double x = load_float(params.keys, key_type, key * columns + i);
    key_square += x * x;
  }
  key_square = sum_of_warp(key_square);
#pragma unroll 1
  for (int q = 0; q < num_queries; ++q) {
    const int64_t query = first_query + q;
    float score = 0.0f;
    if (query < params.queries.num_queries && key_square != 0.0) {
      double dot = 0.0, square = 0.0;
      for (int64_t i = lane; i < columns; i += kWarp) {
        const double x = load_float(params.keys, key_type, key * columns + i);
        const double y = load_float(params.queries.queries, params.queries.query_type, query * columns + i);
        dot += x * y;
        square += y * y;
      }
      dot = sum_of_warp(dot);
      square = sum_of_warp(square);
      if (square != 0.0)
        score = static_cast<float>(copysign(1.0, scale) * dot / (sqrt(key_square) * sqrt(square)));
    }
    if (lane == 0) scores[q] = score;
  }
}

}  // namespace clara_fast::cuda
