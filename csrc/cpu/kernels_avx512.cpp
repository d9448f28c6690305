// The loops are written over the Vec of the header before it.
// clang-format off
#include "vec_avx512.h"
#include "row_kernels.h"
#include "float_search.h"
// clang-format on

namespace clara_fast::cpu {

const Kernels kAvx512Kernels = make_kernels("avx512");
const SearchKernels kAvx512Search = make_search_kernels();

}  // namespace clara_fast::cpu
