// attention_loops.h is written over the Vec of the header before it.
// clang-format off
#include "attention_vec_avx2.h"
#include "attention_loops.h"
// clang-format on

namespace clara_fast::cpu {

const AttentionKernels kAvx2Attention = {
    "avx2", {make_loops<float, Floats>(), make_loops<bf16, Floats>(), make_loops<f16, Floats>()}};

}  // namespace clara_fast::cpu
