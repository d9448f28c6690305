// Sixteen floats in an AVX-512 register (F, BW, DQ and VL).
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace clara_fast::cpu {
namespace {

constexpr int64_t kWidth = 16;
constexpr int64_t kTileQueries = 6;  // 4 keys x 6 queries: 24 of the 32 registers accumulate
// Of cosine_topk: vectors of sums that stay in registers, and rows that share a pass over keys.
constexpr int kTileSums = 24;
constexpr int kWideRows = 8;

using Vec = __m512;

inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec zeros() { return _mm512_setzero_ps(); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load(const f8e4m3* p) {
  // Seen as half precision, exponent and mantissa give the value over 2^8, subnormals included.
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i rest = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0x7f), wide), 8);
  const __m256i nan =
      _mm256_and_si256(_mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7e00));
  const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(rest, 7), sign), nan);
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

// The upper half of each 32-bit lane holds the bfloat16, rounded to nearest even.
inline __m512i bf16_lanes(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet);
}

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, Vec v) {
  const __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_lanes(v), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
inline void store(f16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

template <class T>
inline Vec rounded(Vec v);
template <>
inline Vec rounded<float>(Vec v) {
  return v;
}
template <>
inline Vec rounded<bf16>(Vec v) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(bf16_lanes(v), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
template <>
inline Vec rounded<f16>(Vec v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline __m256 halves(Vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

inline float sum(Vec v) {
  const __m256 eight = halves(v);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// out[j] += sum(v[j]) for the four vectors of a tile.
inline void add_sums(float* out, const Vec v[4]) {
  const __m256 pairs =
      _mm256_hadd_ps(_mm256_hadd_ps(halves(v[0]), halves(v[1])), _mm256_hadd_ps(halves(v[2]), halves(v[3])));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}

// A bit per lane: set where a <= b does not hold, NaN included.
inline uint32_t not_at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }

}  // namespace
}  // namespace clara_fast::cpu
