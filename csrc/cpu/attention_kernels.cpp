#include "attention_kernels.h"

#include <cstdlib>
#include <cstring>

#include "cpu_features.h"

namespace clara_fast::cpu {
namespace {

const AttentionKernels& choose() {
#if defined(__x86_64__)
  const CpuFeatures& has = cpu_features();
  const char* asked = std::getenv("CLARA_FAST_CPU_ISA");
  const auto is = [asked](const char* name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
  const bool avx2 = has.avx2 && has.fma && has.f16c && !is("generic");
  const bool avx512 = avx2 && has.avx512f && has.avx512bw && has.avx512dq && has.avx512vl && !is("avx2");
  if (avx512 && has.avx512_bf16 && !is("avx512")) return kAvx512Bf16Attention;
  if (avx512) return kAvx512Attention;
  if (avx2) return kAvx2Attention;
#endif
  return kGenericAttention;
}

}  // namespace

const AttentionKernels& attention_kernels() {
  static const AttentionKernels& chosen = choose();
  return chosen;
}

}  // namespace clara_fast::cpu
