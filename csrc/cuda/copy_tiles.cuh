// How tiles of keys and of queries' terms come into shared memory.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "key_tile.cuh"
#include "search.h"

namespace clara_fast::cuda {

template <Type kType, int kQueries>
struct SearchLayout {
  static constexpr int kStages = num_stages(kQueries);
  static constexpr int kKeyBytes = kKeysPerTile * KeyTile<kType>::kRowBytes;
  static constexpr int kTermBytes = kQueries * KeyTile<kType>::kColumns * 2;
};

// What a block works on.
struct Part {
  int64_t first_query;
  int64_t first_tile, end_tile;  // of the keys
  int64_t block;
};

__device__ __forceinline__ Part part_of_block(int64_t num_keys, int queries_per_tile) {
  const int64_t tiles = (num_keys + kKeysPerTile - 1) / kKeysPerTile;
  const int64_t part = blockIdx.y, parts = gridDim.y;
  return {static_cast<int64_t>(blockIdx.x) * queries_per_tile, tiles * part / parts,
          tiles * (part + 1) / parts, part * gridDim.x + blockIdx.x};
}

// Copies of one step: kColumns columns of a tile of keys and of all the terms of the queries.
template <Type kType, int kQueries>
struct Loader {
  using Keys = KeyTile<kType>;
  using Layout = SearchLayout<kType, kQueries>;
  static constexpr int kKeyChunks = Keys::kRowBytes / 16;      // per row
  static constexpr int kTermChunks = Keys::kColumns * 2 / 16;  // per row

  const SearchParams& params;
  const Part& part;
  int64_t tile, column;

  __device__ __forceinline__ void copy_next(unsigned char* stage) {
    if (tile >= part.end_tile) return;
    copy_keys(stage);
    copy_terms(stage + Layout::kKeyBytes);
    column += Keys::kColumns;
    if (column >= params.queries.columns) {
      column = 0;
      ++tile;
    }
  }

 private:
  __device__ __forceinline__ void copy_keys(unsigned char* to) const {
    constexpr int kRowsAtOnce = kSearchThreads / kKeyChunks;
    const int chunk = threadIdx.x % kKeyChunks;
    const int64_t row_bytes = params.queries.columns * element_bytes(kType);
    const int64_t offset = column * element_bytes(kType) + chunk * 16;
    const int64_t left = row_bytes - offset;
    const int wanted = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll
    for (int i = 0; i < kKeysPerTile / kRowsAtOnce; ++i) {
      const int row = threadIdx.x / kKeyChunks + i * kRowsAtOnce;
      const int64_t key = tile * kKeysPerTile + row;
      const int bytes = key < params.num_keys ? wanted : 0;
      const unsigned char* from = static_cast<const unsigned char*>(params.keys);
      if (bytes > 0) from += key * row_bytes + offset;
      copy_chunk(to + chunk_offset<Keys::kRowBytes>(row, chunk), from, bytes);
    }
  }

  __device__ __forceinline__ void copy_chunk(unsigned char* to, const unsigned char* from, int bytes) const {
    if (params.copy_bytes == 16) {
      copy_async_16(to, from, bytes);
    } else if (params.copy_bytes == 4) {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const int some = bytes - i >= 4 ? 4 : bytes - i > 0 ? bytes - i : 0;
        copy_async_4(to + i, some > 0 ? from + i : from, some);
      }
    } else if constexpr (element_bytes(kType) < 4) {
      // Rows of odd size: one element at a time, and not asynchronously.
      using Element = std::conditional_t<element_bytes(kType) == 1, uint8_t, uint16_t>;
      for (int i = 0; i < 16; i += static_cast<int>(sizeof(Element))) {
        *reinterpret_cast<Element*>(to + i) = i < bytes ? *reinterpret_cast<const Element*>(from + i) : 0;
      }
    }
  }

  __device__ __forceinline__ void copy_terms(unsigned char* to) const {
    constexpr int kRowsAtOnce = kSearchThreads / kTermChunks;
    const PrepareParams& queries = params.queries;
    const int chunk = threadIdx.x % kTermChunks;
    for (int term = 0; term < queries.num_terms; ++term) {
      const uint16_t* const from =
          queries.terms + (term * queries.padded_queries + part.first_query) * queries.padded_columns +
          column;
#pragma unroll
      for (int i = 0; i < (kQueries + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
        const int row = threadIdx.x / kTermChunks + i * kRowsAtOnce;
        if (kQueries % kRowsAtOnce == 0 || row < kQueries) {
          copy_async_16(to + term * Layout::kTermBytes + chunk_offset<Keys::kColumns * 2>(row, chunk),
                        from + row * queries.padded_columns + chunk * 8, 16);
        }
      }
    }
  }
};

}  // namespace clara_fast::cuda
