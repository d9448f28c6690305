#include "kernels.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu_features.h"
#include "search_kernels.h"

namespace clara_fast::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool available;
  const Kernels* kernels;
  const SearchKernels* search;
  void (*add)(SearchKernels& search);  // null: `search` as it is
};

struct Choice {
  const Kernels* kernels;
  SearchKernels search;
};

#if defined(__x86_64__)
// Linux lends the tile registers, which are large, to processes that ask.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Choice choose() {
  const char* asked = std::getenv("CLARA_FAST_CPU_ISA");
  const auto is_asked = [&](const char* name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
#if defined(__x86_64__)
  const CpuFeatures& has = cpu_features();
  const bool avx2 = has.avx2 && has.fma && has.f16c;
  const bool avx512 = avx2 && has.avx512f && has.avx512bw && has.avx512dq && has.avx512vl;
  const bool bf16 = avx512 && has.avx512_bf16 && has.avx512_vnni && has.avx512vbmi;
  const bool amx =
      bf16 && has.amx_bf16 && has.amx_int8 && (asked == nullptr || is_asked("amx")) && may_use_tiles();
  const InstructionSet sets[] = {
      {"amx", amx, &kAvx512Kernels, &kAvx512Search, &add_amx},
      {"avx512_bf16", bf16, &kAvx512Kernels, &kAvx512Search, &add_avx512_bf16},
      {"avx512", avx512, &kAvx512Kernels, &kAvx512Search, nullptr},
      {"avx2", avx2, &kAvx2Kernels, &kAvx2Search, nullptr},
      {"generic", true, &kGenericKernels, &kGenericSearch, nullptr},
      {"amx_emulated", bf16, &kAvx512Kernels, &kAvx512Search,
       &add_emulated_amx},  // for tests, where asked for
  };
#else
  const InstructionSet sets[] = {{"generic", true, &kGenericKernels, &kGenericSearch, nullptr}};
#endif
  for (const InstructionSet& set : sets) {
    if (asked != nullptr ? !is_asked(set.name) : !set.available) continue;
    STD_TORCH_CHECK(set.available, "CLARA_FAST_CPU_ISA (", asked,
                    ") must be an instruction set of this processor");
    Choice choice{set.kernels, *set.search};
    if (set.add != nullptr) set.add(choice.search);
    return choice;
  }
  STD_TORCH_CHECK(false, "CLARA_FAST_CPU_ISA (", asked,
                  ") must be generic, avx2, avx512, avx512_bf16, amx or amx_emulated");
  return {};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }

const SearchKernels& search_kernels() { return chosen().search; }

}  // namespace clara_fast::cpu
