// What attention is made of, written once over Vec: products of blocks, who sees whom within a block,
// packing.
//
// Scores are kept as [keys][rows]: then the rows lie in vectors side by side, a maximum or a sum over keys
// needs no step across a vector, and every product is the same loop: a number of the left side times a vector
// of the right one. A unit is what one product takes at a time from both sides in 32 bits: a float, or two
// neighbouring bfloat16 along the inner dimension.
#pragma once

#include "attention_kernels.h"

namespace clara_fast::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Floats {
  static constexpr int64_t kPair = 1;
  static Vec multiply_add(Vec a, Vec b, Vec c) { return cpu::multiply_add(a, b, c); }
};

// Calls step(i, count) for the columns 0 .. n by whole vectors; count < kWidth at the end alone.
template <class Step>
inline void by_vectors(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) step(i, kWidth);
  if (i < n) step(i, n - i);
}

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  if (count == kWidth) return load(p);
  T whole[kWidth] = {};
  __builtin_memcpy(whole, p, static_cast<uint64_t>(count) * sizeof(T));
  return load(static_cast<const T*>(whole));
}
template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
  if (count == kWidth) return store(p, v);
  T whole[kWidth];
  store(whole, v);
  __builtin_memcpy(p, whole, static_cast<uint64_t>(count) * sizeof(T));
}

// 2^x for x below 127, to an ulp; 0 where the result would be subnormal.
inline Vec exp2(Vec x) {
  const Vec whole = nearest(x);
  const Vec rest = x - whole;
  Vec y = broadcast(0.0001534581242594868f);
  y = multiply_add(y, rest, broadcast(0.0013399930903688073f));
  y = multiply_add(y, rest, broadcast(0.009618489071726799f));
  y = multiply_add(y, rest, broadcast(0.05550328642129898f));
  y = multiply_add(y, rest, broadcast(0.24022646248340607f));
  y = multiply_add(y, rest, broadcast(0.6931471824645996f));
  y = multiply_add(y, rest, broadcast(1.0f));
  return times_power(y, whole, x);
}

enum class Into { kOver, kAdd, kDecay };

// c[r][.] = sum over i of a(r, i) * b[i][.]; a(r, i) is a[i * lda + r] where kAcross, else a[r * lda + i].
// Into::kDecay first multiplies what is in row r of c by decay[r].
template <class Unit, bool kAcross, int kRows, int kVectors>
__attribute__((noinline)) void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t inner,
                                    float* c, int64_t ldc, Into into, const float* decay) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = zeros();
  }
  for (int64_t i = 0; i < inner; ++i) {
    Vec right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + i * ldb + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec left = broadcast(kAcross ? a[i * lda + r] : a[r * lda + i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Unit::multiply_add(left, right[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + r * ldc + v * kWidth;
      if (into == Into::kAdd) {
        store(at, load(at) + sums[r][v]);
      } else if (into == Into::kDecay) {
        store(at, multiply_add(broadcast(decay[r]), load(at), sums[r][v]));
      } else {
        store(at, sums[r][v]);
      }
    }
  }
}

template <class Unit, bool kAcross, int kVectors, int kRows = kTileRows, class... Rest>
inline void tile_rows(int64_t rows, Rest... rest) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_rows<Unit, kAcross, kVectors, kRows - 1>(rows, rest...);
  }
  tile<Unit, kAcross, kRows, kVectors>(rest...);
}

// At most kTileRows rows by at most kTileVectors vectors.
template <class Unit, bool kAcross, int kVectors = kTileVectors, class... Rest>
inline void product(int64_t rows, int64_t vectors, Rest... rest) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return product<Unit, kAcross, kVectors - 1>(rows, vectors, rest...);
  }
  tile_rows<Unit, kAcross, kVectors>(rows, rest...);
}

// Keys before `own` are seen by every row; own key j is seen by position i where j <= i + offset.
struct Stairs {
  int64_t rows, keys, groups, own, offset;

  int64_t first_row(int64_t key) const {
    const int64_t position = key - own - offset;
    return key < own || position <= 0 ? 0 : least(position * groups, rows);
  }
  // One past the last key that `row` sees.
  int64_t end(int64_t row) const {
    if (row >= rows) row = rows - 1;
    return most(0, least(keys, own + most(0, row / groups + offset + 1)));
  }
};

