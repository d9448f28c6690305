// The loops behind a kernel table, written once over Vec. A per-instruction-set file includes its vec_*.h,
// then this. All of it has internal linkage, so that each file keeps its own compiled copy.
#pragma once

#include "columns.h"
#include "kernels.h"

namespace clara_fast::cpu {
namespace {

template <class T>
inline Vec load(const T* p, Whole) {
  return load(p);
}
template <class T>
inline Vec load(const T* p, Rest rest) {
  T padded[kWidth] = {};
  __builtin_memcpy(padded, p, static_cast<uint64_t>(rest.count) * sizeof(T));
  return load(static_cast<const T*>(padded));
}
template <class T>
inline void store(T* p, Vec v, Whole) {
  store(p, v);
}
template <class T>
inline void store(T* p, Vec v, Rest rest) {
  T padded[kWidth];
  store(padded, v);
  __builtin_memcpy(p, padded, static_cast<uint64_t>(rest.count) * sizeof(T));
}

template <class Step>
inline void for_columns(int64_t begin, int64_t end, Step step) {
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) step(i, Whole{});
  if (i < end) step(i, Rest{end - i});
}

// Adds up what step(i, columns, total) adds to `total` over the columns of a row: four totals hide the
// latency of an addition, and each chunk of columns has its own sum.
template <class Step>
inline float sum_columns(int64_t n, Step step) {
  float sum_of_chunks = 0.0f;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    Vec totals[4] = {zeros(), zeros(), zeros(), zeros()};
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
      for (int u = 0; u < 4; ++u) step(i + u * kWidth, Whole{}, totals[u]);
    }
    for_columns(i, end, [&](int64_t j, auto columns) { step(j, columns, totals[0]); });
    sum_of_chunks += sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
  }
  return sum_of_chunks;
}

template <class T>
float widen(const void* row, int64_t n, int64_t padded, float* out) {
  const T* x = static_cast<const T*>(row);
  for (int64_t i = n; i < padded; ++i) out[i] = 0.0f;
  return sum_columns(n, [&](int64_t i, auto columns, Vec& squares) {
    const Vec v = load(x + i, columns);
    squares = multiply_add(v, v, squares);
    store(out + i, v, columns);
  });
}

template <class T>
void narrow(const float* row, int64_t n, void* out) {
  T* y = static_cast<T*>(out);
  for_columns(0, n, [&](int64_t i, auto columns) { store(y + i, load(row + i, columns), columns); });
}

template <class T>
float square_sum(const void* row, int64_t n) {
  const T* x = static_cast<const T*>(row);
  return sum_columns(n, [&](int64_t i, auto columns, Vec& squares) {
    const Vec v = load(x + i, columns);
    squares = multiply_add(v, v, squares);
  });
}

template <class T>
void dots(const void* const* keys, const float* query, int64_t n, float* dots, float* squares) {
  const T* k[kTileKeys];
  for (int64_t j = 0; j < kTileKeys; ++j) {
    k[j] = static_cast<const T*>(keys[j]);
    squares[j] = 0.0f;
    dots[j] = 0.0f;
  }
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    Vec total[kTileKeys];
    Vec square[kTileKeys];
    for (int64_t j = 0; j < kTileKeys; ++j) total[j] = square[j] = zeros();
    for_columns(begin, end, [&](int64_t i, auto columns) {
      const Vec q = load(query + i, columns);
      for (int64_t j = 0; j < kTileKeys; ++j) {
        const Vec key = load(k[j] + i, columns);
        square[j] = multiply_add(key, key, square[j]);
        total[j] = multiply_add(key, q, total[j]);
      }
    });
    add_sums(dots, total);
    add_sums(squares, square);
  }
}

// Rows are summed eight at a time in registers: fewer trips to `acc`, and shorter float32 sums.
constexpr int64_t kRowGroup = 8;

template <class T>
void sum_rows(const void* rows, int64_t count, int64_t n, float* acc) {
  const T* x = static_cast<const T*>(rows);
  for (int64_t first = 0; first < count; first += kRowGroup) {
    const int64_t last = first + kRowGroup < count ? first + kRowGroup : count;
    for_columns(0, n, [&](int64_t i, auto columns) {
      Vec total = zeros();
      for (int64_t r = first; r < last; ++r) total = total + load(x + r * n + i, columns);
      store(acc + i, load(acc + i, columns) + total, columns);
    });
  }
}

template <class T, class Columns>
inline Vec normed(const T* x, float scale, const float* weight, Columns columns) {
  return rounded<T>(load(weight, columns) * rounded<T>(load(x, columns) * broadcast(scale)));
}

template <class T>
void sum_normed_rows(const void* rows, int64_t count, int64_t n, const float* scale, const float* weight,
                     float* acc) {
  const T* x = static_cast<const T*>(rows);
  for (int64_t first = 0; first < count; first += kRowGroup) {
    const int64_t last = first + kRowGroup < count ? first + kRowGroup : count;
    for_columns(0, n, [&](int64_t i, auto columns) {
      Vec total = zeros();
      for (int64_t r = first; r < last; ++r) {
        total = total + normed(x + r * n + i, scale[r], weight + i, columns);
      }
      store(acc + i, load(acc + i, columns) + total, columns);
    });
  }
}

template <class T>
void norm_row(const void* row, int64_t n, float scale, const float* weight, void* out) {
  const T* x = static_cast<const T*>(row);
  T* y = static_cast<T*>(out);
  for_columns(0, n, [&](int64_t i, auto columns) {
    store(y + i, normed(x + i, scale, weight + i, columns), columns);
  });
}

