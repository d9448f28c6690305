// The inner loops of cosine_topk, one table per instruction set; plain like kernels.h, and for the same
// reason.
//
// A row of keys or queries is cut into groups of four bytes: one float32, two bfloat16 or four int8. A panel
// holds the groups of kLanes queries side by side, so that a vector of them meets one group of a key:
//   panel[group][lane][4 bytes]
// AMX reads just this as its second operand.
#pragma once

#include "kernels.h"

namespace clara_fast::cpu {

constexpr int64_t kLanes = 16;     // queries of a panel
constexpr int64_t kKeyBlock = 48;  // keys that share one pass over the panels
constexpr int64_t kRowAlign =
    64;  // rows that `tile` reads are padded with zeros to a multiple of so many bytes
constexpr int64_t kGroups =
    192;  // groups that `tile` adds up at a time: 12 KiB of a panel, short float32 sums
constexpr int64_t kStreamRows = 8;  // query rows that `stream` takes at most
// Places in memory that `stream` reads side by side. A processor's prefetchers follow each, so that a thread
// gets more of the memory's bandwidth than with one, the more so the longer rows are. Software prefetches
// take from it.
constexpr int64_t kStreams = 4;
constexpr int64_t kStreamKeys = 16;                       // of each stream that make a block
constexpr int64_t kStreamBlock = kStreams * kStreamKeys;  // places in it

// What is multiplied. A query may take several rows, its terms, each with a sum of its own.
enum class Format {
  kFloats,  // float32 with float32
  kHalves,  // bfloat16 keys widened in registers; each 32 query columns are float32, the even ones first
  kPairs,   // bfloat16 with bfloat16; float32 queries as three terms that add up to them
  kDigits,  // int8 keys with the query as an integer of 24 bits, three unsigned digits, exact
  kCount,
};
constexpr int64_t kTerms = 3;
constexpr int32_t kDigitOffset = 1 << 23;  // added to the integer, so that no digit is negative

// What the keys themselves contribute.
struct KeySums {
  float* squares;
  int32_t* sums;  // kDigits only
};

// Columns whose sums stay in float32 or int32; longer rows add up such sums in float64. `stream` has shorter
// chains of additions, a vector of them side by side, and wants rows as long as they are; int32 sums of
// digits are exact up to 65536 columns.
constexpr int64_t kStreamSpan = 12288;
constexpr int64_t kTileSpan = 3072;  // a multiple of what `tile` adds up at a time
constexpr int64_t kSpanAlign = 64;  // the kernels read padding, or the next columns, up to a multiple of this

// Key j of stream s, with j < counts[s], begins s * apart + j * stride bytes after `first`, and has place
// j * kStreams + s in a block. No stream is longer than the one before it.
struct StreamedKeys {
  const void* first;
  int64_t stride, apart;
  int64_t counts[kStreams];  // at most kStreamKeys
};

// The keys, read once and in order, with `num_rows` rows of n columns (and zeros up to a multiple of 64):
// outs[r][place] = the float32 or int32 dot of row r and the key of that place, sums likewise. Where a stream
// ends before the first one does, its places get the first one's numbers.
using Stream = void (*)(const StreamedKeys& keys, int64_t n, const void* const* rows, int64_t num_rows,
                        void* const* outs, KeySums sums);

// kKeyBlock keys `stride` bytes apart and `num_panels` panels `panel_stride` bytes apart, over `groups`
// groups, a multiple of 16: sums[panel][key][lane] += their dots (= where `first`).
using Tile = void (*)(const void* keys, int64_t stride, const void* panels, int64_t panel_stride,
                      int64_t num_panels, int64_t groups, void* sums, bool first);

// The sums of `count` keys over n columns, kKeyBlock at most, added to `sums`.
using SumKeys = void (*)(const void* keys, int64_t stride, int64_t count, int64_t n, KeySums sums);

// n stored values as float32 or bfloat16.
using Convert = void (*)(const void* row, int64_t n, void* out);

struct Hit {
  int32_t key, lane;
  float score;
};

// Null: this instruction set has no such loop.
struct SearchKernels {
  Stream stream[static_cast<int>(Format::kCount)][static_cast<int>(Storage::kCount)];
  Tile tile[static_cast<int>(Format::kCount)];
  SumKeys sum_keys[static_cast<int>(Storage::kCount)];
  SumKeys sum_digits;  // of int8 keys, exact
  Convert convert[static_cast<int>(Format::kCount)][static_cast<int>(Storage::kCount)];
  // dots[i] = the value of the three digit sums at digits + i, + kTerms strides; `key_sums` one per kLanes.
  void (*join_digits)(const int32_t* digits, int64_t term_stride, const int32_t* key_sums, int64_t num_keys,
                      const float* units, float* dots);
  // The same for `places` keys, four at a time, that one query met in streams.
  void (*join_streamed_digits)(const int32_t* digits, int64_t term_stride, const int32_t* key_sums,
                               int64_t places, float unit, float* dots);
  // totals[i] += parts[i] (= where `first`), rounded to dots[i], which may be parts[i].
  void (*add_spans)(const float* parts, int64_t num_keys, double* totals, float* dots, bool first);
  // factors[j] = 1 / length of key j; false where some square is not between `smallest` and `largest`.
  bool (*inverse_lengths)(const float* squares, int64_t n, float smallest, float largest, float* factors);
  // The scores dots * factor of the key * factor of the lane that do not lie at or below the lane's threshold
  // (NaN does not), key by key. dots[key][lane]; `lanes` of them count.
  int64_t (*pick)(const float* dots, int64_t num_keys, const float* key_factors, const float* lane_factors,
                  const float* thresholds, int64_t lanes, Hit* hits);
  // The same for the dots of one query with a block that streamed in; thresholds[stream]. Hits have lane 0.
  int64_t (*pick_streamed)(const float* dots, const float* key_factors, float factor, const float* thresholds,
                           Hit* hits);
  bool prefers_terms;  // three products of bfloat16 are faster than one in float32
};

extern const SearchKernels kGenericSearch;
#if defined(__x86_64__)
extern const SearchKernels kAvx2Search;
extern const SearchKernels kAvx512Search;
// What these instruction sets do better than AVX-512 alone.
void add_avx512_bf16(SearchKernels& search);
void add_amx(SearchKernels& search);
void add_emulated_amx(SearchKernels& search);
#endif

// The table for this processor: see kernels().
const SearchKernels& search_kernels();

}  // namespace clara_fast::cpu
