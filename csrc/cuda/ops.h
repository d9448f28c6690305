// The CUDA kernels as operators of torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace clara_fast::cuda {

using torch::stable::Tensor;

// Whether this library holds machine code for the device of `probe`.
bool cuda_has_image(Tensor probe);

// The bytes of memory that cosine_topk_out works in for such arguments, on their device.
int64_t cosine_topk_workspace(Tensor queries, Tensor keys, int64_t k);

// Nothing is allocated and nothing waits for the device, so that a CUDA graph can record it.
void cosine_topk_out(Tensor queries, Tensor keys, int64_t k, std::optional<Tensor> key_scales, Tensor scores,
                     Tensor indices, Tensor workspace);

std::tuple<Tensor, Tensor> cosine_topk(Tensor queries, Tensor keys, int64_t k,
                                       std::optional<Tensor> key_scales);

}  // namespace clara_fast::cuda
