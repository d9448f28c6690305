// The CUDA kernels as operators of torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace clara_fast::cuda {

using torch::stable::Tensor;

// Whether this library holds machine code for the device of `probe`.
bool cuda_has_image(Tensor probe);

}  // namespace clara_fast::cuda
