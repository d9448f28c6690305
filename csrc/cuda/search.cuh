// The search: a block streams one part of the keys past a tile of queries and keeps each query's k best.
//
// Tiles of 128 keys and of 8 to 64 queries' terms come through shared memory, a few dozen columns at a time,
// copied asynchronously a few steps ahead, also across the end of a tile. Each of the four warps multiplies
// 32 of the keys with all the queries on tensor cores, and sums the squares of its keys from the same
// registers. Products of at most 64 columns are summed by the tensor cores, whose additions truncate; those
// sums are added in float32.
#pragma once

#include <algorithm>

#include "copy_tiles.cuh"
#include "device.cuh"
#include "key_score.cuh"
#include "key_tile.cuh"
#include "search.h"
#include "topk.cuh"

namespace clara_fast::cuda {

// The part of the shared memory that stays.
template <int kQueries>
struct Kept {
  Best best;
  float* floors;   // [queries]: a score below it is not among the k best
  float* inverse;  // [queries]
  unsigned* histogram;

  __device__ __forceinline__ Kept(unsigned char* memory, const SearchParams& params, const Part& part) {
    best.thresholds = reinterpret_cast<uint64_t*>(memory);
    floors = reinterpret_cast<float*>(best.thresholds + kQueries);
    inverse = floors + kQueries;
    best.counts = reinterpret_cast<int*>(inverse + kQueries);
    unsigned* const histograms = reinterpret_cast<unsigned*>(best.counts + kQueries);
    histogram = histograms + threadIdx.x / kWarp * kHistogramBins;
    best.k = params.k;
    best.capacity = params.capacity;
    best.candidates = params.candidates == nullptr
                          ? reinterpret_cast<uint64_t*>(histograms + kSearchWarps * kHistogramBins)
                          : params.candidates + part.block * kQueries * params.capacity;
    for (int q = threadIdx.x; q < kQueries; q += kSearchThreads) {
      const bool real = part.first_query + q < params.queries.num_queries;
      best.thresholds[q] = real ? 0 : ~uint64_t{0};
      best.counts[q] = 0;
      floors[q] = real ? -INFINITY : INFINITY;
      inverse[q] = params.queries.inverse[part.first_query + q];
    }
  }

  // All warps. Makes room in the full buffers.
  __device__ __forceinline__ void make_room() {
    for (int q = threadIdx.x / kWarp; q < kQueries; q += kSearchWarps) {
      if (best.counts[q] < best.capacity) continue;
      best.thin_out(q, histogram);
      __syncwarp();
      if (threadIdx.x % kWarp == 0) {
        const float least = score_of(best.thresholds[q]);
        floors[q] = least == least ? least : -INFINITY;
      }
    }
  }
};

// Dot products and sums of squares of a warp's 32 keys. In the layout of `multiply`: dots[m][n] is of keys 16
// m + g and 16 m + 8 + g with queries 8 n + 2 t and the next; squares[m][half] is this lane's share for key
// 16 m + 8 half + g.
template <Type kType, int kQueries>
struct Sums {
  using Keys = KeyTile<kType>;
  static constexpr int kGroups = kQueries / 8;
  // Two chains of multiplications each that do not wait for each other; fewer beside the registers of float32
  // keys.
  static constexpr int kAtOnce = std::min(kGroups, Keys::kTerms == 1 ? 4 : 2);

  float dots[2][kGroups][4];
  float squares[2][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      squares[m][0] = squares[m][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dots[m][n][i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void add(const unsigned char* stage, int num_terms) {
    typename Keys::Fragments keys[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float partial[2] = {0.0f, 0.0f};
      Keys::load(stage, static_cast<int>(threadIdx.x) / kWarp * 32 + 16 * m, keys[m], partial);
      squares[m][0] += partial[0];
      squares[m][1] += partial[1];
    }
    const unsigned char* const terms = stage + SearchLayout<kType, kQueries>::kKeyBytes;
#pragma unroll
    for (int first = 0; first < kGroups; first += kAtOnce) {
      float partial[2][kAtOnce][4] = {};
      // The smallest products first: what truncation costs is in proportion to the sum so far.
#pragma unroll 1
      for (int term = num_terms - 1; term >= 0; --term) {
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          uint32_t queries[Keys::kSteps][2];
          load_queries<Keys::kSteps>(terms + term * SearchLayout<kType, kQueries>::kTermBytes,
                                     (first + n) * 8, queries);
#pragma unroll
          for (int part = Keys::kTerms - 1; part >= 0; --part) {
            // Of float32 by float32, what is left out is below 2^-26 of the product.
            if (part > 0 && part + term >= 3) continue;
#pragma unroll
            for (int step = 0; step < Keys::kSteps; ++step) {
#pragma unroll
              for (int m = 0; m < 2; ++m) {
                multiply(partial[m][n], keys[m][part][step], queries[step][0], queries[step][1],
                         typename Keys::Term());
              }
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dots[m][first + n][i] += partial[m][n][i];
        }
      }
    }
  }

  // Adds up the shares of the four lanes that hold a key's squares.
  __device__ __forceinline__ void gather_squares() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        squares[m][half] += __shfl_xor_sync(kAllLanes, squares[m][half], 1);
        squares[m][half] += __shfl_xor_sync(kAllLanes, squares[m][half], 2);
      }
    }
  }
};

// Turns a warp's dot products into scores, in place.
template <Type kType, int kQueries>
__device__ __forceinline__ void finish_scores(Sums<kType, kQueries>& sums, const SearchParams& params,
                                              const Part& part, int64_t warp_key, const float* inverse) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  sums.gather_squares();
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t key = warp_key + 16 * m + 8 * half + g;
      const bool real = key < params.num_keys;
      const float scale = params.key_scales == nullptr || !real ? 1.0f : params.key_scales[key];
      bool extreme;
      const float factor = key_factor(sums.squares[m][half], scale, has_wide_range(kType), extreme);
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const float query_factor = inverse[8 * n + 2 * t + odd];
          float& score = sums.dots[m][n][2 * half + odd];
          score = score * factor * query_factor;
          if (factor == 0.0f || query_factor == 0.0f) score = 0.0f;
          score += 0.0f;  // -0 becomes 0
        }
      }
      if constexpr (has_wide_range(kType)) {
        unsigned flagged = __ballot_sync(kAllLanes, extreme && real && t == 0);
        if (flagged == 0) continue;
        float* const special =
            params.special +
            (part.block * kKeysPerTile + warp_key % kKeysPerTile + 16 * m + 8 * half) * kQueries;
        for (unsigned rest = flagged; rest != 0; rest &= rest - 1) {
          const int source = __ffs(static_cast<int>(rest)) - 1;
          score_extreme_key(params, kType, warp_key + 16 * m + 8 * half + source / 4,
                            __shfl_sync(kAllLanes, scale, source), part.first_query, kQueries,
                            special + source / 4 * kQueries);
        }
        __syncwarp();
        if (flagged >> (4 * g) & 1) {
#pragma unroll
          for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
              sums.dots[m][n][2 * half + odd] = special[g * kQueries + 8 * n + 2 * t + odd] + 0.0f;
            }
          }
        }
      }
    }
  }
}

