// What attention needs beyond vec_generic.h.
#pragma once

#include "vec_generic.h"

namespace clara_fast::cpu {
namespace {

constexpr int kTileRows = 2;
constexpr int kTileVectors = 2;
constexpr int kFewTile = 1;

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline float largest_lane(Vec v) {
  float largest = v[0];
  for (int i = 1; i < kWidth; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// `otherwise` in the lanes below `lane`.
inline Vec from_lane(Vec v, int64_t lane, Vec otherwise) {
  if (lane <= 0) return v;
  const int32_t first = lane > kWidth ? static_cast<int32_t>(kWidth) : static_cast<int32_t>(lane);
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7} >= first ? v : otherwise;
}

// Adding 1.5 * 2^23 leaves no room for a fraction.
inline Vec nearest(Vec x) { return (x + broadcast(0x1.8p23f)) - broadcast(0x1.8p23f); }
// y * 2^whole, 0 where x < -126.
inline Vec times_power(Vec y, Vec whole, Vec x) {
  const IntVec seen = ~(x < broadcast(-126.0f));  // NaN too
  const Vec bounded = x > broadcast(-126.0f) ? whole : zeros();
  const IntVec power = (__builtin_convertvector(bounded, IntVec) + 127) << 23;
  Vec factor;
  __builtin_memcpy(&factor, &power, sizeof(factor));
  return seen ? y * factor : zeros();
}

// out[j][i] = in[i][j] for eight rows of eight numbers.
inline void transpose_square(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) out[j * ld_out + i] = in[i * ld_in + j];
  }
}

}  // namespace
}  // namespace clara_fast::cpu
