// The k best candidates of a query: kept in a buffer with room for more, and thinned out when it is full.
//
// Candidates are distinct and totally ordered, and only those below k others are ever dropped. So the k that
// remain depend neither on the order of arrival nor on when the buffer was thinned out.
#pragma once

#include "device.cuh"
#include "search.h"

namespace clara_fast::cuda {

__device__ __forceinline__ uint64_t pack(float score, uint32_t index) {
  const uint32_t bits = __float_as_uint(score);
  uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
  if (score != score) order = 0;
  return static_cast<uint64_t>(order) << 32 | static_cast<uint32_t>(~index);
}

__device__ __forceinline__ float score_of(uint64_t candidate) {
  const uint32_t order = static_cast<uint32_t>(candidate >> 32);
  if (order == 0) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

__device__ __forceinline__ uint32_t index_of(uint64_t candidate) { return ~static_cast<uint32_t>(candidate); }

__device__ __forceinline__ uint64_t min_of_warp(uint64_t value) {
  for (int other = kWarp / 2; other > 0; other /= 2) {
    const uint64_t theirs = __shfl_xor_sync(kAllLanes, value, other);
    value = theirs < value ? theirs : value;
  }
  return value;
}

__device__ __forceinline__ uint64_t or_of_warp(uint64_t value) {
  for (int other = kWarp / 2; other > 0; other /= 2) value |= __shfl_xor_sync(kAllLanes, value, other);
  return value;
}

// A warp moves the k best of count > k candidates to the front, in any order, and returns the least of them.
// Radix selection: a histogram of the highest undecided bits finds the bin of the k-th best, then the bits
// below it count.
__device__ __forceinline__ uint64_t keep_best(uint64_t* candidates, int count, int k, unsigned* histogram) {
  const int lane = threadIdx.x % kWarp;
  const uint64_t first = candidates[0];
  uint64_t differing = 0;
  for (int i = lane; i < count; i += kWarp) differing |= candidates[i] ^ first;
  int undecided = 64 - __clzll(static_cast<long long>(or_of_warp(differing)));  // bits
  uint64_t prefix = undecided == 64 ? 0 : first >> undecided;
  unsigned wanted = k;  // so many of those that begin with `prefix`
  while (undecided > 0) {
    const int width = undecided < 8 ? undecided : 8;
    undecided -= width;
    for (int bin = lane; bin < kHistogramBins; bin += kWarp) histogram[bin] = 0;
    __syncwarp();
    for (int i = lane; i < count; i += kWarp) {
      const uint64_t bits = candidates[i] >> undecided;
      if (bits >> width == prefix) atomicAdd(&histogram[bits & ((1u << width) - 1)], 1u);
    }
    __syncwarp();
    // A lane sums 8 bins, the first lane the highest; the sums of the lanes before it are above its own.
    constexpr int kBinsPerLane = kHistogramBins / kWarp;
    const int top = kHistogramBins - 1 - lane * kBinsPerLane;
    unsigned sum = 0;
    for (int bin = top; bin > top - kBinsPerLane; --bin) sum += histogram[bin];
    unsigned up_to_here = sum;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const unsigned before = __shfl_up_sync(kAllLanes, up_to_here, distance);
      if (lane >= distance) up_to_here += before;
    }
    const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, up_to_here >= wanted))) - 1;
    unsigned above = up_to_here - sum;
    int bin = top;
    while (lane == owner && above + histogram[bin] < wanted) above += histogram[bin--];
    bin = __shfl_sync(kAllLanes, bin, owner);
    wanted -= __shfl_sync(kAllLanes, above, owner);
    prefix = prefix << width | static_cast<unsigned>(bin);
    const bool whole_bin = histogram[bin] == wanted;
    __syncwarp();
    if (whole_bin) break;
  }
  const uint64_t floor = prefix << undecided;
  uint64_t least = ~uint64_t{0};
  int kept = 0;
  for (int begin = 0; begin < count; begin += kWarp) {
    const uint64_t candidate = begin + lane < count ? candidates[begin + lane] : 0;
    const bool keep = begin + lane < count && candidate >= floor;
    const unsigned keepers = __ballot_sync(kAllLanes, keep);
    if (keep) {
      candidates[kept + __popc(keepers & ((1u << lane) - 1))] = candidate;  // never past what was read
      least = candidate < least ? candidate : least;
    }
    kept += __popc(keepers);
    __syncwarp();
  }
  return min_of_warp(least);
}

// The buffers of a block's queries.
struct Best {
  uint64_t* candidates;  // [queries, capacity]
  uint64_t* thresholds;  // [queries]: what is not above it is not among the k best
  int* counts;           // [queries]: above capacity where some candidates found no room
  int k, capacity;

  // Whether there was room, or no need of it.
  __device__ __forceinline__ bool offer(int query, uint64_t candidate) const {
    if (candidate <= thresholds[query]) return true;
    const int slot = atomicAdd(&counts[query], 1);
    if (slot >= capacity) return false;
    candidates[query * capacity + slot] = candidate;
    return true;
  }

  // A warp reduces a query with more than k candidates to its k best.
  __device__ __forceinline__ void thin_out(int query, unsigned* histogram) const {
    const int count = counts[query] < capacity ? counts[query] : capacity;
    if (count <= k) return;
    const uint64_t least =
        keep_best(candidates + static_cast<int64_t>(query) * capacity, count, k, histogram);
    if (threadIdx.x % kWarp == 0) {
      thresholds[query] = least;
      counts[query] = k;
    }
  }
};

}  // namespace clara_fast::cuda
