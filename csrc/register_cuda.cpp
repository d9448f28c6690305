// Gives the schemas that python/clara_fast/ops/_library.py defines their CUDA kernels.
#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(clara_fast_native, CUDA, m) {
  m.impl("cuda_has_image", TORCH_BOX(&clara_fast::cuda::cuda_has_image));
  m.impl("cosine_topk", TORCH_BOX(&clara_fast::cuda::cosine_topk));
  m.impl("cosine_topk_out", TORCH_BOX(&clara_fast::cuda::cosine_topk_out));
  m.impl("cosine_topk_workspace", TORCH_BOX(&clara_fast::cuda::cosine_topk_workspace));
}
