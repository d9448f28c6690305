// The loops are written over the Vec of the header before it.
// clang-format off
#include "vec_generic.h"
#include "row_kernels.h"
#include "float_search.h"
// clang-format on

namespace clara_fast::cpu {

const Kernels kGenericKernels = make_kernels("generic");
const SearchKernels kGenericSearch = make_search_kernels();

}  // namespace clara_fast::cpu