template <class T>
float weighted_dot(const void* row, int64_t n, const float* grad, const float* weight) {
  const T* x = static_cast<const T*>(row);
  return sum_columns(n, [&](int64_t i, auto columns, Vec& products) {
    products =
        multiply_add(load(x + i, columns), load(grad + i, columns) * load(weight + i, columns), products);
  });
}

template <class T>
void norm_row_grad(const void* row, int64_t n, const float* grad, const float* weight, float scale,
                   float pull, void* out, float* grad_weight) {
  const T* x = static_cast<const T*>(row);
  T* dx = static_cast<T*>(out);
  const Vec scales = broadcast(scale);
  const Vec pulls = broadcast(-pull);
  for_columns(0, n, [&](int64_t i, auto columns) {
    const Vec v = load(x + i, columns);
    const Vec g = load(grad + i, columns);
    const Vec straight = scales * (load(weight + i, columns) * g);
    store(dx + i, multiply_add(pulls, v, straight), columns);
    store(grad_weight + i, multiply_add(g, scales * v, load(grad_weight + i, columns)), columns);
  });
}

template <class T>
void add_scaled(const void* row, int64_t n, float factor, const float* other, void* out) {
  const T* x = static_cast<const T*>(row);
  T* y = static_cast<T*>(out);
  const Vec factors = broadcast(factor);
  for_columns(0, n, [&](int64_t i, auto columns) {
    store(y + i, multiply_add(factors, load(other + i, columns), load(x + i, columns)), columns);
  });
}

template <class T>
void cosine_grad(const void* key, const float* query, int64_t n, float query_factor, float key_factor,
                 float unit, float pull, float* grad_query, void* out) {
  const T* k = static_cast<const T*>(key);
  T* dk = static_cast<T*>(out);
  const Vec query_factors = broadcast(query_factor);
  const Vec key_factors = broadcast(key_factor);
  const Vec units = broadcast(unit);
  const Vec pulls = broadcast(-pull);
  for_columns(0, n, [&](int64_t i, auto columns) {
    const Vec v = load(k + i, columns);
    const Vec q = load(query + i, columns);
    store(grad_query + i, multiply_add(query_factors, v, load(grad_query + i, columns)), columns);
    store(dk + i, key_factors * multiply_add(pulls, v, units * q), columns);
  });
}

template <int kQueries>
void tile_dots(const float* const* keys, const float* queries, int64_t query_stride, int64_t n, float* dots) {
  Vec total[kQueries][kTileKeys];
  for (int q = 0; q < kQueries; ++q) {
    for (int64_t j = 0; j < kTileKeys; ++j) total[q][j] = zeros();
  }
  for (int64_t i = 0; i < n; i += kWidth) {
    Vec query[kQueries];
    for (int q = 0; q < kQueries; ++q) query[q] = load(queries + q * query_stride + i);
    for (int64_t j = 0; j < kTileKeys; ++j) {
      const Vec key = load(keys[j] + i);
      for (int q = 0; q < kQueries; ++q) total[q][j] = multiply_add(key, query[q], total[q][j]);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int64_t j = 0; j < kTileKeys; ++j) dots[q * kTileKeys + j] = 0.0f;
    add_sums(dots + q * kTileKeys, total[q]);
  }
}

void block_dots(const float* keys, int64_t key_stride, int64_t num_keys, const float* queries,
                int64_t query_stride, int64_t num_queries, int64_t n, float* scores, int64_t score_stride) {
  float dots[kTileQueries * kTileKeys];
  for (int64_t j = 0; j < num_keys; j += kTileKeys) {
    const int64_t used = num_keys - j < kTileKeys ? num_keys - j : kTileKeys;
    const float* tile[kTileKeys];  // a short tile repeats its first key and drops the result
    for (int64_t t = 0; t < kTileKeys; ++t) tile[t] = keys + (t < used ? j + t : j) * key_stride;
    for (int64_t q = 0; q < num_queries;) {
      const bool whole = q + kTileQueries <= num_queries;
      const float* first = queries + q * query_stride;
      if (whole) {
        tile_dots<kTileQueries>(tile, first, query_stride, n, dots);
      } else {
        tile_dots<1>(tile, first, query_stride, n, dots);
      }
      const int64_t done = whole ? kTileQueries : 1;
      for (int64_t p = 0; p < done; ++p) {
        for (int64_t t = 0; t < used; ++t) scores[(q + p) * score_stride + j + t] += dots[p * kTileKeys + t];
      }
      q += done;
    }
  }
}

template <class T>
constexpr RowKernels readable() {
  RowKernels rows{};
  rows.widen = &widen<T>;
  rows.dots = &dots<T>;
  return rows;
}

template <class T>
constexpr RowKernels writable() {
  RowKernels rows = readable<T>();
  rows.square_sum = &square_sum<T>;
  rows.narrow = &narrow<T>;
  rows.sum_rows = &sum_rows<T>;
  rows.sum_normed_rows = &sum_normed_rows<T>;
  rows.norm_row = &norm_row<T>;
  rows.weighted_dot = &weighted_dot<T>;
  rows.norm_row_grad = &norm_row_grad<T>;
  rows.add_scaled = &add_scaled<T>;
  rows.cosine_grad = &cosine_grad<T>;
  return rows;
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          {writable<float>(), writable<bf16>(), writable<f16>(), readable<int8_t>(), readable<f8e4m3>()},
          &block_dots};
}

}  // namespace
}  // namespace clara_fast::cpu
