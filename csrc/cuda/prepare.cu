#include "launch.h"
#include "prepare.cuh"

namespace clara_fast::cuda {

bool has_image() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, prepare_queries_kernel) == cudaSuccess;
  cudaGetLastError();  // an answer, not an error to report later
  return found;
}

void launch_prepare(const PrepareParams& params, cudaStream_t stream) {
  prepare_queries_kernel<<<static_cast<unsigned>(params.padded_queries), kPrepareThreads, kPrepareShared,
                           stream>>>(params);
}

}  // namespace clara_fast::cuda
