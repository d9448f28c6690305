// What the ops share: the stable-ABI tensor, its storage type, cheap checks and the splitting of work.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>

#include "kernels.h"

namespace clara_fast::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t element_size(Storage storage) {
  switch (storage) {
    case Storage::kFloat32:
      return 4;
    case Storage::kBFloat16:
    case Storage::kFloat16:
      return 2;
    default:
      return 1;
  }
}

// The storage type of a tensor that must hold float32, bfloat16 or float16 (also int8 or float8 where
// `quantised`).
inline Storage storage_of(const Tensor& tensor, const char* name, bool quantised = false) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Storage::kFloat32;
  if (type == ScalarType::BFloat16) return Storage::kBFloat16;
  if (type == ScalarType::Half) return Storage::kFloat16;
  if (quantised && type == ScalarType::Char) return Storage::kInt8;
  if (quantised && type == ScalarType::Float8_e4m3fn) return Storage::kFloat8;
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16",
                  quantised ? ", int8 or float8_e4m3fn" : "", ", not ScalarType ", static_cast<int>(type));
  return Storage::kCount;
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    fits = fits && tensor.size(dim) == size;
    ++dim;
  }
  STD_TORCH_CHECK(fits, name, " has a shape that does not fit the other arguments");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_type(const Tensor& tensor, const char* name, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must have ScalarType ", static_cast<int>(type),
                  ", not ", static_cast<int>(tensor.scalar_type()));
}

// The rows of a contiguous tensor, in whatever type it stores.
struct Rows {
  const char* data;
  int64_t stride;  // in bytes

  Rows(const Tensor& tensor, Storage storage, int64_t columns)
      : data(static_cast<const char*>(tensor.const_data_ptr())), stride(columns * element_size(storage)) {}
  const void* operator[](int64_t row) const { return data + row * stride; }
};

struct MutableRows {
  char* data;
  int64_t stride;  // in bytes

  MutableRows(const Tensor& tensor, Storage storage, int64_t columns)
      : data(static_cast<char*>(tensor.mutable_data_ptr())), stride(columns * element_size(storage)) {}
  void* operator[](int64_t row) const { return data + row * stride; }
};

// An uninitialised output in the type of `like`. Where it is large its memory is fresh from the system, which
// hands it over page by page as it is first written: at 4 KiB a page that costs more than the writing, so
// larger pages are asked for. A hint, which the system may ignore.
template <class Sizes>
Tensor new_large(const Tensor& like, const Sizes& sizes) {
  Tensor tensor = torch::stable::new_empty(like, sizes);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where part `part` of `parts` begins when `count` items are dealt out evenly.
inline int64_t part_begin(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

// Lets the pages under a tensor go from this process: only for what is mapped from a file, where they come
// back when they are touched. On other systems than Linux the call has other meanings, or none.
inline void release_pages(const Tensor& mapped) {
#if defined(__linux__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(mapped.numel()) * mapped.element_size();
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = begin / page * page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
#endif
}

// How many items of so many elements make a thread worth waking.
inline int64_t grain(int64_t elements_per_item) {
  constexpr int64_t kElements = 16384;
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, elements_per_item));
}

}  // namespace clara_fast::cpu
