// Attention, forward: a block of rows goes over the keys it sees, block by block.
#pragma once

#include "attention_products.h"

namespace clara_fast::cpu {
namespace {

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

// Turns scores [key][row] into weights over their keys, kept as Unit wants them, and brings `running` up to
// date.
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
    const auto weight = [&](int64_t k) {
      return exp2(multiply_add(load(at + k * ld), factors, zeros() - shift));
    };
    const auto partial_weight = [&](int64_t k) {
      return k < whole ? weight(k)
             : k < end ? from_lane(weight(k), stairs.first_row(k) - column, zeros())
                       : zeros();
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

}  // namespace
}  // namespace clara_fast::cpu