// scores[key][row] of all pairs that see each other, and of some that do not.
template <class Unit>
void score(const Stairs& stairs, const float* keys, int64_t key_stride, const float* rows, int64_t ld,
           int64_t inner, float* scores) {
  constexpr int64_t kPanel = kTileVectors * kWidth;
  for (int64_t panel = 0; panel < stairs.rows; panel += kPanel) {
    const int64_t stop = least(up_to(stairs.rows, kWidth), panel + kPanel);
    for (int64_t key = 0; key < stairs.keys; key += kTileRows) {
      const int64_t start = most(panel, stairs.first_row(key) / kWidth * kWidth);
      if (start >= stop || start >= stairs.rows) break;
      product<Unit, false>(least(kTileRows, stairs.keys - key), (stop - start) / kWidth,
                           keys + key * key_stride, key_stride, rows + start, ld, inner,
                           scores + key * ld + start, ld, Into::kOver, static_cast<const float*>(nullptr));
    }
  }
}

// sums[row][.] += or = the weights [key][row], in units along keys, times the values of the keys seen.
template <class Unit>
void sum_keys(const Stairs& stairs, const float* weights, int64_t ld, const float* values,
              int64_t value_stride, int64_t columns, float* sums, Into into, const float* decay) {
  constexpr int64_t kPanel = kTileVectors * kWidth;
  for (int64_t panel = 0; panel < columns; panel += kPanel) {
    const int64_t vectors = (least(columns - panel, kPanel) + kWidth - 1) / kWidth;
    for (int64_t row = 0; row < stairs.rows; row += kTileRows) {
      const int64_t inner = (stairs.end(row + kTileRows - 1) + Unit::kPair - 1) / Unit::kPair;
      product<Unit, true>(least(kTileRows, stairs.rows - row), vectors, weights + row, ld, values + panel,
                          value_stride, inner, sums + row * value_stride + panel, value_stride, into,
                          decay == nullptr ? nullptr : decay + row);
    }
  }
}

// sums[key][.] += the weights [key][row], in units along rows, times what the rows that see it hold.
template <class Unit>
void sum_rows_seen(const Stairs& stairs, const float* weights, int64_t ld, const float* values,
                   int64_t value_stride, int64_t columns, float* sums) {
  constexpr int64_t kPanel = kTileVectors * kWidth;
  for (int64_t panel = 0; panel < columns; panel += kPanel) {
    const int64_t vectors = (least(columns - panel, kPanel) + kWidth - 1) / kWidth;
    for (int64_t key = 0; key < stairs.keys; key += kTileRows) {
      const int64_t first = stairs.first_row(key) / Unit::kPair;
      const int64_t inner = (stairs.rows + Unit::kPair - 1) / Unit::kPair - first;
      if (inner <= 0) break;
      product<Unit, false>(least(kTileRows, stairs.keys - key), vectors, weights + key * ld + first, ld,
                           values + first * value_stride + panel, value_stride, inner,
                           sums + key * value_stride + panel, value_stride, Into::kAdd,
                           static_cast<const float*>(nullptr));
    }
  }
}

// What a Unit makes of stored rows. `natural`: one row, units along it, zeros up to whole vectors.
// `paired`: units across kPair rows (the second may be missing), a unit per column.
template <class T, class Unit>
struct Pack {
  static void natural(const void* row, int64_t n, float* out) {
    const T* x = static_cast<const T*>(row);
    by_vectors(n, [&](int64_t i, int64_t count) { store(out + i, load_some(x + i, count)); });
  }
};

inline void zero(float* p, int64_t n) { __builtin_memset(p, 0, static_cast<uint64_t>(n) * sizeof(float)); }

// [rows][units] to [units][rows]; both are read and written by whole vectors.
inline void transpose(const float* in, int64_t rows, int64_t units, int64_t ld_in, float* out,
                      int64_t ld_out) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    for (int64_t u = 0; u < units; u += kWidth) {
      transpose_square(in + r * ld_in + u, ld_in, out + u * ld_out + r, ld_out);
    }
  }
}

// Query-shaped rows as [rows][units], zero rows up to whole vectors.
template <class T, class Unit>
void pack_rows(const ConstHeads& heads, int64_t first, int64_t positions, int64_t groups, int64_t columns,
               float* out) {
  const int64_t ld = padded(columns);
  int64_t row = 0;
  for (int64_t i = 0; i < positions; ++i) {
    for (int64_t g = 0; g < groups; ++g, ++row) {
      Pack<T, Unit>::natural(heads.at(first + i, g), columns, out + row * ld);
    }
  }
  zero(out + row * ld, (up_to(row, kWidth) - row) * ld);
}

template <class T>
void unpack_row(const float* row, float factor, int64_t columns, void* out) {
  T* y = static_cast<T*>(out);
  const Vec factors = broadcast(factor);
  by_vectors(columns, [&](int64_t i, int64_t count) { store_some(y + i, load(row + i) * factors, count); });
}

// Hands out parts of the scratch memory, each a whole number of cache lines.
struct Scratch {
  float* next;
  float* take(int64_t numbers) {
    float* taken = next;
    next += up_to(numbers, 16);
    return taken;
  }
};

}  // namespace
}  // namespace clara_fast::cpu
