// Dot products of a few query rows with keys that stream in from memory, written once over a Product: how a
// step's worth of a key is loaded and multiplied. Included after a vec_*.h or in a file of its own
// instruction set.
#pragma once

#include "columns.h"
#include "search_kernels.h"

namespace clara_fast::cpu {
namespace {

// Short float32 sums, and rows that stay in the L1 cache for all streams.
template <class P, int kRows>
constexpr int64_t columns_at_a_time = (kRows > 2 ? 32 : 64) * P::kStep;

// Keys whose sums stay in registers together: all streams', or two's.
template <class P, int kRows>
constexpr int keys_together = (kRows + P::kNorms) * kStreams <= P::kSums ? kStreams : 2;

// One key of each of some streams over the columns from `begin` on, as many as are taken at a time.
template <class P, int kRows, int kKeys>
inline void stream_keys(const char* const* keys, int64_t begin, int64_t n, const char* const* rows,
                        typename P::Vector (*totals)[kStreams], int64_t at) {
  using Vector = typename P::Vector;
  constexpr int64_t kSize = sizeof(typename P::Element);
  constexpr int kNorms = P::kNorms;
  const int64_t left = n - begin;
  const int64_t end = begin + (left < columns_at_a_time<P, kRows> ? left : columns_at_a_time<P, kRows>);
  Vector dots[kRows][kKeys];
  Vector norms[kNorms][kKeys];
  unrolled<kKeys>([&](auto k) CLARA_FAST_INLINE {
    unrolled<kRows>([&](auto r) CLARA_FAST_INLINE { dots[r][k] = P::zero(); });
    unrolled<kNorms>([&](auto m) CLARA_FAST_INLINE { norms[m][k] = P::zero(); });
  });
  const auto step = [&](int64_t i, auto columns) CLARA_FAST_INLINE {
    decltype(P::load(keys[0], columns)) loaded[kKeys];
    unrolled<kKeys>([&](auto k) CLARA_FAST_INLINE {
      loaded[k] = P::load(keys[k] + i * kSize, columns);
      unrolled<kNorms>([&](auto m) CLARA_FAST_INLINE { norms[m][k] = P::norm(m, loaded[k], norms[m][k]); });
    });
    // Each load of a row serves all keys.
    unrolled<kRows>([&](auto r) CLARA_FAST_INLINE {
      unrolled<kKeys>([&](auto k) CLARA_FAST_INLINE {
        dots[r][k] = P::dot(loaded[k], rows[r] + i * P::kRowBytes, dots[r][k]);
      });
    });
  };
  int64_t i = begin;
  for (; i + P::kStep <= end; i += P::kStep) step(i, Whole{});
  if (i < end) step(i, Rest{end - i});
  const auto add_to = [&](Vector& total, Vector part)
                          CLARA_FAST_INLINE { total = begin == 0 ? part : P::add(total, part); };
  unrolled<kKeys>([&](auto k) CLARA_FAST_INLINE {
    unrolled<kRows>([&](auto r) CLARA_FAST_INLINE { add_to(totals[r][at + k], dots[r][k]); });
    unrolled<kNorms>([&](auto m) CLARA_FAST_INLINE { add_to(totals[kRows + m][at + k], norms[m][k]); });
  });
}

template <class P, int kRows>
void stream_rows(const StreamedKeys& keys, int64_t n, const void* const* rows, int64_t num_rows,
                 void* const* outs, KeySums sums) {
  constexpr int kKeys = keys_together<P, kRows>;
  const char* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = static_cast<const char*>(rows[r < num_rows ? r : 0]);
  const char* next[kStreams];
  for (int64_t s = 0; s < kStreams; ++s) next[s] = static_cast<const char*>(keys.first) + s * keys.apart;
  for (int64_t j = 0; j < keys.counts[0]; ++j) {
    const char* key[kStreams];
    for (int64_t s = 0; s < kStreams; ++s) {
      key[s] = j < keys.counts[s] ? next[s] : key[0];
      next[s] += keys.stride;
    }
    typename P::Vector totals[kRows + P::kNorms][kStreams];
    for (int64_t begin = 0; begin < n; begin += columns_at_a_time<P, kRows>) {
      for (int64_t s = 0; s < kStreams; s += kKeys) {
        stream_keys<P, kRows, kKeys>(key + s, begin, n, row, totals, s);
      }
    }
    const int64_t place = j * kStreams;
    for (int r = 0; r < kRows && r < num_rows; ++r) {
      P::sums(totals[r], static_cast<typename P::Sum*>(outs[r]) + place);
    }
    P::store_norms(totals + kRows,
                   {sums.squares + place, sums.sums == nullptr ? nullptr : sums.sums + place});
  }
}

}  // namespace
}  // namespace clara_fast::cpu
