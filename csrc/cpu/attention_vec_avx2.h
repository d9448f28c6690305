// What attention needs of AVX2 beyond vec_avx2.h.
#pragma once

#include "vec_avx2.h"

namespace clara_fast::cpu {
namespace {

// 6 x 2 sums, a vector of the left side and two of the right: 15 of the 16 registers.
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
constexpr int kFewTile = 3;

inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float largest_lane(Vec v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// `otherwise` in the lanes below `lane`.
inline Vec from_lane(Vec v, int64_t lane, Vec otherwise) {
  if (lane <= 0) return v;
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(lane > 8 ? 8 : static_cast<int>(lane)), lanes);
  return _mm256_blendv_ps(v, otherwise, _mm256_castsi256_ps(below));
}

inline Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// y * 2^whole, 0 where x < -126.
inline Vec times_power(Vec y, Vec whole, Vec x) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  const Vec power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  return _mm256_and_ps(_mm256_mul_ps(y, power), _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}

// out[j][i] = in[i][j] for eight rows of eight numbers.
inline void transpose_square(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
  Vec a[8];
  Vec b[8];
  // Row i beside row i + 4, in halves: then all other steps stay within halves.
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      const float* p = in + i * ld_in + 4 * half;
      a[4 * half + i] =
          _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld_in), 1);
    }
  }
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d low = _mm256_castps_pd(b[i + j]);
      const __m256d high = _mm256_castps_pd(b[i + 2 + j]);
      _mm256_storeu_ps(out + (i + 2 * j) * ld_out, _mm256_castpd_ps(_mm256_unpacklo_pd(low, high)));
      _mm256_storeu_ps(out + (i + 2 * j + 1) * ld_out, _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
    }
  }
}

}  // namespace
}  // namespace clara_fast::cpu
