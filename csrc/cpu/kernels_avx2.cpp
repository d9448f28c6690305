// row_kernels.h is written over the Vec of the header before it.
// clang-format off
#include "vec_avx2.h"
#include "row_kernels.h"
// clang-format on

namespace clara_fast::cpu {

const Kernels kAvx2Kernels = make_kernels("avx2");

}  // namespace clara_fast::cpu
