// The launch of the search, for one type of keys; search_*.cu instantiates it, a file for each, to build side
// by side.
#pragma once

#include "launch.h"
#include "search.cuh"

namespace clara_fast::cuda {

template <Type kType>
void launch_search(const SearchParams& params, const Plan& plan, cudaStream_t stream) {
  const auto kernel = plan.queries_per_tile == 8    ? search_kernel<kType, 8>
                      : plan.queries_per_tile == 32 ? search_kernel<kType, 32>
                                                    : search_kernel<kType, 64>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(plan.shared_bytes));
  const dim3 grid(static_cast<unsigned>(plan.query_tiles), static_cast<unsigned>(plan.parts));
  kernel<<<grid, kSearchThreads, plan.shared_bytes, stream>>>(params);
}

}  // namespace clara_fast::cuda