// Offers a warp's scores to the buffers, in rounds where they fill up.
template <Type kType, int kQueries>
__device__ __forceinline__ void offer_scores(const Sums<kType, kQueries>& sums, int64_t num_keys,
                                             int64_t warp_key, Kept<kQueries>& kept) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  uint64_t done = 0;  // a bit for each of this lane's scores
  for (;;) {
    bool waiting = false;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int query = 8 * n + 2 * t + odd;
        const float floor = kept.floors[query];
#pragma unroll
        for (int row = 0; row < 4; ++row) {
          const int bit = (2 * n + odd) * 4 + row;
          const float score = sums.dots[row / 2][n][row % 2 * 2 + odd];
          const int64_t key = warp_key + 8 * row + g;
          if (score < floor || key >= num_keys || (done >> bit & 1)) continue;
          if (kept.best.offer(query, pack(unknown(score), static_cast<uint32_t>(key)))) {
            done |= uint64_t{1} << bit;
          } else {
            waiting = true;
          }
        }
      }
    }
    if (!__syncthreads_or(waiting)) break;
    kept.make_room();
    __syncthreads();
  }
}

// Grid: tiles of queries by parts of the keys.
template <Type kType, int kQueries>
__global__ void __launch_bounds__(kSearchThreads, resident_blocks(kQueries))
    search_kernel(const __grid_constant__ SearchParams params) {
  using Layout = SearchLayout<kType, kQueries>;
  constexpr int kStages = Layout::kStages;
  const int stage_bytes = Layout::kKeyBytes + params.queries.num_terms * Layout::kTermBytes;
  unsigned char* const stages = dynamic_shared();
  const Part part = part_of_block(params.num_keys, kQueries);
  Kept<kQueries> kept(stages + kStages * stage_bytes, params, part);

  Loader<kType, kQueries> loader{params, part, part.first_tile, 0};
  for (int i = 0; i < kStages - 1; ++i) {
    loader.copy_next(stages + i * stage_bytes);
    commit_copies();
  }
  int stage = 0;
  Sums<kType, kQueries> sums;
  for (int64_t tile = part.first_tile; tile < part.end_tile; ++tile) {
    sums.clear();
    for (int64_t column = 0; column < params.queries.columns; column += KeyTile<kType>::kColumns) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // what the others copied is here, and they have read the stage that is copied to next
      loader.copy_next(stages + (stage == 0 ? kStages - 1 : stage - 1) * stage_bytes);
      commit_copies();
      sums.add(stages + stage * stage_bytes, params.queries.num_terms);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    const int64_t warp_key = tile * kKeysPerTile + threadIdx.x / kWarp * 32;
    finish_scores(sums, params, part, warp_key, kept.inverse);
    offer_scores(sums, params.num_keys, warp_key, kept);
  }
  wait_for_copies<0>();
  __syncthreads();

  for (int q = threadIdx.x / kWarp; q < kQueries; q += kSearchWarps) {
    const int64_t query = part.first_query + q;
    if (query >= params.queries.num_queries) continue;
    kept.best.thin_out(q, kept.histogram);
    __syncwarp();
    const int count = kept.best.counts[q];
    const uint64_t* const from = kept.best.candidates + static_cast<int64_t>(q) * params.capacity;
    uint64_t* const to = params.lists + (blockIdx.y * params.queries.num_queries + query) * params.k;
    for (int i = threadIdx.x % kWarp; i < params.k; i += kWarp) to[i] = i < count ? from[i] : 0;
  }
}

}  // namespace clara_fast::cuda
