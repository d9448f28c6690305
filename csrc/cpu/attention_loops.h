// The loops behind an attention table. A per-instruction-set file includes its attention_vec_*.h, then this.
// All of it has internal linkage, so that each file keeps its own compiled copy.
#pragma once

#include "attention_backward_loops.h"
#include "attention_few_loops.h"
#include "attention_forward_loops.h"

namespace clara_fast::cpu {
namespace {

template <class T, class Unit>
constexpr AttentionLoops make_loops() {
  return {&forward<T, Unit>, &forward_few<T>, &merge<T>, &backward<T, Unit>, &add_up<T>};
}

}  // namespace
}  // namespace clara_fast::cpu
