// The few things that the kernels ask of the hardware. The tests replace this file by one that runs blocks on
// a CPU (tests/cuda_on_host), so nothing else here may use inline assembly or threads' cooperation other than
// by these.
#pragma once

#ifdef CLARA_FAST_CUDA_ON_HOST
#include "cuda_on_host.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace clara_fast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, which the compiler does not know: what it serves for is not computed ahead and held in
// registers.
__device__ __forceinline__ float unknown(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

// Copies `bytes` (0 to 16) to shared memory without waiting, past the L1 cache, and fills the rest of the 16
// with zeros. Both ends must be aligned to 16.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes));
}

// The same for 4 bytes.
__device__ __forceinline__ void copy_async_4(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until at most `kPending` groups of this thread's copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r names row r of matrix i, and gets elements 2 (lane %
// 4) and the next of row lane / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a 16 x 16 and b 16 x 8, of float16 or bfloat16, in float32. With g = lane / 4 and t = lane %
// 4: a[0] holds row g, columns 2t and 2t + 1; a[1] row g + 8; a[2], a[3] the same 8 columns later; b[0] holds
// rows 2t and 2t + 1 of column g; b[1] 8 rows later; d[0], d[1] row g, columns 2t and 2t + 1; d[2], d[3] row
// g + 8.
struct Float16 {};
struct BFloat16 {};
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Bits to float32 and, rounding to the nearest, back.
__device__ __forceinline__ float to_float(uint16_t bits, Float16) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ float to_float(uint16_t bits, BFloat16) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ uint16_t from_float(float value, Float16) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint16_t from_float(float value, BFloat16) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// Two at once, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t subtract_float16(uint32_t a, uint32_t b) {
  uint32_t bits;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(bits) : "r"(a), "r"(b));
  return bits;
}

}  // namespace clara_fast::cuda

#endif
