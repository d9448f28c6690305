// cosine_topk's loops with AVX512-BF16, VNNI and VBMI: products of bfloat16 pairs, and of int8 keys with
// digits.
//
// vdpbf16ps takes subnormal numbers for zero. Queries have a length of at least 0.5 and keys one of at least
// sqrt(kSmallestSquare) or their scores are computed elsewhere, so what is lost is far below float32's
// rounding.
#include <immintrin.h>

#include "search_kernels.h"
#include "stream_kernels.h"
#include "tile_kernels.h"

namespace clara_fast::cpu {
namespace {

constexpr int kMostSums = 24;  // vectors of sums that stay in registers

using Pairs = __m512bh;

inline Pairs as_pairs(__m512i bits) { return reinterpret_cast<Pairs>(bits); }

// float8_e4m3fn to bfloat16 by the seven bits below the sign, the result's bytes apart.
struct Float8Table {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
  constexpr Float8Table() : low{}, high{} {
    for (int x = 0; x < 128; ++x) {
      const int exponent = x >> 3;
      const int fraction = x & 7;
      int bits = (exponent + 120) << 7 | fraction << 4;
      if (exponent == 0) {  // fraction * 2^-9
        const int top = fraction >= 4 ? 2 : fraction >= 2 ? 1 : 0;
        bits = fraction == 0 ? 0 : (127 - 9 + top) << 7 | ((fraction << (7 - top)) & 0x7f);
      }
      if (x == 0x7f) bits = 0x7fc0;
      low[x] = static_cast<uint8_t>(bits & 0xff);
      high[x] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr Float8Table kFloat8;

struct TwoPairs {
  Pairs first, second;
};

inline TwoPairs pairs_of_float8(__m512i bytes) {
  // Unpacking interleaves the halves of each 128-bit lane: give it the first 32 bytes as the lower halves.
  bytes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), bytes);
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_load_si512(kFloat8.low), bytes, _mm512_load_si512(kFloat8.low + 64));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_load_si512(kFloat8.high), bytes, _mm512_load_si512(kFloat8.high + 64));
  const __m512i with_sign =
      _mm512_ternarylogic_epi64(high, bytes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // a | (b & c)
  return {as_pairs(_mm512_unpacklo_epi8(low, with_sign)), as_pairs(_mm512_unpackhi_epi8(low, with_sign))};
}

inline __m512i load_halves(const char* p, Whole) { return _mm512_loadu_si512(p); }
inline __m512i load_halves(const char* p, Rest rest) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << rest.count) - 1), p);
}
inline __m512i load_bytes(const char* p, Whole) { return _mm512_loadu_si512(p); }
inline __m512i load_bytes(const char* p, Rest rest) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << rest.count) - 1, p);
}
// sum + four products each of unsigned and signed bytes. Written out because gcc 12 copies every sum around
// its own intrinsic, twice.
inline __m512i multiply_bytes(__m512i sum, __m512i with_unsigned, __m512i with_signed) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(with_unsigned), "v"(with_signed));
  return sum;
}
inline __m512i load(const char* p) { return _mm512_loadu_si512(p); }

