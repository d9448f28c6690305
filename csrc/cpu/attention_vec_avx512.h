// What attention needs of AVX-512 beyond vec_avx512.h.
#pragma once

#include "vec_avx512.h"

namespace clara_fast::cpu {
namespace {

// 6 x 4 sums, a vector of the left side and four of the right: 29 of the 32 registers.
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
constexpr int kFewTile = 4;

inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float largest_lane(Vec v) { return _mm512_reduce_max_ps(v); }

// `otherwise` in the lanes below `lane`.
inline Vec from_lane(Vec v, int64_t lane, Vec otherwise) {
  if (lane <= 0) return v;
  const __mmask16 kept = lane >= 16 ? 0 : static_cast<__mmask16>(0xffffu << lane);
  return _mm512_mask_mov_ps(otherwise, kept, v);
}

inline Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// y * 2^whole, 0 where x < -126.
inline Vec times_power(Vec y, Vec whole, Vec x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), y, whole);
}

// out[j][i] = in[i][j] for sixteen rows of sixteen numbers.
inline void transpose_square(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
  __m512 a[16];
  __m512 b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * ld_in);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]);
      const __m512d high = _mm512_castps_pd(b[i + 2 + j]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4 * i + j] holds column 4 * q + j of rows 4 * i .. 4 * i + 3 in its quarter q.
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(out + j * ld_out, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(out + (4 + j) * ld_out, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(out + (8 + j) * ld_out, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(out + (12 + j) * ld_out, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}

}  // namespace
}  // namespace clara_fast::cpu
