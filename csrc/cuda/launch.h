// The kernels as the host sees them; each is defined beside its kernel, in a .cu file.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"
#include "search.h"

namespace clara_fast::cuda {

// Whether this library holds machine code for the current device.
bool has_image();

void launch_prepare(const PrepareParams& params, cudaStream_t stream);
template <Type kType>
void launch_search(const SearchParams& params, const Plan& plan, cudaStream_t stream);
void launch_merge(const MergeParams& params, const Plan& plan, cudaStream_t stream);

}  // namespace clara_fast::cuda
