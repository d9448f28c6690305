// How loops run over columns and registers.
#pragma once

#include <stdint.h>

namespace clara_fast::cpu {
namespace {

// Which columns a step covers: a whole vector, or the last `count` of a row.
struct Whole {};
struct Rest {
  int64_t count;
};

// step(0), step(1), ... with constants: arrays of vectors so indexed become registers, which loops do not
// ensure.
template <int kValue>
struct Constant {
  constexpr operator int() const { return kValue; }
};
#define CLARA_FAST_INLINE __attribute__((always_inline))
template <int kCount, int kBegin = 0, class Step>
CLARA_FAST_INLINE inline void unrolled(const Step& step) {
  if constexpr (kBegin < kCount) {
    step(Constant<kBegin>{});
    unrolled<kCount, kBegin + 1>(step);
  }
}

}  // namespace
}  // namespace clara_fast::cpu
