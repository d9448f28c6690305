// row_kernels.h is written over the Vec of the header before it.
// clang-format off
#include "vec_generic.h"
#include "row_kernels.h"
// clang-format on

namespace clara_fast::cpu {

const Kernels kGenericKernels = make_kernels("generic");

}  // namespace clara_fast::cpu