// out[t] = the sum of v[t]
inline void sums_of(const __m512 v[kStreams], float* out) {
  __m256 half[kStreams];
  for (int t = 0; t < kStreams; ++t) {
    half[t] = _mm256_add_ps(_mm512_castps512_ps256(v[t]), _mm512_extractf32x8_ps(v[t], 1));
  }
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline void sums_of(const __m512i v[kStreams], int32_t* out) {
  const auto pairs = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i low = pairs(v[0], v[1]);
  const __m512i high = pairs(v[2], v[3]);
  const __m512i fours = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
  const __m256i all = _mm256_add_epi32(_mm512_castsi512_si256(fours), _mm512_extracti64x4_epi64(fours, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}

struct FloatSums {
  using Vector = __m512;
  using Sum = float;
  static constexpr int kSums = kMostSums;
  static constexpr int kNorms = 1;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector add(Vector a, Vector b) { return a + b; }
  static void sums(const Vector v[kStreams], float* out) { sums_of(v, out); }
  static void store_norms(const Vector (*norms)[kStreams], KeySums out) { sums(norms[0], out.squares); }
};

struct BFloat16Keys {
  using Element = bf16;
  static constexpr int64_t kStep = 32;
  template <class Columns>
  static Pairs load(const char* key, Columns columns) {
    __m512i halves = load_halves(key, columns);
    asm("" : "+v"(halves));  // or gcc 12 loads it once for each product
    return as_pairs(halves);
  }
  static __m512 square(Pairs key, __m512 sum) { return _mm512_dpbf16_ps(sum, key, key); }
};

struct Float8Keys {
  using Element = f8e4m3;
  static constexpr int64_t kStep = 64;
  template <class Columns>
  static TwoPairs load(const char* key, Columns columns) {
    return pairs_of_float8(load_bytes(key, columns));
  }
  static __m512 square(TwoPairs key, __m512 sum) {
    return _mm512_dpbf16_ps(_mm512_dpbf16_ps(sum, key.first, key.first), key.second, key.second);
  }
};

// Query rows of bfloat16.
struct TimesPairs {
  static constexpr int64_t kRowBytes = 2;
  static __m512 dot(Pairs key, const char* row, __m512 sum) {
    return _mm512_dpbf16_ps(sum, key, as_pairs(load(row)));
  }
};
// Query rows of float32, each 32 columns the even ones first.
struct TimesHalves {
  static constexpr int64_t kRowBytes = 4;
  static __m512 dot(Pairs key, const char* row, __m512 sum) {
    const __m512i bits = reinterpret_cast<__m512i>(key);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    const __m512 odd =
        _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    sum = _mm512_fmadd_ps(even, _mm512_loadu_ps(row), sum);
    return _mm512_fmadd_ps(odd, _mm512_loadu_ps(row + 64), sum);
  }
};

template <class Keys, class Times>
struct PairStream : FloatSums, Keys {
  static constexpr int64_t kRowBytes = Times::kRowBytes;
  static __m512 dot(Pairs key, const char* row, __m512 sum) { return Times::dot(key, row, sum); }
  static __m512 dot(TwoPairs key, const char* row, __m512 sum) {
    return Times::dot(key.second, row + 32 * kRowBytes, Times::dot(key.first, row, sum));
  }
  template <class Key>
  static __m512 norm(Constant<0>, Key key, __m512 sum) {
    return Keys::square(key, sum);
  }
};

struct DigitStream {
  using Vector = __m512i;
  using Sum = int32_t;
  static constexpr int kSums = kMostSums;
  using Element = int8_t;
  static constexpr int64_t kStep = 64;
  static constexpr int64_t kRowBytes = 1;
  static constexpr int kNorms = 2;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
  static void sums(const Vector v[kStreams], int32_t* out) { sums_of(v, out); }
  template <class Columns>
  static Vector load(const char* key, Columns columns) {
    return load_bytes(key, columns);
  }
  static Vector dot(Vector key, const char* row, Vector sum) {
    return multiply_bytes(sum, clara_fast::cpu::load(row), key);
  }
  // The sum of (x + 128) * x, whose first factor is unsigned, and the sum of x.
  static Vector norm(Constant<0>, Vector key, Vector sum) {
    const Vector raised = _mm512_xor_si512(key, _mm512_set1_epi8(static_cast<char>(0x80)));
    return multiply_bytes(sum, raised, key);
  }
  static Vector norm(Constant<1>, Vector key, Vector sum) {
    return multiply_bytes(sum, _mm512_set1_epi8(1), key);
  }
  static void store_norms(const Vector (*norms)[kStreams], KeySums out) {
    int32_t raised[kStreams];
    sums(norms[0], raised);
    sums(norms[1], out.sums);
    for (int64_t s = 0; s < kStreams; ++s) out.squares[s] = static_cast<float>(raised[s] - 128 * out.sums[s]);
  }
};

template <class P>
void stream(const StreamedKeys& keys, int64_t n, const void* const* rows, int64_t num_rows, void* const* outs,
            KeySums sums) {
  for (int64_t r = 0; r < num_rows; r += kStreamRows) {
    const int64_t left = num_rows - r < kStreamRows ? num_rows - r : kStreamRows;
    const auto some = left == 1   ? &stream_rows<P, 1>
                      : left == 2 ? &stream_rows<P, 2>
                      : left <= 4 ? &stream_rows<P, 4>
                                  : &stream_rows<P, 8>;
    some(keys, n, rows + r, left, outs + r, sums);
  }
}

// The digits of up to four whole queries at a time: no row is computed in vain.
void stream_digits(const StreamedKeys& keys, int64_t n, const void* const* rows, int64_t num_rows,
                   void* const* outs, KeySums sums) {
  constexpr int kQuery = static_cast<int>(kTerms);
  for (int64_t r = 0; r < num_rows; r += 4 * kQuery) {
    const int64_t left = num_rows - r < 4 * kQuery ? num_rows - r : 4 * kQuery;
    const auto some = left == kQuery       ? &stream_rows<DigitStream, kQuery>
                      : left == 2 * kQuery ? &stream_rows<DigitStream, 2 * kQuery>
                      : left == 3 * kQuery ? &stream_rows<DigitStream, 3 * kQuery>
                                           : &stream_rows<DigitStream, 4 * kQuery>;
    some(keys, n, rows + r, left, outs + r, sums);
  }
}

struct Lanes {
  static constexpr int kVectorsPerPanel = 1;
  static constexpr int kSums = kMostSums;
  static constexpr int kPanels = 4;
  static __m512i broadcast(const char* p) {
    int32_t group;
    __builtin_memcpy(&group, p, 4);
    return _mm512_set1_epi32(group);
  }
};
struct PairTile : Lanes {
  using Vector = __m512;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector load(const char* p) { return _mm512_loadu_ps(p); }
  static void store(char* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector multiply_add(__m512i key, Vector query, Vector sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<Pairs>(query), as_pairs(key));
  }
};
struct DigitTile : Lanes {
  using Vector = __m512i;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
  static Vector load(const char* p) { return _mm512_loadu_si512(p); }
  static void store(char* p, Vector v) { _mm512_storeu_si512(p, v); }
  static Vector multiply_add(__m512i key, Vector query, Vector sum) {
    return multiply_bytes(sum, query, key);
  }
};

// The sums of keys that lie next to each other, by the loop that streams them, with no query.
template <class P>
void sum_keys(const void* keys, int64_t stride, int64_t count, int64_t n, KeySums sums) {
  static_assert(kKeyBlock <= kStreamBlock);
  float squares[kStreamBlock];
  int32_t plain[kStreamBlock];
  StreamedKeys neighbours{keys, kStreams * stride, stride, {}};  // key j has place j
  for (int64_t s = 0; s < kStreams; ++s) neighbours.counts[s] = (count - s + kStreams - 1) / kStreams;
  stream_rows<P, 0>(neighbours, n, nullptr, 0, nullptr, {squares, plain});
  for (int64_t j = 0; j < count; ++j) {
    sums.squares[j] += squares[j];
    if (P::kNorms == 2 && sums.sums != nullptr) sums.sums[j] += plain[j];
  }
}

template <int64_t kBytes>
void copy(const void* row, int64_t n, void* out) {
  __builtin_memcpy(out, row, static_cast<uint64_t>(n * kBytes));
}

void float8_to_pairs(const void* row, int64_t n, void* out) {
  const char* x = static_cast<const char*>(row);
  char* y = static_cast<char*>(out);
  const auto halves = [](Pairs pairs) { return reinterpret_cast<__m512i>(pairs); };
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const TwoPairs pairs = pairs_of_float8(load(x + i));
    _mm512_storeu_si512(y + i * 2, halves(pairs.first));
    _mm512_storeu_si512(y + i * 2 + 64, halves(pairs.second));
  }
  if (i < n) {
    const TwoPairs pairs = pairs_of_float8(load_bytes(x + i, Rest{n - i}));
    const uint64_t mask = (uint64_t{1} << (n - i)) - 1;
    _mm512_mask_storeu_epi16(y + i * 2, static_cast<__mmask32>(mask), halves(pairs.first));
    _mm512_mask_storeu_epi16(y + i * 2 + 64, static_cast<__mmask32>(mask >> 32), halves(pairs.second));
  }
}

void int8_to_pairs(const void* row, int64_t n, void* out) {
  const char* x = static_cast<const char*>(row);
  char* y = static_cast<char*>(out);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x + i)));
    _mm256_mask_storeu_epi16(y + i * 2, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(wide)));
  }
}

