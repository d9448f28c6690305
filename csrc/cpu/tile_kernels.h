// Products of a block of keys with panels of queries, written once over a Product: how a group of a key,
// broadcast, meets a vector of a panel. Included after a vec_*.h or in a file of its own instruction set.
#pragma once

#include "columns.h"
#include "search_kernels.h"

namespace clara_fast::cpu {
namespace {

// kKeys keys and kPanels panels whose sums stay in registers. Each lane adds up its groups one after the
// other, whatever the shape of the tile.
template <class P, int kKeys, int kPanels>
inline void tile_part(const char* keys, int64_t stride, const char* panels, int64_t panel_stride,
                      int64_t groups, char* sums, bool first) {
  using Vector = typename P::Vector;
  constexpr int kParts = P::kVectorsPerPanel;
  constexpr int kVectors = kPanels * kParts;
  constexpr int64_t kPanelSums = kKeyBlock * kLanes * 4;
  Vector total[kKeys][kVectors];
  const auto each = [&](auto step) CLARA_FAST_INLINE {
    unrolled<kKeys>(
        [&](auto k) CLARA_FAST_INLINE { unrolled<kVectors>([&](auto v) CLARA_FAST_INLINE { step(k, v); }); });
  };
  each([&](auto k, auto v) CLARA_FAST_INLINE { total[k][v] = P::zero(); });
  for (int64_t g = 0; g < groups; ++g) {
    Vector query[kVectors];
    unrolled<kVectors>([&](auto v) CLARA_FAST_INLINE {
      query[v] =
          P::load(panels + v / kParts * panel_stride + g * kLanes * 4 + v % kParts * int64_t{sizeof(Vector)});
    });
    unrolled<kKeys>([&](auto k) CLARA_FAST_INLINE {
      const auto broadcast = P::broadcast(keys + k * stride + g * 4);
      unrolled<kVectors>(
          [&](auto v) CLARA_FAST_INLINE { total[k][v] = P::multiply_add(broadcast, query[v], total[k][v]); });
    });
  }
  each([&](auto k, auto v) CLARA_FAST_INLINE {
    char* sum = sums + v / kParts * kPanelSums + k * kLanes * 4 + v % kParts * int64_t{sizeof(Vector)};
    P::store(sum, first ? total[k][v] : P::add(total[k][v], P::load(sum)));
  });
}

template <class P, int kPanels>
inline void tile_panels(const char* keys, int64_t stride, const char* panels, int64_t panel_stride,
                        int64_t groups, char* sums, bool first) {
  constexpr int kKeys =
      P::kSums / (kPanels * P::kVectorsPerPanel) < 12 ? P::kSums / (kPanels * P::kVectorsPerPanel) : 12;
  static_assert(kKeyBlock % kKeys == 0);
  for (int64_t k = 0; k < kKeyBlock; k += kKeys) {
    tile_part<P, kKeys, kPanels>(keys + k * stride, stride, panels, panel_stride, groups,
                                 sums + k * kLanes * 4, first);
  }
}

template <class P>
void tile(const void* keys, int64_t stride, const void* panels, int64_t panel_stride, int64_t num_panels,
          int64_t groups, void* sums, bool first) {
  const char* key = static_cast<const char*>(keys);
  const char* panel = static_cast<const char*>(panels);
  char* sum = static_cast<char*>(sums);
  for (int64_t p = 0; p < num_panels;) {
    const int64_t left = num_panels - p;
    const char* from = panel + p * panel_stride;
    char* to = sum + p * kKeyBlock * kLanes * 4;
    if (P::kPanels >= 4 && left >= 4) {
      tile_panels<P, P::kPanels >= 4 ? 4 : 1>(key, stride, from, panel_stride, groups, to, first);
      p += 4;
    } else if (P::kPanels >= 2 && left >= 2) {
      tile_panels<P, P::kPanels >= 2 ? 2 : 1>(key, stride, from, panel_stride, groups, to, first);
      p += 2;
    } else {
      tile_panels<P, 1>(key, stride, from, panel_stride, groups, to, first);
      p += 1;
    }
  }
}

}  // namespace
}  // namespace clara_fast::cpu
