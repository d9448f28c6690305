// The Python module clara_fast._native: build facts, CPU features and sequence packing. Host only, no
// tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "build_config.h"
#include "cpu_features.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = CLARA_FAST_VERSION;
  info["compiler"] = CLARA_FAST_COMPILER;
  info["cxx_flags"] = CLARA_FAST_CXX_FLAGS;
  info["build_type"] = CLARA_FAST_BUILD_TYPE;
  info["processor"] = CLARA_FAST_PROCESSOR;
  info["torch_target"] = CLARA_FAST_TORCH_TARGET;
  info["cpu"] = CLARA_FAST_WITH_CPU != 0;
  info["cuda"] = CLARA_FAST_WITH_CUDA != 0;
  info["cuda_version"] = py::none();
  info["cuda_architectures"] = py::list();
  if (CLARA_FAST_WITH_CUDA) {
    info["cuda_version"] = CLARA_FAST_CUDA_VERSION;
    info["cuda_architectures"] = py::str(CLARA_FAST_CUDA_ARCHITECTURES).attr("split")(";");
  }
  return info;
}

py::dict cpu_features() {
  const clara_fast::CpuFeatures& found = clara_fast::cpu_features();
  py::dict features;
  features["avx2"] = found.avx2;
  features["fma"] = found.fma;
  features["f16c"] = found.f16c;
  features["avx512f"] = found.avx512f;
  features["avx512_bf16"] = found.avx512_bf16;
  features["avx512_vnni"] = found.avx512_vnni;
  features["avx512vbmi"] = found.avx512vbmi;
  features["amx_bf16"] = found.amx_bf16;
  features["amx_int8"] = found.amx_int8;
  return features;
}

using Lengths = py::array_t<int64_t, py::array::c_style>;

// Fills one batch after the other in order of falling length, so that similar lengths sit together. Equal
// lengths keep their order, so the result depends on the lengths alone.
std::vector<std::vector<int64_t>> pack_sequences(const Lengths& lengths, int64_t max_tokens) {
  if (lengths.ndim() != 1) {
    throw py::value_error("lengths must have 1 dimension, not " + std::to_string(lengths.ndim()));
  }
  if (max_tokens < 1) {
    throw py::value_error("max_tokens (" + std::to_string(max_tokens) + ") must be at least 1");
  }
  const int64_t count = lengths.shape(0);
  const int64_t* length = lengths.data();
  for (int64_t i = 0; i < count; ++i) {
    if (length[i] < 0) {
      throw py::value_error("lengths[" + std::to_string(i) + "] (" + std::to_string(length[i]) +
                            ") must be at least 0");
    }
  }

  py::gil_scoped_release release;
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });

  std::vector<std::vector<int64_t>> batches;
  int64_t room = -1;
  for (const int64_t index : order) {
    if (batches.empty() || length[index] > room) {
      batches.emplace_back();
      room = max_tokens;
    }
    batches.back().push_back(index);
    room -= length[index];
  }
  return batches;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build facts, CPU features and sequence packing.";
  m.def("build_info", &build_info, "What this build was made of.");
  m.def("cpu_features", &cpu_features, "The instruction sets of this processor that a kernel may choose.");
  m.def("pack_sequences", &pack_sequences, py::arg("lengths"), py::arg("max_tokens"),
        "Group sequence indices, longest first, into batches of at most max_tokens tokens.\n\n"
        "Every index appears exactly once; a sequence longer than max_tokens gets a batch of its own.");
}
