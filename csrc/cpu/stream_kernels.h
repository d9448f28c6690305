// Dot products of a few query rows with keys that stream in from memory, written once over a Product: how a
// step's worth of a key is loaded and multiplied. Included after a vec_*.h or in a file of its own
// instruction set.
#pragma once

#include "columns.h"
#include "search_kernels.h"

namespace clara_fast::cpu {
namespace {

constexpr int64_t kGroupKeys = 4;  // keys whose sums are gathered at once
constexpr int64_t kAhead = 8192;   // bytes that a prefetch into the L2 cache runs ahead

// Short float32 sums, and rows that stay in the L1 cache for the keys of a group.
template <class P, int kRows>
constexpr int64_t columns_at_a_time = (kRows > 2 ? 32 : 64) * P::kStep;

// One to two keys, one after the other or side by side, `kUnroll` steps at a time.
template <class P, int kRows, int kKeys, int kUnroll>
inline void stream_keys(const char* keys, int64_t stride, int64_t begin, int64_t n, const char* const* rows,
                        typename P::Vector (*totals)[kGroupKeys], int64_t at) {
  using Vector = typename P::Vector;
  constexpr int64_t kSize = sizeof(typename P::Element);
  constexpr int kNorms = P::kNorms;
  const int64_t left = n - begin;
  const int64_t end = begin + (left < columns_at_a_time<P, kRows> ? left : columns_at_a_time<P, kRows>);
  Vector dots[kRows][kKeys][kUnroll];
  Vector norms[kNorms][kKeys][kUnroll];
  unrolled<kKeys>([&](auto k) CLARA_FAST_INLINE {
    unrolled<kUnroll>([&](auto u) CLARA_FAST_INLINE {
      unrolled<kRows>([&](auto r) CLARA_FAST_INLINE { dots[r][k][u] = P::zero(); });
      unrolled<kNorms>([&](auto m) CLARA_FAST_INLINE { norms[m][k][u] = P::zero(); });
    });
  });
  const auto step = [&](int64_t i, auto u, auto columns) CLARA_FAST_INLINE {
    decltype(P::load(keys, columns)) loaded[kKeys];
    unrolled<kKeys>([&](auto k) CLARA_FAST_INLINE {
      const char* key = keys + k * stride + i * kSize;
      __builtin_prefetch(key + kAhead, 0, 2);
      loaded[k] = P::load(key, columns);
      unrolled<kNorms>([&](auto m)
                           CLARA_FAST_INLINE { norms[m][k][u] = P::norm(m, loaded[k], norms[m][k][u]); });
    });
    // Each load of a row serves all keys.
    unrolled<kRows>([&](auto r) CLARA_FAST_INLINE {
      unrolled<kKeys>([&](auto k) CLARA_FAST_INLINE {
        dots[r][k][u] = P::dot(loaded[k], rows[r] + i * P::kRowBytes, dots[r][k][u]);
      });
    });
  };
  int64_t i = begin;
  for (; i + kUnroll * P::kStep <= end; i += kUnroll * P::kStep) {
    unrolled<kUnroll>([&](auto u) CLARA_FAST_INLINE { step(i + u * P::kStep, u, Whole{}); });
  }
  for (; i + P::kStep <= end; i += P::kStep) step(i, Constant<0>{}, Whole{});
  if (i < end) step(i, Constant<0>{}, Rest{end - i});
  const auto add_to = [&](Vector& total, const Vector(&parts)[kUnroll]) CLARA_FAST_INLINE {
    Vector sum = parts[0];
    unrolled<kUnroll, 1>([&](auto u) CLARA_FAST_INLINE { sum = P::add(sum, parts[u]); });
    total = begin == 0 ? sum : P::add(total, sum);
  };
  unrolled<kKeys>([&](auto k) CLARA_FAST_INLINE {
    unrolled<kRows>([&](auto r) CLARA_FAST_INLINE { add_to(totals[r][at + k], dots[r][k]); });
    unrolled<kNorms>([&](auto m) CLARA_FAST_INLINE { add_to(totals[kRows + m][at + k], norms[m][k]); });
  });
}

template <class P, int kRows>
void stream_rows(const char* keys, int64_t stride, int64_t count, int64_t n, const void* const* rows,
                 int64_t num_rows, void* const* outs, KeySums sums) {
  using Sum = typename P::Sum;
  // Few rows: key by key with several sums each. More: two keys share each load of a row.
  constexpr int kKeys = kRows <= 2 ? 1 : 2;
  constexpr int kUnroll = kRows <= 1 ? 4 : kRows == 2 ? 2 : 1;
  const char* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = static_cast<const char*>(rows[r < num_rows ? r : 0]);
  for (int64_t j = 0; j < count; j += kGroupKeys) {
    const int64_t used = count - j < kGroupKeys ? count - j : kGroupKeys;
    typename P::Vector totals[kRows + P::kNorms][kGroupKeys];
    // Few rows: each key to its end, as memory is read fastest. More: these columns of the rows for all the
    // keys.
    const int64_t columns = kRows <= 3 ? n : columns_at_a_time<P, kRows>;
    for (int64_t from = 0; from < n; from += columns) {
      const int64_t to = n - from < columns ? n : from + columns;
      for (int64_t t = 0; t < kGroupKeys; t += kKeys) {
        // A short group repeats its first key and drops the result.
        const int64_t first = t < used ? t : 0;
        const int64_t apart = kKeys == 2 && first + 1 < used ? stride : 0;
        for (int64_t begin = from; begin < to; begin += columns_at_a_time<P, kRows>) {
          stream_keys<P, kRows, kKeys, kUnroll>(keys + (j + first) * stride, apart, begin, n, row, totals, t);
        }
      }
    }
    Sum four[kGroupKeys];
    for (int r = 0; r < kRows && r < num_rows; ++r) {
      P::sums(totals[r], four);
      for (int64_t t = 0; t < used; ++t) static_cast<Sum*>(outs[r])[(j + t) * kLanes] = four[t];
    }
    P::store_norms(totals + kRows, used, {sums.squares + j, sums.sums == nullptr ? nullptr : sums.sums + j});
  }
}

}  // namespace
}  // namespace clara_fast::cpu
