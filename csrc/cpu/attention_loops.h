// Attention over blocks of rows and keys, written once over Vec and a Unit of products. A
// per-instruction-set file includes its attention_vec_*.h, then this. All of it has internal linkage.
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

// ---- products ----

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

// ---- who sees whom within a block ----

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

// ---- packing ----

// What a Unit makes of stored rows. `natural`: one row, units along it, zeros up to whole vectors.
// `paired`: units across kPair rows (the second may be missing), a unit per column.
// `put_scores`: see softmax and weigh.
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

// ---- forward ----

// Walks over the rows of a segment's keys.
struct KeyRows {
  const KeyRange* range;
  int64_t skip;

  int64_t take() {
    while (skip >= range->length) skip -= (range++)->length;
    return range->start + skip++;
  }
};

// The running maximum and sum of each row, in powers of two.
struct Running {
  float* largest;
  float* sum;
  float* decay;
};

// Turns scores [key][row] into weights over their keys, kept as Unit wants them, and brings `running` up to date.
template <class Unit>
void softmax(const Stairs& stairs, float factor, float* scores, int64_t ld, const Running& running) {
  const Vec factors = broadcast(factor);
  for (int64_t column = 0; column < stairs.rows; column += kWidth) {
    // Keys below `whole` are seen by all rows of the vector, from `end` on by none. Products read some more.
    const int64_t whole = stairs.end(column);
    const int64_t end = stairs.end(column + kWidth - 1);
    const int64_t stop = up_to(stairs.end(column + kWidth - 1 + kTileRows), Unit::kPair);
    float* at = scores + column;
    const Vec before = load(running.largest + column);
    Vec largest = before;
    Vec other = before;
    int64_t key = 0;
    for (; key + 2 <= whole; key += 2) {
      largest = larger(largest, load(at + key * ld) * factors);
      other = larger(other, load(at + (key + 1) * ld) * factors);
    }
    largest = larger(largest, other);
    for (; key < end; ++key) {
      const Vec scaled = load(at + key * ld) * factors;
      largest = larger(largest, from_lane(scaled, stairs.first_row(key) - column, broadcast(-kInfinity)));
    }
    // A row that has seen nothing: its weights are 0, not NaN.
    const Vec shift = larger(largest, broadcast(-3e38f));
    const auto weight = [&](int64_t k) { return exp2(multiply_add(load(at + k * ld), factors, zeros() - shift)); };
    const auto partial_weight = [&](int64_t k) {
      return k < whole ? weight(k) : k < end ? from_lane(weight(k), stairs.first_row(k) - column, zeros()) : zeros();
    };
    Vec sum = zeros();
    if constexpr (Unit::kPair == 1) {
      Vec sum_of_odd = zeros();
      for (key = 0; key + 2 <= whole; key += 2) {
        const Vec even = weight(key);
        const Vec odd = weight(key + 1);
        store(at + key * ld, even);
        store(at + (key + 1) * ld, odd);
        sum = sum + even;
        sum_of_odd = sum_of_odd + odd;
      }
      sum = sum + sum_of_odd;
      for (; key < stop; ++key) {
        const Vec v = partial_weight(key);
        store(at + key * ld, v);
        sum = sum + v;
      }
    } else {
      for (key = 0; key < stop; key += 2) {
        const bool both = key + 2 <= whole;
        const Vec even = both ? weight(key) : partial_weight(key);
        const Vec odd = both ? weight(key + 1) : partial_weight(key + 1);
        Unit::store_pair(at + key / 2 * ld, even, odd);
        sum = sum + (even + odd);
      }
    }
    const Vec decay = exp2(before - shift);
    store(running.decay + column, decay);
    store(running.sum + column, multiply_add(decay, load(running.sum + column), sum));
    store(running.largest + column, largest);
  }
}

// Rounded once: backward's weights are as exact as this number.
inline float natural_log_sum(float largest, float sum) {
  return static_cast<float>((double{largest} + __builtin_log2(double{sum})) * 0.6931471805599453);
}

