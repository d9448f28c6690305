#include "search_launch.cuh"

namespace clara_fast::cuda {

template void launch_search<Type::kFloat32>(const SearchParams&, const Plan&, cudaStream_t);

}  // namespace clara_fast::cuda
