// Attention, backward: some keys go over the blocks of rows that read them.
#pragma once

#include "attention_products.h"

namespace clara_fast::cpu {
namespace {

// From scores and grad_out . value, both [key][row], to the weights and the gradients of the (scaled) scores:
// weights and grads in units along rows, grads_by_key in units along keys.
template <class Unit>
void weigh(const Stairs& stairs, float factor, float* scores, float* products, int64_t ld,
           const float* log_sums, const float* log_sum_rests, const float* deltas, float* weights,
           float* grads, int64_t unit_stride) {
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

// deltas[row] = what grad_out . out is, added up as products are: a row that sees one key has out equal to
// its value, and so a gradient of scores of exactly zero.
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
        weigh<Unit>(stairs, shape.scale * kLog2E, scores, products, ld, log_sums, log_sum_rests, deltas,
                    unit_weights, unit_grads, unit_stride);
        const int64_t weight_stride = kPairs ? unit_stride : ld;
        sum_rows_seen<Unit>(stairs, unit_weights, weight_stride, grads_by_row, value_stride, shape.value_size,
                            value_sums + first * value_stride);
        sum_rows_seen<Unit>(stairs, unit_grads, weight_stride, queries_by_row, key_stride, shape.size,
                            key_sums + first * key_stride);
        sum_keys<Unit>(stairs, products, ld, keys_by_key + first / Unit::kPair * key_stride, key_stride,
                       shape.size, query_sums, first == 0 ? Into::kOver : Into::kAdd, nullptr);
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

}  // namespace
}  // namespace clara_fast::cpu