template <class T>
void finish(const AttentionShape& shape, const ForwardTask& task, const float* sums, const float* largest,
            const float* sum) {
  const int64_t ld = padded(shape.value_size);
  int64_t row = 0;
  for (int64_t i = 0; i < task.positions; ++i) {
    for (int64_t g = 0; g < shape.groups; ++g, ++row) {
      const bool nothing = sum[row] == 0.0f;
      unpack_row<T>(sums + row * ld, nothing ? 0.0f : 1.0f / sum[row], shape.value_size, task.out.at(i, g));
      if (task.lse == nullptr) continue;
      task.lse[i * task.lse_position + g] = nothing ? -kInfinity : natural_log_sum(largest[row], sum[row]);
    }
  }
}

template <class T, class Unit>
void forward(const AttentionShape& shape, const ForwardTask& task, float* scratch) {
  const int64_t rows = task.positions * shape.groups;
  const int64_t ld = padded(rows);
  const int64_t key_stride = padded(shape.size);
  const int64_t value_stride = padded(shape.value_size);
  const int64_t size_units = (shape.size + Unit::kPair - 1) / Unit::kPair;
  Scratch memory{scratch};
  float* rows_as_stored = memory.take(ld * key_stride);
  float* queries = memory.take(key_stride * ld);
  float* keys = memory.take(kBlockKeys * key_stride);
  float* values = memory.take(kBlockKeys * value_stride);
  float* scores = memory.take(kBlockKeys * ld);
  float* sums = memory.take(ld * value_stride);
  const Running running{memory.take(ld), memory.take(ld), memory.take(ld)};

  pack_rows<T, Unit>(task.query, 0, task.positions, shape.groups, shape.size, rows_as_stored);
  transpose(rows_as_stored, rows, size_units, key_stride, queries, ld);
  for (int64_t row = 0; row < up_to(rows, kWidth); ++row) {
    running.largest[row] = -kInfinity;
    running.sum[row] = 0.0f;
  }
  if (task.first_key >= task.last_key) zero(sums, rows * value_stride);

  KeyRows next{task.ranges, task.first_key};
  for (int64_t first = task.first_key; first < task.last_key; first += kBlockKeys) {
    const Stairs stairs{rows, least(kBlockKeys, task.last_key - first), shape.groups, task.own - first,
                        task.offset};
    const void* before = nullptr;
    for (int64_t key = 0; key < stairs.keys; ++key) {
      const int64_t row = next.take();
      Pack<T, Unit>::natural(task.key.at(row, 0), shape.size, keys + key * key_stride);
      const void* value = task.value.at(row, 0);
      if constexpr (Unit::kPair == 1) {
        Pack<T, Unit>::natural(value, shape.value_size, values + key * value_stride);
      } else if (key % 2 == 1 || key + 1 == stairs.keys) {
        const bool whole = key % 2 == 1;
        Pack<T, Unit>::paired(whole ? before : value, whole ? value : nullptr, shape.value_size,
                              values + key / 2 * value_stride);
      }
      before = value;
    }
    score<Unit>(stairs, keys, key_stride, queries, ld, size_units, scores);
    softmax<Unit>(stairs, shape.scale * kLog2E, scores, ld, running);
    sum_keys<Unit>(stairs, scores, ld, values, value_stride, shape.value_size, sums,
                   first == task.first_key ? Into::kOver : Into::kDecay, running.decay);
  }
  finish<T>(shape, task, sums, running.largest, running.sum);
}

// ---- forward, few rows ----

// scores[r * ld + j] = the dot of row r and key j, for kRows rows and four keys (a missing one repeats another).
template <class T, int kRows>
inline void few_scores(const T* const keys[4], const float* rows, int64_t row_stride, int64_t columns,
                       float* scores, int64_t ld) {
  Vec sums[kRows][4];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 4; ++j) sums[r][j] = zeros();
  }
  by_vectors(columns, [&](int64_t i, int64_t count) {
    Vec key[4];
    for (int j = 0; j < 4; ++j) key[j] = load_some(keys[j] + i, count);
    for (int r = 0; r < kRows; ++r) {
      const Vec row = load(rows + r * row_stride + i);
      for (int j = 0; j < 4; ++j) sums[r][j] = multiply_add(row, key[j], sums[r][j]);
    }
  });
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 4; ++j) scores[r * ld + j] = 0.0f;
    add_sums(scores + r * ld, sums[r]);
  }
}

