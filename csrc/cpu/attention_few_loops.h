// Attention, forward, for few rows: keys are read as they lie, and shares of them merged.
#pragma once

#include "attention_forward_loops.h"

namespace clara_fast::cpu {
namespace {

// scores[r * ld + j] = the dot of row r and key j, for kRows rows and four keys (a missing one repeats
// another).
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
      for (int r = 0; r < kRows; ++r)
        totals[r] = multiply_add(broadcast(weights[r * ld + key]), value, totals[r]);
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
      return few_block<T, kRows - 1>(rows, keys, values, stairs, first_row, shape, queries, scores, sums,
                                     running);
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

}  // namespace
}  // namespace clara_fast::cpu
