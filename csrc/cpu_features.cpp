#include "cpu_features.h"

namespace clara_fast {
namespace {

CpuFeatures detect() {
  CpuFeatures found{};
#if defined(__x86_64__)
  __builtin_cpu_init();
  found.avx2 = __builtin_cpu_supports("avx2");
  found.fma = __builtin_cpu_supports("fma");
  found.f16c = __builtin_cpu_supports("f16c");
  found.avx512f = __builtin_cpu_supports("avx512f");
  found.avx512bw = __builtin_cpu_supports("avx512bw");
  found.avx512dq = __builtin_cpu_supports("avx512dq");
  found.avx512vl = __builtin_cpu_supports("avx512vl");
  found.avx512_bf16 = __builtin_cpu_supports("avx512bf16");
  found.avx512_vnni = __builtin_cpu_supports("avx512vnni");
  found.avx512vbmi = __builtin_cpu_supports("avx512vbmi");
  found.amx_bf16 = __builtin_cpu_supports("amx-bf16");
  found.amx_int8 = __builtin_cpu_supports("amx-int8");
#endif
  return found;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace clara_fast
