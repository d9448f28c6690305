// The k best of all parts of the keys, sorted.
#pragma once

#include "device.cuh"
#include "search.h"
#include "topk.cuh"

namespace clara_fast::cuda {

constexpr int kMergeThreads = 1024;  // at most
constexpr int kMergeAtOnce = 4;      // candidates of a thread in a round

constexpr int merge_shared_bytes(int capacity) {
  return capacity * static_cast<int>(sizeof(uint64_t)) + kHistogramBins * 4 + 16;
}

// One block per query; capacity is at least k rounded up to a power of two.
__global__ void __launch_bounds__(kMergeThreads)
    merge_lists_kernel(const __grid_constant__ MergeParams params) {
  Best best;
  best.candidates = reinterpret_cast<uint64_t*>(dynamic_shared());
  best.thresholds = best.candidates + params.capacity;
  unsigned* const histogram = reinterpret_cast<unsigned*>(best.thresholds + 1);
  best.counts = reinterpret_cast<int*>(histogram + kHistogramBins);
  best.k = params.k;
  best.capacity = params.capacity;
  if (threadIdx.x == 0) {
    best.thresholds[0] = 0;
    best.counts[0] = 0;
  }
  __syncthreads();

  const int64_t query = blockIdx.x;
  const int64_t total = params.parts * params.k;
  const int stride = blockDim.x;
  for (int64_t begin = 0; begin < total; begin += kMergeAtOnce * stride) {
    uint64_t mine[kMergeAtOnce];
#pragma unroll
    for (int i = 0; i < kMergeAtOnce; ++i) {
      const int64_t place = begin + i * stride + threadIdx.x;
      const int64_t part = place / params.k;
      mine[i] =
          place < total ? params.lists[(part * params.num_queries + query) * params.k + place % params.k] : 0;
    }
    for (;;) {
      bool waiting = false;
#pragma unroll
      for (int i = 0; i < kMergeAtOnce; ++i) {
        if (mine[i] == 0) continue;
        if (best.offer(0, mine[i])) {
          mine[i] = 0;
        } else {
          waiting = true;
        }
      }
      if (!__syncthreads_or(waiting)) break;
      if (threadIdx.x < kWarp) best.thin_out(0, histogram);
      __syncthreads();
    }
  }
  if (threadIdx.x < kWarp) best.thin_out(0, histogram);
  __syncthreads();

  // A bitonic sort, the best first.
  int size = 1;
  while (size < params.k) size *= 2;
  for (int i = best.counts[0] + threadIdx.x; i < size; i += stride) best.candidates[i] = 0;
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += stride) {
        const int low = i / distance * 2 * distance + i % distance;
        const uint64_t a = best.candidates[low], b = best.candidates[low + distance];
        if ((a < b) == ((low & run) == 0)) {
          best.candidates[low] = b;
          best.candidates[low + distance] = a;
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < params.k; i += stride) {
    const uint64_t candidate = best.candidates[i];
    params.scores[query * params.k + i] = score_of(candidate);
    params.indices[query * params.k + i] = index_of(candidate);
  }
}

}  // namespace clara_fast::cuda
