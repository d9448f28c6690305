// row_kernels.h is written over the Vec of the header before it.
// clang-format off
#include "vec_avx512.h"
#include "row_kernels.h"
// clang-format on

namespace clara_fast::cpu {

const Kernels kAvx512Kernels = make_kernels("avx512");

}  // namespace clara_fast::cpu
