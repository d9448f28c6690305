// cosine_topk on CUDA devices: checks, memory and launches.
#include <torch/csrc/stable/accelerator.h>

#include "launch.h"
#include "ops.h"

namespace clara_fast::cuda {

bool cuda_has_image(Tensor probe) {
  const torch::stable::accelerator::DeviceGuard guard(probe.get_device_index());
  return has_image();
}

}  // namespace clara_fast::cuda