void join_digits(const int32_t* digits, int64_t term_stride, const int32_t* key_sums, int64_t num_keys,
                 const float* units, float* dots) {
  // Every step before the last is exact: the digit sums make an integer of less than 53 bits.
  const auto eight = [](const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  for (int64_t j = 0; j < num_keys; ++j) {
    const __m256i offset = _mm256_set1_epi32(key_sums[j] * (kDigitOffset >> 16));
    for (int64_t lane = 0; lane < kLanes; lane += 8) {
      const int32_t* digit = digits + j * kLanes + lane;
      const __m512d low = _mm512_cvtepi32_pd(eight(digit));
      const __m512d middle = _mm512_cvtepi32_pd(eight(digit + term_stride));
      const __m512d high = _mm512_cvtepi32_pd(_mm256_sub_epi32(eight(digit + 2 * term_stride), offset));
      const __m512d whole =
          _mm512_fmadd_pd(high, _mm512_set1_pd(65536.0), _mm512_fmadd_pd(middle, _mm512_set1_pd(256.0), low));
      _mm256_storeu_ps(dots + j * kLanes + lane,
                       _mm512_cvtpd_ps(_mm512_mul_pd(whole, _mm512_cvtps_pd(_mm256_loadu_ps(units + lane)))));
    }
  }
}

void join_streamed_digits(const int32_t* digits, int64_t term_stride, const int32_t* key_sums, int64_t places,
                          float unit, float* dots) {
  const auto four = [](const int32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  for (int64_t i = 0; i < places; i += 4) {
    const __m128i offset = _mm_mullo_epi32(four(key_sums + i), _mm_set1_epi32(kDigitOffset >> 16));
    const __m256d low = _mm256_cvtepi32_pd(four(digits + i));
    const __m256d middle = _mm256_cvtepi32_pd(four(digits + term_stride + i));
    const __m256d high = _mm256_cvtepi32_pd(_mm_sub_epi32(four(digits + 2 * term_stride + i), offset));
    const __m256d whole =
        _mm256_fmadd_pd(high, _mm256_set1_pd(65536.0), _mm256_fmadd_pd(middle, _mm256_set1_pd(256.0), low));
    _mm_storeu_ps(dots + i, _mm256_cvtpd_ps(_mm256_mul_pd(whole, _mm256_set1_pd(unit))));
  }
}

}  // namespace

void add_avx512_bf16(SearchKernels& search) {
  constexpr int kBf16 = static_cast<int>(Storage::kBFloat16);
  constexpr int kInt8 = static_cast<int>(Storage::kInt8);
  constexpr int kF8 = static_cast<int>(Storage::kFloat8);
  constexpr int kPairs = static_cast<int>(Format::kPairs);
  constexpr int kHalves = static_cast<int>(Format::kHalves);
  constexpr int kDigits = static_cast<int>(Format::kDigits);
  search.stream[kPairs][kBf16] = &stream<PairStream<BFloat16Keys, TimesPairs>>;
  search.stream[kPairs][kF8] = &stream<PairStream<Float8Keys, TimesPairs>>;
  search.stream[kHalves][kBf16] = &stream<PairStream<BFloat16Keys, TimesHalves>>;
  search.stream[kHalves][kF8] = &stream<PairStream<Float8Keys, TimesHalves>>;
  search.stream[kDigits][kInt8] = &stream_digits;
  search.tile[kPairs] = &tile<PairTile>;
  search.tile[kDigits] = &tile<DigitTile>;
  search.sum_keys[kBf16] = &sum_keys<PairStream<BFloat16Keys, TimesPairs>>;
  search.sum_keys[kF8] = &sum_keys<PairStream<Float8Keys, TimesPairs>>;
  search.sum_keys[kInt8] = &sum_keys<DigitStream>;
  search.sum_digits = &sum_keys<DigitStream>;
  search.convert[kPairs][kBf16] = &copy<2>;
  search.convert[kPairs][kF8] = &float8_to_pairs;
  search.convert[kPairs][kInt8] = &int8_to_pairs;
  search.convert[kDigits][kInt8] = &copy<1>;
  search.join_digits = &join_digits;
  search.join_streamed_digits = &join_streamed_digits;
}

}  // namespace clara_fast::cpu
