// The inner loops of compressed_context_attention, one table per instruction set.
//
// Like kernels.h this is all that the per-instruction-set files share with the rest, so it has no standard
// header. Work comes as tasks over one key head; the query heads that share it are further rows, so that
// keys are read once for all of them: row r of a block is position r / groups, head r % groups.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace clara_fast::cpu {

// Rows (positions x groups) and keys of a block, whose scores stay in the cache.
constexpr int64_t kBlockRows = 192;
constexpr int64_t kBlockKeys = 128;
// A block of so few rows takes keys as they lie, as dot products: packing them would cost more.
constexpr int64_t kFewRows = 8;

// Columns of a buffer for n numbers: whole vectors, and an odd number of cache lines, so that the elements of
// a column do not all fall into a few sets of the cache.
constexpr int64_t padded(int64_t n) { return (((n + 15) / 16) | 1) * 16; }

// Position i and head g at data + i * position + g * head, all in bytes.
struct ConstHeads {
  const char* data;
  int64_t position, head;
  const void* at(int64_t i, int64_t g) const { return data + i * position + g * head; }
};
struct Heads {
  char* data;
  int64_t position, head;
  void* at(int64_t i, int64_t g) const { return data + i * position + g * head; }
};

struct KeyRange {
  int64_t start, length;
};

struct AttentionShape {
  int64_t groups, size, value_size;
  float scale;
};

// Some positions of a segment. Its keys are numbered through its ranges; from `own` on they are its own, and
// own key j is seen by position i where j <= i + offset.
struct ForwardTask {
  int64_t positions;
  ConstHeads query, key, value;  // keys have one head
  const KeyRange* ranges;
  int64_t own, offset;
  int64_t first_key, last_key;
  Heads out;
  float* lse;            // null: not asked for
  int64_t lse_position;  // heads lie side by side
  // Where a share of the keys is a task: its sums, as [rows][padded(value_size)], and its two numbers per
  // row; else null.
  float* partial;
};

constexpr int64_t partial_size(const AttentionShape& shape) {
  return kFewRows * (padded(shape.value_size) + 2);
}

// A segment that reads the keys of a backward task.
struct Reader {
  int64_t positions;  // from the first that sees any of these keys
  ConstHeads query, grad_out, out;
  const float* lse;
  const float* grad_lse;  // null: none
  int64_t lse_position;
  int64_t offset;    // key j of the task is seen by position i where j <= i + offset
  Heads grad_query;  // float32 where the gradient is one of several to add up, else in storage
  bool partial;
};

struct BackwardTask {
  int64_t keys;
  ConstHeads key, value;
  Heads grad_key, grad_value;
  const Reader* readers;
  int64_t num_readers;
};

struct AttentionLoops {
  void (*forward)(const AttentionShape& shape, const ForwardTask& task, float* scratch);
  // At most kFewRows rows.
  void (*forward_few)(const AttentionShape& shape, const ForwardTask& task, float* scratch);
  // The result of `task` from the partial sums of its shares.
  void (*merge)(const AttentionShape& shape, const ForwardTask& task, float* partials, int64_t count);
  void (*backward)(const AttentionShape& shape, const BackwardTask& task, float* scratch);
  // out = the sum of `count` rows of `columns` float32 numbers, `stride` numbers apart.
  void (*add_up)(const float* rows, int64_t stride, int64_t count, int64_t columns, void* out);
};

struct AttentionKernels {
  const char* name;
  AttentionLoops loops[3];  // float32, bfloat16, float16
  const AttentionLoops& operator[](Storage storage) const { return loops[static_cast<int>(storage)]; }
};

constexpr int64_t block_rows(int64_t groups) { return groups > kBlockRows ? groups : kBlockRows; }

constexpr int64_t forward_scratch(const AttentionShape& shape) {
  const int64_t rows = padded(block_rows(shape.groups));
  const int64_t size = padded(shape.size);
  const int64_t value_size = padded(shape.value_size);
  return rows * (2 * size + value_size + kBlockKeys + 3) + kBlockKeys * (size + value_size);
}

constexpr int64_t backward_scratch(const AttentionShape& shape, int64_t keys) {
  const int64_t rows = padded(block_rows(shape.groups));
  const int64_t size = padded(shape.size);
  const int64_t value_size = padded(shape.value_size);
  const int64_t all_keys = padded(keys);
  return rows * (4 * size + 5 * value_size + 4 * kBlockKeys + 3) + all_keys * (3 * size + 2 * value_size);
}

extern const AttentionKernels kGenericAttention;
#if defined(__x86_64__)
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512Attention;
// bfloat16 alone differs from AVX-512 without it.
extern const AttentionKernels kAvx512Bf16Attention;
#endif

// The table for this processor; CLARA_FAST_CPU_ISA as in kernels.h, "avx512" being without AVX512-BF16.
const AttentionKernels& attention_kernels();

}  // namespace clara_fast::cpu
