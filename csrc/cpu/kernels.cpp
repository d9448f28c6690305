#include "kernels.h"

#include <cstdlib>
#include <cstring>

#include "cpu_features.h"

namespace clara_fast::cpu {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const CpuFeatures& has = cpu_features();
  const bool avx2 = has.avx2 && has.fma && has.f16c;
  const bool avx512 = avx2 && has.avx512f && has.avx512bw && has.avx512dq && has.avx512vl;
  const char* asked = std::getenv("CLARA_FAST_CPU_ISA");
  const bool at_most_generic = asked != nullptr && std::strcmp(asked, "generic") == 0;
  const bool at_most_avx2 = at_most_generic || (asked != nullptr && std::strcmp(asked, "avx2") == 0);
  if (avx512 && !at_most_avx2) return kAvx512Kernels;
  if (avx2 && !at_most_generic) return kAvx2Kernels;
#endif
  return kGenericKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace clara_fast::cpu
