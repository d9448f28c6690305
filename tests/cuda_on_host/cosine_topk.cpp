// Runs the kernels of cosine_topk on one problem read from standard input, as csrc/cuda/cosine_topk.cpp would
// on a GPU. In: the numbers of Header, then queries, keys and scales. Out: bank conflicts, the plan, scores,
// indices.
#include "merge.cuh"
#include "plan.h"
#include "prepare.cuh"
#include "search.cuh"

namespace {

using namespace clara_fast::cuda;

struct Header {
  int64_t query_type, key_type, num_queries, num_keys, columns, k, has_scales, seed;
  int64_t multiprocessors, shared_per_multiprocessor;
};

struct Layout {
  int64_t queries_per_tile, query_tiles, parts, shared_bytes, merge_shared_bytes, candidates_in_shared,
      workspace_bytes;
};

void read_all(void* to, size_t bytes) {
  host::require(bytes == 0 || std::fread(to, 1, bytes, stdin) == bytes, "the input is too short");
}

void write_all(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

Plan plan_of(const Header& header) {
  const Device device{header.multiprocessors, header.shared_per_multiprocessor};
  return make_plan(device, static_cast<Type>(header.query_type), static_cast<Type>(header.key_type),
                   header.num_queries, header.num_keys, header.columns, header.k);
}

void print_plans() {
  for (Header header; std::fread(&header, sizeof(header), 1, stdin) == 1;) {
    const Plan plan = plan_of(header);
    const Layout layout{plan.queries_per_tile,
                        plan.query_tiles,
                        plan.parts,
                        plan.shared_bytes,
                        merge_shared_bytes(plan.capacity),
                        plan.candidates_in_shared,
                        plan.workspace_bytes};
    write_all(&layout, sizeof(layout));
  }
}

template <Type kType>
void search(const SearchParams& params, const Plan& plan) {
  const auto kernel = plan.queries_per_tile == 8    ? search_kernel<kType, 8>
                      : plan.queries_per_tile == 32 ? search_kernel<kType, 32>
                                                    : search_kernel<kType, 64>;
  const Dimension grid{static_cast<unsigned>(plan.query_tiles), static_cast<unsigned>(plan.parts)};
  host::launch(kernel, grid, kSearchThreads, plan.shared_bytes, params);
}

}  // namespace

int main(int count, char**) {
  if (count > 1) {
    print_plans();
    return 0;
  }
  Header header;
  read_all(&header, sizeof(header));
  host::random_state = 0x9e3779b97f4a7c15u + header.seed;
  Problem problem{};
  problem.query_type = static_cast<Type>(header.query_type);
  problem.key_type = static_cast<Type>(header.key_type);
  problem.num_queries = header.num_queries;
  problem.num_keys = header.num_keys;
  problem.columns = header.columns;
  problem.k = static_cast<int>(header.k);
  const size_t query_bytes = header.num_queries * header.columns * element_bytes(problem.query_type);
  const size_t key_bytes = header.num_keys * header.columns * element_bytes(problem.key_type);
  host::Guarded queries(query_bytes), keys(key_bytes), scales(header.num_keys * 4);
  read_all(queries.data, query_bytes);
  read_all(keys.data, key_bytes);
  if (header.has_scales) read_all(scales.data, header.num_keys * 4);
  problem.queries = queries.data;
  problem.keys = keys.data;
  problem.key_scales = header.has_scales ? reinterpret_cast<float*>(scales.data) : nullptr;

  const Plan plan = plan_of(header);
  host::Guarded workspace(plan.workspace_bytes);
  host::Guarded scores(problem.num_queries * header.k * 4), indices(problem.num_queries * header.k * 8);
  const SearchParams params = search_params(problem, plan, workspace.data);
  host::launch(prepare_queries_kernel, {static_cast<unsigned>(plan.padded_queries), 1}, kPrepareThreads,
               kPrepareShared, params.queries);
  switch (problem.key_type) {
    case Type::kFloat32:
      search<Type::kFloat32>(params, plan);
      break;
    case Type::kBFloat16:
      search<Type::kBFloat16>(params, plan);
      break;
    case Type::kFloat16:
      search<Type::kFloat16>(params, plan);
      break;
    case Type::kInt8:
      search<Type::kInt8>(params, plan);
      break;
    case Type::kFloat8:
      search<Type::kFloat8>(params, plan);
      break;
  }
  host::launch(merge_lists_kernel, {static_cast<unsigned>(problem.num_queries), 1},
               static_cast<unsigned>(plan.merge_threads), merge_shared_bytes(plan.capacity),
               merge_params(problem, plan, params, reinterpret_cast<float*>(scores.data),
                            reinterpret_cast<int64_t*>(indices.data)));

  const int64_t facts[] = {host::bank_conflicts, plan.queries_per_tile, plan.parts, plan.candidates_in_shared,
                           params.copy_bytes};
  write_all(facts, sizeof(facts));
  write_all(scores.data, problem.num_queries * header.k * 4);
  write_all(indices.data, problem.num_queries * header.k * 8);
}