// sums[r][.] = decay[r] * sums[r][.] + weights[r * ld + key] * value of key.
template <class T, int kRows>
inline void few_sums(const T* const* values, int64_t keys, const float* weights, int64_t ld, int64_t columns,
                     float* sums, int64_t sum_stride, const float* decay) {
  by_vectors(columns, [&](int64_t i, int64_t count) {
    Vec totals[kRows];
    for (int r = 0; r < kRows; ++r) totals[r] = load(sums + r * sum_stride + i) * broadcast(decay[r]);
    for (int64_t key = 0; key < keys; ++key) {
      const Vec value = load_some(values[key] + i, count);
      for (int r = 0; r < kRows; ++r) totals[r] = multiply_add(broadcast(weights[r * ld + key]), value, totals[r]);
    }
    for (int r = 0; r < kRows; ++r) store(sums + r * sum_stride + i, totals[r]);
  });
}

template <class T, int kRows = kFewTile>
inline void few_block(int64_t rows, const T* const* keys, const T* const* values, const Stairs& stairs,
                      int64_t first_row, const AttentionShape& shape, const float* queries, float* scores,
                      float* sums, const Running& running) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return few_block<T, kRows - 1>(rows, keys, values, stairs, first_row, shape, queries, scores, sums, running);
    }
  }
  constexpr int64_t kStride = kBlockKeys + 16;
  const int64_t query_stride = padded(shape.size);
  const int64_t value_stride = padded(shape.value_size);
  queries += first_row * query_stride;
  sums += first_row * value_stride;
  for (int64_t key = 0; key < stairs.keys; key += 4) {
    const T* four[4];
    for (int64_t j = 0; j < 4; ++j) four[j] = keys[least(key + j, stairs.keys - 1)];
    few_scores<T, kRows>(four, queries, query_stride, shape.size, scores + key, kStride);
  }
  const Vec factors = broadcast(shape.scale * kLog2E);
  for (int r = 0; r < kRows; ++r) {
    float* row = scores + r * kStride;
    const int64_t end = stairs.end(first_row + r);
    const int64_t stop = up_to(stairs.keys, kWidth);
    for (int64_t key = 0; key < end; key += kWidth) store(row + key, load(row + key) * factors);
    for (int64_t key = end; key < stop; ++key) row[key] = -kInfinity;
    Vec largest = broadcast(running.largest[first_row + r]);
    for (int64_t key = 0; key < stop; key += kWidth) largest = larger(largest, load(row + key));
    const float before = running.largest[first_row + r];
    const float top = largest_lane(largest);
    const Vec shift = broadcast(top > -3e38f ? top : -3e38f);
    Vec sum = zeros();
    for (int64_t key = 0; key < stop; key += kWidth) {
      const Vec weight = exp2(load(row + key) - shift);
      store(row + key, weight);
      sum = sum + weight;
    }
    float decay[kWidth];
    store(decay, exp2(broadcast(before) - shift));
    running.decay[first_row + r] = decay[0];
    running.sum[first_row + r] = running.sum[first_row + r] * decay[0] + cpu::sum(sum);
    running.largest[first_row + r] = top;
  }
  few_sums<T, kRows>(values, stairs.end(first_row + kRows - 1), scores, kStride, shape.value_size, sums,
                     value_stride, running.decay + first_row);
}

template <class T>
void forward_few(const AttentionShape& shape, const ForwardTask& task, float* scratch) {
  const int64_t rows = task.positions * shape.groups;
  const int64_t value_stride = padded(shape.value_size);
  Scratch memory{scratch};
  float* queries = memory.take(up_to(kFewRows, kWidth) * padded(shape.size));
  float* scores = memory.take(kFewTile * (kBlockKeys + 16));
  float* sums = task.partial != nullptr ? task.partial : memory.take(kFewRows * value_stride);
  float* largest = sums + kFewRows * value_stride;
  if (task.partial == nullptr) largest = memory.take(2 * kFewRows);
  const Running running{largest, largest + kFewRows, memory.take(kFewRows)};
  const T* keys[kBlockKeys];
  const T* values[kBlockKeys];

  pack_rows<T, Floats>(task.query, 0, task.positions, shape.groups, shape.size, queries);
  zero(sums, rows * value_stride);
  for (int64_t row = 0; row < rows; ++row) {
    running.largest[row] = -kInfinity;
    running.sum[row] = 0.0f;
  }
  KeyRows next{task.ranges, task.first_key};
  for (int64_t first = task.first_key; first < task.last_key; first += kBlockKeys) {
    const Stairs stairs{rows, least(kBlockKeys, task.last_key - first), shape.groups, task.own - first,
                        task.offset};
    for (int64_t key = 0; key < stairs.keys; ++key) {
      const int64_t at = next.take();
      keys[key] = static_cast<const T*>(task.key.at(at, 0));
      values[key] = static_cast<const T*>(task.value.at(at, 0));
    }
    for (int64_t row = 0; row < rows; row += kFewTile) {
      few_block<T>(rows - row, keys, values, stairs, row, shape, queries, scores, sums, running);
    }
  }
  if (task.partial == nullptr) finish<T>(shape, task, sums, running.largest, running.sum);
}

