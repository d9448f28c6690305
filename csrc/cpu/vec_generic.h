// Eight floats by the compiler's own vector extension: SSE2 on old x86-64, NEON on aarch64.
#pragma once

#include "kernels.h"

namespace clara_fast::cpu {
namespace {

constexpr int64_t kWidth = 8;
constexpr int64_t kTileQueries = 1;
// Of cosine_topk: vectors of sums that stay in registers (two registers each), and rows that share a pass
// over keys.
#if defined(__aarch64__)
constexpr int kTileSums = 12;
#else
constexpr int kTileSums = 4;
#endif
constexpr int kWideRows = 4;

using Vec = float __attribute__((vector_size(32)));
using IntVec = int32_t __attribute__((vector_size(32)));

inline Vec broadcast(float x) { return Vec{x, x, x, x, x, x, x, x}; }
inline Vec zeros() { return Vec{}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }

inline float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return static_cast<float>(x); }
inline float to_float(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return as_float(sign | ((rest << 13) + (112u << 23)));
  const float magnitude = static_cast<float>(rest) * 0x1p-24f;
  return as_float(sign | as_bits(magnitude));
}
inline float to_float(f8e4m3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  const uint32_t rest = x.bits & 0x7f;
  if (rest == 0x7f) return as_float(sign | 0x7fc00000);
  if (rest >= 0x08) return as_float(sign | ((rest << 20) + (120u << 23)));
  const float magnitude = static_cast<float>(rest) * 0x1p-9f;
  return as_float(sign | as_bits(magnitude));
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  const uint32_t bits = as_bits(x);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = static_cast<uint16_t>(is_nan ? (bits >> 16 | 0x40) : rounded);
}
inline void from_float(float x, f16* out) {
  const uint32_t bits = as_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00;
  } else if (rest >= 0x47800000) {  // 2^16 and more
    half = 0x7c00;
  } else if (rest >= 0x38800000) {  // 2^-14: normal in half precision
    half = (rest - (112u << 23) + 0x0fff + (rest >> 13 & 1)) >> 13;
  } else {  // adding 0.5 lines up the last bit with 2^-24, and the addition rounds to nearest even
    half = as_bits(as_float(rest) + 0.5f) - as_bits(0.5f);
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
inline Vec load(const T* p) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
}
inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vec v) {
  for (int i = 0; i < kWidth; ++i) from_float(v[i], p + i);
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

template <class T>
inline Vec rounded(Vec v) {
  T stored[kWidth];
  store(stored, v);
  return load(static_cast<const T*>(stored));
}
template <>
inline Vec rounded<float>(Vec v) {
  return v;
}

inline float sum(Vec v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// out[j] += sum(v[j]) for the four vectors of a tile.
inline void add_sums(float* out, const Vec v[4]) {
  for (int j = 0; j < 4; ++j) out[j] += sum(v[j]);
}

// A bit per lane: set where a <= b does not hold, NaN included.
inline uint32_t not_at_most(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= static_cast<uint32_t>(!(a[i] <= b[i])) << i;
  return mask;
}

}  // namespace
}  // namespace clara_fast::cpu
