// Queries as sums of 16-bit terms for the tensor cores, and their lengths.
#pragma once

#include "device.cuh"
#include "key_tile.cuh"
#include "search.h"

namespace clara_fast::cuda {

constexpr int kPrepareThreads = 256;
constexpr int kPrepareShared = kPrepareThreads / kWarp * static_cast<int>(sizeof(double) + sizeof(float));

template <class Term>
__device__ __forceinline__ void write_terms(const PrepareParams& params, int64_t query, bool usable,
                                            double scale) {
  for (int64_t place = threadIdx.x; place < params.padded_columns; place += kPrepareThreads) {
    const int64_t column = place / 16 * 16 + column_at(static_cast<int>(place % 16), params.key_type);
    float rest = 0.0f;
    if (usable && column < params.columns) {
      rest = static_cast<float>(
          load_float(params.queries, params.query_type, query * params.columns + column) * scale);
    }
    for (int term = 0; term < params.num_terms; ++term) {
      const uint16_t bits = from_float(rest, Term());
      params.terms[(term * params.padded_queries + query) * params.padded_columns + place] = bits;
      rest -= to_float(bits, Term());
    }
  }
}

// One block per padded query.
__global__ void __launch_bounds__(kPrepareThreads) prepare_queries_kernel(PrepareParams params) {
  const int64_t query = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double square = 0.0;
  float largest = 0.0f;
  if (query < params.num_queries) {
    for (int64_t i = threadIdx.x; i < params.columns; i += kPrepareThreads) {
      const float x = load_float(params.queries, params.query_type, query * params.columns + i);
      square += static_cast<double>(x) * x;
      largest = fmaxf(largest, fabsf(x));
    }
  }
  for (int other = kWarp / 2; other > 0; other /= 2) {
    square += __shfl_xor_sync(kAllLanes, square, other);
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, other));
  }
  double* const squares = reinterpret_cast<double*>(dynamic_shared());
  float* const largests = reinterpret_cast<float*>(squares + kPrepareThreads / kWarp);
  if (lane == 0) {
    squares[warp] = square;
    largests[warp] = largest;
  }
  __syncthreads();
  square = 0.0;
  for (int i = 0; i < kPrepareThreads / kWarp; ++i) {
    square += squares[i];
    largest = fmaxf(largest, largests[i]);
  }

  const bool finite = square < 1e300;  // false for NaN too; float32 squares do not reach it
  const bool usable = finite && square > 0.0;
  double scale = 1.0;
  if (usable) {
    // The largest element becomes [2^13, 2^14): float16 terms then keep 38 bits below it. A cosine does not
    // change by a power of two.
    int exponent;
    frexpf(largest, &exponent);
    scale = ldexp(1.0, 14 - exponent);
  }
  if (threadIdx.x == 0) {
    float inverse = finite ? 0.0f : __uint_as_float(0x7fc00000u);
    if (usable) inverse = static_cast<float>(1.0 / (sqrt(square) * scale));
    params.inverse[query] = inverse;
  }
  if (uses_bfloat16(params.key_type)) {
    write_terms<BFloat16>(params, query, usable, scale);
  } else {
    write_terms<Float16>(params, query, usable, scale);
  }
}

}  // namespace clara_fast::cuda
