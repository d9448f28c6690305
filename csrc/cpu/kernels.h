// The inner loops of the CPU ops, one table per instruction set.
//
// This header is all that the per-instruction-set files share with the rest: no standard or torch header,
// whose inline functions could carry AVX-512 code into a program that runs on an older processor.
#pragma once

#include <stdint.h>

namespace clara_fast::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct f8e4m3 {
  uint8_t bits;
};

// Rows are padded with zeros to a multiple of kPad where `block_dots` reads them.
constexpr int64_t kPad = 16;
// Dot products are summed over chunks of so many columns: short float32 sums, and tiles that stay in the L1
// cache.
constexpr int64_t kChunk = 1024;
// Keys that `dots` takes at a time.
constexpr int64_t kTileKeys = 4;
// Loops over rows of n elements of one storage type. Everything is computed in float32.
//
// `dots` and `block_dots` add up each (key, query) pair in an order that depends on n alone, so equal rows
// have equal scores wherever they stand and however the work is split.
struct RowKernels {
  // float32 copy, zeros up to `padded`; returns the sum of squares.
  float (*widen)(const void* row, int64_t n, int64_t padded, float* out);
  // dots[j] of the query with key j, and squares[j], for kTileKeys keys.
  void (*dots)(const void* const* keys, const float* query, int64_t n, float* dots, float* squares);

  // The rest exists for float32, bfloat16 and float16 only.
  float (*square_sum)(const void* row, int64_t n);
  void (*narrow)(const float* row, int64_t n, void* out);
  // acc += the sum of `count` rows that lie next to each other.
  void (*sum_rows)(const void* rows, int64_t count, int64_t n, float* acc);
  // acc += the sum of `count` rows after RMSNorm with row scales `scale` and `weight`, each rounded to
  // storage.
  void (*sum_normed_rows)(const void* rows, int64_t count, int64_t n, const float* scale, const float* weight,
                          float* acc);
  // RMSNorm of one row, in storage.
  void (*norm_row)(const void* row, int64_t n, float scale, const float* weight, void* out);
  // sum of row * grad * weight.
  float (*weighted_dot)(const void* row, int64_t n, const float* grad, const float* weight);
  // RMSNorm's backward on one row: out = scale * weight * grad - pull * row; grad_weight += grad * scale *
  // row.
  void (*norm_row_grad)(const void* row, int64_t n, const float* grad, const float* weight, float scale,
                        float pull, void* out, float* grad_weight);
  // out = row + factor * other.
  void (*add_scaled)(const void* row, int64_t n, float factor, const float* other, void* out);
  // The cosine's backward on one key: grad_query += query_factor * key; out = key_factor * (unit * query -
  // pull * key).
  void (*cosine_grad)(const void* key, const float* query, int64_t n, float query_factor, float key_factor,
                      float unit, float pull, float* grad_query, void* out);
};

enum class Storage { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8, kCount };

struct Kernels {
  const char* name;
  RowKernels rows[static_cast<int>(Storage::kCount)];
  // scores[q * score_stride + j] += dot of query q and key j over n columns, n a multiple of kPad.
  void (*block_dots)(const float* keys, int64_t key_stride, int64_t num_keys, const float* queries,
                     int64_t query_stride, int64_t num_queries, int64_t n, float* scores,
                     int64_t score_stride);

  const RowKernels& operator[](Storage storage) const { return rows[static_cast<int>(storage)]; }
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The table for this processor. CLARA_FAST_CPU_ISA=generic|avx2|avx512|avx512_bf16|amx asks for one of
// those that it offers.
const Kernels& kernels();

}  // namespace clara_fast::cpu
