// Eight floats in an AVX2 register, with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace clara_fast::cpu {
namespace {

constexpr int64_t kWidth = 8;
constexpr int64_t kTileQueries = 3;  // 4 keys x 3 queries: 12 of the 16 registers accumulate
// Of cosine_topk: vectors of sums that stay in registers, and rows that share a pass over keys.
constexpr int kTileSums = 12;
constexpr int kWideRows = 4;

using Vec = __m256;

inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec zeros() { return _mm256_setzero_ps(); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load(const f8e4m3* p) {
  // Seen as half precision, exponent and mantissa give the value over 2^8, subnormals included.
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i rest = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_andnot_si128(_mm_set1_epi16(0x7f), wide), 8);
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(rest, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(rest, 7), sign), nan);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

// The upper half of each 32-bit lane holds the bfloat16, rounded to nearest even.
inline __m256i bf16_lanes(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const Vec nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
}

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store(bf16* p, Vec v) {
  const __m256i lanes = _mm256_srli_epi32(bf16_lanes(v), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(f16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

template <class T>
inline Vec rounded(Vec v);
template <>
inline Vec rounded<float>(Vec v) {
  return v;
}
template <>
inline Vec rounded<bf16>(Vec v) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(bf16_lanes(v), _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
template <>
inline Vec rounded<f16>(Vec v) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline float sum(Vec v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// out[j] += sum(v[j]) for the four vectors of a tile.
inline void add_sums(float* out, const Vec v[4]) {
  const Vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}

// A bit per lane: set where a <= b does not hold, NaN included.
inline uint32_t not_at_most(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
}

}  // namespace
}  // namespace clara_fast::cpu
