// The instruction sets that a kernel here may choose, as this processor and its operating system offer them.
#pragma once

namespace clara_fast {

struct CpuFeatures {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512dq, avx512vl, avx512_bf16, avx512_vnni, avx512vbmi, amx_bf16,
      amx_int8;
};

const CpuFeatures& cpu_features();

}  // namespace clara_fast
