#include "launch.h"
#include "merge.cuh"

namespace clara_fast::cuda {

void launch_merge(const MergeParams& params, const Plan& plan, cudaStream_t stream) {
  merge_lists_kernel<<<static_cast<unsigned>(params.num_queries), plan.merge_threads,
                       merge_shared_bytes(params.capacity), stream>>>(params);
}

}  // namespace clara_fast::cuda
