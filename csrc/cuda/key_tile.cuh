// Keys and query terms in shared memory, and how a warp's registers get them.
//
// A tile's rows are 64 or 128 bytes, and the 16-byte chunks of a row are swapped about by its number, so that
// the eight rows that ldmatrix reads at once lie in different banks.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "search.h"

namespace clara_fast::cuda {

__device__ __forceinline__ float load_float(const void* values, Type type, int64_t place) {
  if (type == Type::kFloat32) return static_cast<const float*>(values)[place];
  const uint16_t bits = static_cast<const uint16_t*>(values)[place];
  return type == Type::kBFloat16 ? to_float(bits, BFloat16()) : to_float(bits, Float16());
}

template <int kRowBytes>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  return row * kRowBytes + (chunk ^ (kRowBytes == 128 ? row & 7 : row >> 1 & 3)) * 16;
}

// Which of 16 columns is at `place` of a query's terms: the order in which a lane finds those of a key in its
// registers, below. A dot product does not depend on it.
__device__ __forceinline__ int column_at(int place, Type key_type) {
  const int pair = place % 8 / 2, late = place / 8, odd = place % 2;
  switch (element_bytes(key_type)) {
    case 1:
      return 4 * pair + 2 * late + odd;
    case 4:
      return pair + 4 * odd + 8 * late;
    default:
      return place;
  }
}

// The two lower bytes of four int8 as float16, exactly: 0x6400 + b is 1024 + b.
__device__ __forceinline__ uint32_t float16_of_int8(uint32_t offset_by_128, unsigned selector) {
  return subtract_float16(__byte_perm(offset_by_128, 0x64646464u, selector), 0x64806480u);
}

// Two float8_e4m3fn, each in the upper byte of a half, as float16 divided by 256, exactly. NaN, all ones,
// carries into the exponent's top bit and stays NaN.
__device__ __forceinline__ uint32_t float16_of_float8(uint32_t upper_bytes) {
  const uint32_t magnitude = (upper_bytes & 0x7f007f00u) >> 1;
  const uint32_t nan = (magnitude + 0x00800080u) & 0x40004000u;
  return (upper_bytes & 0x80008000u) | magnitude | nan;
}

template <Type kType>
struct KeyTile {
  static constexpr int kColumns = tile_columns(kType);
  static constexpr int kRowBytes = kColumns * element_bytes(kType);
  static constexpr int kSteps = kColumns / 16;
  static constexpr int kTerms = kType == Type::kFloat32 ? 3 : 1;  // float32 is the sum of three bfloat16
  using Term = std::conditional_t<uses_bfloat16(kType), BFloat16, Float16>;
  using Fragments = uint32_t[kTerms][kSteps][4];

  // Rows `row` to row + 15 as the left operands of kSteps multiplications. Adds the squares that this lane
  // holds of rows row + lane / 4 and 8 further.
  static __device__ __forceinline__ void load(const unsigned char* tile, int row, Fragments& out,
                                              float (&squares)[2]) {
    const int lane = threadIdx.x % kWarp;
    const int matrix = lane / 8, matrix_row = row + lane % 8;
    if constexpr (kType == Type::kFloat32) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t bits[4];
          load_matrices(bits, tile + chunk_offset<kRowBytes>(matrix_row + 8 * half, 4 * step + matrix));
          float rest[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            rest[i] = __uint_as_float(bits[i]);
            squares[half] += rest[i] * rest[i];
          }
#pragma unroll
          for (int term = 0; term < kTerms; ++term) {
#pragma unroll
            for (int late = 0; late < 2; ++late) {
              const uint32_t pair = pack_bfloat16(rest[2 * late], rest[2 * late + 1]);
              out[term][step][half + 2 * late] = pair;
              rest[2 * late] -= __uint_as_float(pair << 16);
              rest[2 * late + 1] -= __uint_as_float(pair & 0xffff0000u);
            }
          }
        }
      }
    } else {
      if constexpr (element_bytes(kType) == 2) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          load_matrices(out[0][step],
                        tile + chunk_offset<kRowBytes>(matrix_row + matrix % 2 * 8, 2 * step + matrix / 2));
        }
      } else {
#pragma unroll
        for (int step = 0; step < kSteps; step += 2) {
          uint32_t bytes[4];
          load_matrices(bytes,
                        tile + chunk_offset<kRowBytes>(matrix_row + matrix % 2 * 8, step + matrix / 2));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t (&fragment)[4] = out[0][step + i / 2];
            if constexpr (kType == Type::kInt8) {
              const uint32_t shifted = bytes[i] ^ 0x80808080u;
              fragment[i % 2] = float16_of_int8(shifted, 0x4140);
              fragment[i % 2 + 2] = float16_of_int8(shifted, 0x4342);
            } else {
              fragment[i % 2] = float16_of_float8(__byte_perm(bytes[i], 0, 0x1404));
              fragment[i % 2 + 2] = float16_of_float8(__byte_perm(bytes[i], 0, 0x3424));
            }
          }
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float low = to_float(static_cast<uint16_t>(out[0][step][i]), Term());
          const float high = to_float(static_cast<uint16_t>(out[0][step][i] >> 16), Term());
          squares[i % 2] += low * low;
          squares[i % 2] += high * high;
        }
      }
    }
  }
};

// Queries `query` to query + 7 of one term as the right operands of kSteps multiplications: out[step].
template <int kSteps>
__device__ __forceinline__ void load_queries(const unsigned char* tile, int query,
                                             uint32_t (&out)[kSteps][2]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) {
    uint32_t bits[4];
    load_matrices(bits, tile + chunk_offset<kSteps * 32>(query + lane % 8, 2 * step + lane / 8));
    out[step][0] = bits[0];
    out[step][1] = bits[1];
    out[step + 1][0] = bits[2];
    out[step + 1][1] = bits[3];
  }
}

}  // namespace clara_fast::cuda
