// The loops are written over the Vec of the header before it.
// clang-format off
#include "vec_avx2.h"
#include "row_kernels.h"
#include "float_search.h"
// clang-format on

namespace clara_fast::cpu {

const Kernels kAvx2Kernels = make_kernels("avx2");
const SearchKernels kAvx2Search = make_search_kernels();

}  // namespace clara_fast::cpu