template <class T>
void merge(const AttentionShape& shape, const ForwardTask& task, float* partials, int64_t count) {
  const int64_t rows = task.positions * shape.groups;
  const int64_t ld = padded(shape.value_size);
  const int64_t size = partial_size(shape);
  float* largest = partials + kFewRows * ld;
  float* sum = largest + kFewRows;
  for (int64_t p = 1; p < count; ++p) {
    const float* more = partials + p * size;
    for (int64_t row = 0; row < rows; ++row) {
      const float more_largest = more[kFewRows * ld + row];
      const float top = largest[row] > more_largest ? largest[row] : more_largest;
      const float shift = top > -3e38f ? top : -3e38f;
      const float mine = __builtin_exp2f(largest[row] - shift);
      const float theirs = __builtin_exp2f(more_largest - shift);
      for (int64_t i = 0; i < ld; i += kWidth) {
        float* at = partials + row * ld + i;
        store(at, multiply_add(broadcast(theirs), load(more + row * ld + i), load(at) * broadcast(mine)));
      }
      sum[row] = sum[row] * mine + more[kFewRows * ld + kFewRows + row] * theirs;
      largest[row] = top;
    }
  }
  finish<T>(shape, task, partials, largest, sum);
}

// ---- backward ----

// From scores and grad_out . value, both [key][row], to the weights and the gradients of the (scaled) scores:
// weights and grads in units along rows, grads_by_key in units along keys.
template <class Unit>
void weigh(const Stairs& stairs, float factor, float* scores, float* products, int64_t ld,
           const float* log_sums, const float* log_sum_rests, const float* deltas, float* weights, float* grads, int64_t unit_stride) {
  const Vec factors = broadcast(factor);
  const int64_t stop = up_to(stairs.rows, kWidth);
  for (int64_t key = 0; key < stairs.keys; key += Unit::kPair) {
    // Products start at the first row that sees the first key of their tile, and read kTileRows at a time.
    const int64_t first = least(stairs.first_row(key / kTileRows * kTileRows),
                                most(0, stairs.first_row(key) - (kTileRows - 1)));
    for (int64_t column = first / kWidth * kWidth; column < stop; column += kWidth) {
      const Vec log_sum = load(log_sums + column);
      const Vec log_sum_rest = load(log_sum_rests + column);
      const Vec delta = load(deltas + column);
      Vec weight[Unit::kPair];
      Vec grad[Unit::kPair];
      for (int64_t k = 0; k < Unit::kPair; ++k) {
        if (key + k >= stairs.keys) {
          weight[k] = grad[k] = zeros();
          continue;
        }
        const int64_t at = (key + k) * ld + column;
        weight[k] = exp2(multiply_add(load(scores + at), factors, zeros() - log_sum) - log_sum_rest);
        grad[k] = weight[k] * (load(products + at) - delta);
        const int64_t lane = stairs.first_row(key + k) - column;
        if (lane > 0) {
          weight[k] = from_lane(weight[k], lane, zeros());
          grad[k] = from_lane(grad[k], lane, zeros());
        }
      }
      if constexpr (Unit::kPair == 1) {
        store(scores + key * ld + column, weight[0]);
        store(products + key * ld + column, grad[0]);
      } else {
        for (int64_t k = 0; k < Unit::kPair; ++k) {
          Unit::store_natural(weights + (key + k) * unit_stride + column / 2, weight[k]);
          Unit::store_natural(grads + (key + k) * unit_stride + column / 2, grad[k]);
        }
        Unit::store_pair(products + key / 2 * ld + column, grad[0], grad[1]);
      }
    }
  }
}

