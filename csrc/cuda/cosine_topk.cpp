// cosine_topk on CUDA devices: checks, memory and launches.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <mutex>

#include "launch.h"
#include "ops.h"

namespace clara_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

Type type_of(const Tensor& tensor, const char* name, bool quantised) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Type::kFloat32;
  if (type == ScalarType::BFloat16) return Type::kBFloat16;
  if (type == ScalarType::Half) return Type::kFloat16;
  if (quantised && type == ScalarType::Char) return Type::kInt8;
  if (quantised && type == ScalarType::Float8_e4m3fn) return Type::kFloat8;
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16",
                  quantised ? ", int8 or float8_e4m3fn" : "", ", not ScalarType ", static_cast<int>(type));
  return Type::kFloat32;
}

void check(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> shape,
           const Tensor& queries) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must have ScalarType ", static_cast<int>(type),
                  ", not ", static_cast<int>(tensor.scalar_type()));
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) fits = fits && tensor.size(dim++) == size;
  STD_TORCH_CHECK(fits, name, " has a shape that does not fit the other arguments");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == queries.get_device_index(), name,
                  " must be on the device of queries");
}

Problem checked_problem(const Tensor& queries, const Tensor& keys, int64_t k,
                        const std::optional<Tensor>& key_scales) {
  Problem problem{};
  problem.query_type = type_of(queries, "queries", false);
  problem.key_type = type_of(keys, "keys", true);
  STD_TORCH_CHECK(queries.dim() == 2, "queries must have 2 dimensions, not ", queries.dim());
  STD_TORCH_CHECK(keys.dim() == 2, "keys must have 2 dimensions, not ", keys.dim());
  problem.num_queries = queries.size(0);
  problem.num_keys = keys.size(0);
  problem.columns = queries.size(1);
  check(queries, "queries", queries.scalar_type(), {problem.num_queries, problem.columns}, queries);
  check(keys, "keys", keys.scalar_type(), {problem.num_keys, problem.columns}, queries);
  STD_TORCH_CHECK(problem.columns > 0, "queries must have at least 1 column");
  STD_TORCH_CHECK(k >= 0 && k <= problem.num_keys, "k (", k,
                  ") must be at least 0 and at most the number of keys (", problem.num_keys, ")");
  STD_TORCH_CHECK(k <= kMaxK, "k (", k, ") must be at most ", kMaxK, " on CUDA devices");
  constexpr int64_t kMaxKeys = 0xffffffff;  // their numbers take 32 bits, and one is never used
  STD_TORCH_CHECK(problem.num_keys <= kMaxKeys, "the number of keys (", problem.num_keys,
                  ") must be at most ", kMaxKeys, " on CUDA devices");
  if (key_scales.has_value()) {
    check(*key_scales, "key_scales", ScalarType::Float, {problem.num_keys}, queries);
    problem.key_scales = static_cast<const float*>(key_scales->const_data_ptr());
  }
  problem.queries = queries.const_data_ptr();
  problem.keys = keys.const_data_ptr();
  problem.k = static_cast<int>(k);
  return problem;
}

// What is asked of the driver once per device.
const Device& facts_of(int index) {
  constexpr int kMaxDevices = 128;
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> asked;
  STD_TORCH_CHECK(index < kMaxDevices, "the device's index (", index, ") must be below ", kMaxDevices);
  std::call_once(asked[index], [index] {
    int count, shared;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
    devices[index] = {count, shared};
  });
  return devices[index];
}

Plan plan_of(const Problem& problem, int device) {
  return make_plan(facts_of(device), problem.query_type, problem.key_type, problem.num_queries,
                   problem.num_keys, problem.columns, problem.k);
}

bool is_empty(const Problem& problem) { return problem.num_queries == 0 || problem.k == 0; }

void search(const SearchParams& params, const Plan& plan, cudaStream_t stream) {
  switch (params.queries.key_type) {
    case Type::kFloat32:
      return launch_search<Type::kFloat32>(params, plan, stream);
    case Type::kBFloat16:
      return launch_search<Type::kBFloat16>(params, plan, stream);
    case Type::kFloat16:
      return launch_search<Type::kFloat16>(params, plan, stream);
    case Type::kInt8:
      return launch_search<Type::kInt8>(params, plan, stream);
    case Type::kFloat8:
      return launch_search<Type::kFloat8>(params, plan, stream);
  }
}

// The caller holds a DeviceGuard.
void run(const Problem& problem, const Plan& plan, int device, void* workspace, const Tensor& scores,
         const Tensor& indices) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  const SearchParams params = search_params(problem, plan, workspace);
  launch_prepare(params.queries, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  search(params, plan, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  launch_merge(merge_params(problem, plan, params, static_cast<float*>(scores.mutable_data_ptr()),
                            static_cast<int64_t*>(indices.mutable_data_ptr())),
               plan, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

bool cuda_has_image(Tensor probe) {
  const DeviceGuard guard(probe.get_device_index());
  return has_image();
}

int64_t cosine_topk_workspace(Tensor queries, Tensor keys, int64_t k) {
  const Problem problem = checked_problem(queries, keys, k, std::nullopt);
  return is_empty(problem) ? 0 : plan_of(problem, queries.get_device_index()).workspace_bytes;
}

void cosine_topk_out(Tensor queries, Tensor keys, int64_t k, std::optional<Tensor> key_scales, Tensor scores,
                     Tensor indices, Tensor workspace) {
  const Problem problem = checked_problem(queries, keys, k, key_scales);
  check(scores, "scores", ScalarType::Float, {problem.num_queries, k}, queries);
  check(indices, "indices", ScalarType::Long, {problem.num_queries, k}, queries);
  check(workspace, "workspace", ScalarType::Byte, {workspace.numel()}, queries);
  if (is_empty(problem)) return;
  const int device = queries.get_device_index();
  const Plan plan = plan_of(problem, device);
  STD_TORCH_CHECK(workspace.numel() >= plan.workspace_bytes, "workspace (", workspace.numel(),
                  " bytes) must have at least ", plan.workspace_bytes, " bytes: see cosine_topk_workspace");
  void* const memory = workspace.mutable_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(memory) % 16 == 0, "workspace must be aligned to 16 bytes");
  const DeviceGuard guard(device);
  run(problem, plan, device, memory, scores, indices);
}

std::tuple<Tensor, Tensor> cosine_topk(Tensor queries, Tensor keys, int64_t k,
                                       std::optional<Tensor> key_scales) {
  const Problem problem = checked_problem(queries, keys, k, key_scales);
  Tensor scores = torch::stable::new_empty(queries, {problem.num_queries, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(queries, {problem.num_queries, k}, ScalarType::Long);
  if (is_empty(problem)) return {scores, indices};
  const int device = queries.get_device_index();
  const Plan plan = plan_of(problem, device);
  const DeviceGuard guard(device);
  Tensor workspace = torch::stable::new_empty(queries, {plan.workspace_bytes}, ScalarType::Byte);
  run(problem, plan, device, workspace.mutable_data_ptr(), scores, indices);
  return {scores, indices};
}

}  // namespace clara_fast::cuda
