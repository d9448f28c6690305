// The kernels as the host sees them; each is defined beside its kernel, in a .cu file.
#pragma once

#include <cuda_runtime_api.h>

#include "search.h"

namespace clara_fast::cuda {

// Whether this library holds machine code for the current device.
bool has_image();

void launch_prepare(const PrepareParams& params, cudaStream_t stream);

}  // namespace clara_fast::cuda