template <class T, class Unit>
void pack_pairs(const ConstHeads& heads, int64_t first, int64_t rows, int64_t groups, int64_t columns,
                float* out) {
  const int64_t ld = padded(columns);
  for (int64_t row = 0; row < rows; row += 2) {
    const void* one = heads.at(first + row / groups, row % groups);
    const void* two = row + 1 < rows ? heads.at(first + (row + 1) / groups, (row + 1) % groups) : nullptr;
    Pack<T, Unit>::paired(one, two, columns, out + row / 2 * ld);
  }
}

// deltas[row] = what grad_out . out is, added up as products are: a row that sees one key has out equal to its
// value, and so a gradient of scores of exactly zero.
template <class Unit>
void add_products(const float* a, const float* b, int64_t ld, int64_t rows, int64_t units, float* deltas) {
  for (int64_t column = 0; column < rows; column += kWidth) {
    Vec total = zeros();
    for (int64_t u = 0; u < units; ++u) {
      total = Unit::multiply_add(load(a + u * ld + column), load(b + u * ld + column), total);
    }
    store(deltas + column, total);
  }
}

template <class T, class Unit>
void backward(const AttentionShape& shape, const BackwardTask& task, float* scratch) {
  constexpr bool kPairs = Unit::kPair == 2;
  const int64_t groups = shape.groups;
  const int64_t block = most(1, kBlockRows / groups);
  const int64_t most_rows = padded(block * groups);
  const int64_t key_stride = padded(shape.size);
  const int64_t value_stride = padded(shape.value_size);
  const int64_t size_units = (shape.size + Unit::kPair - 1) / Unit::kPair;
  const int64_t value_units = (shape.value_size + Unit::kPair - 1) / Unit::kPair;
  Scratch memory{scratch};
  float* keys = memory.take(task.keys * key_stride);
  float* values = memory.take(task.keys * value_stride);
  float* keys_by_key = kPairs ? memory.take(task.keys * key_stride) : keys;
  float* key_sums = memory.take(task.keys * key_stride);
  float* value_sums = memory.take(task.keys * value_stride);
  float* queries = memory.take(most_rows * key_stride);
  float* grads = memory.take(most_rows * value_stride);
  float* query_rows = memory.take(most_rows * key_stride);
  float* grad_rows = memory.take(most_rows * value_stride);
  float* queries_by_row = kPairs ? memory.take(most_rows * key_stride) : query_rows;
  float* grads_by_row = kPairs ? memory.take(most_rows * value_stride) : grad_rows;
  float* out_rows = memory.take(most_rows * value_stride);
  float* outs = memory.take(most_rows * value_stride);
  float* query_sums = memory.take(most_rows * key_stride);
  float* scores = memory.take(kBlockKeys * most_rows);
  float* products = memory.take(kBlockKeys * most_rows);
  float* unit_weights = kPairs ? memory.take(kBlockKeys * most_rows) : scores;
  float* unit_grads = kPairs ? memory.take(kBlockKeys * most_rows) : products;
  float* log_sums = memory.take(most_rows);
  float* log_sum_rests = memory.take(most_rows);
  float* deltas = memory.take(most_rows);

  for (int64_t key = 0; key < task.keys; ++key) {
    Pack<T, Unit>::natural(task.key.at(key, 0), shape.size, keys + key * key_stride);
    Pack<T, Unit>::natural(task.value.at(key, 0), shape.value_size, values + key * value_stride);
  }
  if constexpr (kPairs) pack_pairs<T, Unit>(task.key, 0, task.keys, 1, shape.size, keys_by_key);
  zero(key_sums, task.keys * key_stride);
  zero(value_sums, task.keys * value_stride);

  for (int64_t r = 0; r < task.num_readers; ++r) {
    const Reader& reader = task.readers[r];
    const int64_t blocks = (reader.positions + block - 1) / block;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = reader.positions * b / blocks;
      const int64_t positions = reader.positions * (b + 1) / blocks - begin;
      const int64_t rows = positions * groups;
      const int64_t ld = padded(rows);
      const int64_t unit_stride = padded((rows + Unit::kPair - 1) / Unit::kPair);
      pack_rows<T, Unit>(reader.query, begin, positions, groups, shape.size, query_rows);
      transpose(query_rows, rows, size_units, key_stride, queries, ld);
      pack_rows<T, Unit>(reader.grad_out, begin, positions, groups, shape.value_size, grad_rows);
      transpose(grad_rows, rows, value_units, value_stride, grads, ld);
      if constexpr (kPairs) {
        pack_pairs<T, Unit>(reader.query, begin, rows, groups, shape.size, queries_by_row);
        pack_pairs<T, Unit>(reader.grad_out, begin, rows, groups, shape.value_size, grads_by_row);
      }
      pack_rows<T, Unit>(reader.out, begin, positions, groups, shape.value_size, out_rows);
      transpose(out_rows, rows, value_units, value_stride, outs, ld);
      add_products<Unit>(outs, grads, ld, rows, value_units, deltas);
      for (int64_t row = 0; row < up_to(rows, kWidth); ++row) {
        log_sums[row] = kInfinity;  // weights of 0
        log_sum_rests[row] = 0.0f;
        if (row >= rows) continue;
        const int64_t i = begin + row / groups;
        const int64_t g = row % groups;
        const float lse = reader.lse[i * reader.lse_position + g];
        if (lse > -kInfinity || lse != lse) {
          const double log_sum = double{lse} * 1.4426950408889634;
          log_sums[row] = static_cast<float>(log_sum);
          log_sum_rests[row] = static_cast<float>(log_sum - double{log_sums[row]});
        }
        if (reader.grad_lse != nullptr) deltas[row] -= reader.grad_lse[i * reader.lse_position + g];
      }

      const Stairs all{rows, task.keys, groups, 0, reader.offset + begin};
      const int64_t seen = all.end(rows - 1);
      if (seen == 0) zero(query_sums, rows * key_stride);
      for (int64_t first = 0; first < seen; first += kBlockKeys) {
        const Stairs stairs{rows, least(kBlockKeys, seen - first), groups, -first, all.offset};
        score<Unit>(stairs, keys + first * key_stride, key_stride, queries, ld, size_units, scores);
        score<Unit>(stairs, values + first * value_stride, value_stride, grads, ld, value_units, products);
        weigh<Unit>(stairs, shape.scale * kLog2E, scores, products, ld, log_sums, log_sum_rests,
                    deltas, unit_weights,
                    unit_grads, unit_stride);
        const int64_t weight_stride = kPairs ? unit_stride : ld;
        sum_rows_seen<Unit>(stairs, unit_weights, weight_stride, grads_by_row, value_stride, shape.value_size,
                            value_sums + first * value_stride);
        sum_rows_seen<Unit>(stairs, unit_grads, weight_stride, queries_by_row, key_stride, shape.size,
                            key_sums + first * key_stride);
        sum_keys<Unit>(stairs, products, ld, keys_by_key + first / Unit::kPair * key_stride, key_stride, shape.size,
                       query_sums, first == 0 ? Into::kOver : Into::kAdd, nullptr);
      }
      for (int64_t row = 0; row < rows; ++row) {
        void* out = reader.grad_query.at(begin + row / groups, row % groups);
        const float* in = query_sums + row * key_stride;
        if (reader.partial) {
          unpack_row<float>(in, shape.scale, shape.size, out);
        } else {
          unpack_row<T>(in, shape.scale, shape.size, out);
        }
      }
    }
  }
  for (int64_t key = 0; key < task.keys; ++key) {
    unpack_row<T>(key_sums + key * key_stride, shape.scale, shape.size, task.grad_key.at(key, 0));
    unpack_row<T>(value_sums + key * value_stride, 1.0f, shape.value_size, task.grad_value.at(key, 0));
  }
}

template <class T>
void add_up(const float* rows, int64_t stride, int64_t count, int64_t columns, void* out) {
  T* y = static_cast<T*>(out);
  by_vectors(columns, [&](int64_t i, int64_t some) {
    Vec total = load_some(rows + i, some);
    for (int64_t r = 1; r < count; ++r) total = total + load_some(rows + r * stride + i, some);
    store_some(y + i, total, some);
  });
}

template <class T, class Unit>
constexpr AttentionLoops make_loops() {
  return {&forward<T, Unit>, &forward_few<T>, &merge<T>, &backward<T, Unit>, &add_up<T>};
}

}  // namespace
}  // namespace clara_fast::cpu
