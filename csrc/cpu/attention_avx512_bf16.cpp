// bfloat16 by the instructions that multiply it in pairs (AVX512-BF16).
// clang-format off
#include "attention_vec_avx512.h"
#include "attention_loops.h"
// clang-format on

namespace clara_fast::cpu {
namespace {

struct Pairs {
  static constexpr int64_t kPair = 2;

  static Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // A unit per lane: `low` in the lower half, `high` in the upper.
  static void store_pair(float* out, Vec low, Vec high) {
    // The conversion lays all of `high` above all of `low`.
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
  }
  // Units along v: two lanes of it in one.
  static void store_natural(float* out, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
};

inline __m512i load_lanes(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i load_lanes(const uint16_t* p, int64_t count) {
  if (count == kWidth) return load_lanes(p);
  uint16_t whole[kWidth] = {};
  __builtin_memcpy(whole, p, static_cast<uint64_t>(count) * sizeof(uint16_t));
  return load_lanes(whole);
}

template <>
struct Pack<bf16, Pairs> {
  static void natural(const void* row, int64_t n, float* out) {
    __builtin_memcpy(out, row, static_cast<uint64_t>(n) * sizeof(bf16));
    char* end = reinterpret_cast<char*>(out) + n * static_cast<int64_t>(sizeof(bf16));
    __builtin_memset(end, 0, static_cast<uint64_t>(up_to(n, 2 * kWidth) - n) * sizeof(bf16));
  }
  static void paired(const void* one, const void* two, int64_t n, float* out) {
    const uint16_t* x = static_cast<const uint16_t*>(one);
    const uint16_t* y = static_cast<const uint16_t*>(two);
    by_vectors(n, [&](int64_t i, int64_t count) {
      const __m512i high =
          y == nullptr ? _mm512_setzero_si512() : _mm512_slli_epi32(load_lanes(y + i, count), 16);
      _mm512_storeu_si512(out + i, _mm512_or_si512(load_lanes(x + i, count), high));
    });
  }
};

}  // namespace

const AttentionKernels kAvx512Bf16Attention = {
    "avx512_bf16", {make_loops<float, Floats>(), make_loops<bf16, Pairs>(), make_loops<f16, Floats>()}};

}  // namespace clara_fast::cpu
