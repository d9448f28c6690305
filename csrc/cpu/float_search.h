// cosine_topk's loops in float32 over Vec: every storage type on every instruction set.
#pragma once

#include "row_kernels.h"
#include "stream_kernels.h"
#include "tile_kernels.h"

namespace clara_fast::cpu {
namespace {

struct FloatSums {
  using Vector = Vec;
  using Sum = float;
  static constexpr int kSums = kTileSums;
  static Vec zero() { return zeros(); }
  static Vec add(Vec a, Vec b) { return a + b; }
  static void sums(const Vec v[kStreams], float* out) {
    for (int64_t t = 0; t < kStreams; ++t) out[t] = 0.0f;
    add_sums(out, v);
  }
};

template <class T>
struct FloatStream : FloatSums {
  using Element = T;
  static constexpr int64_t kStep = kWidth;
  static constexpr int64_t kRowBytes = 4;
  static constexpr int kNorms = 1;
  template <class Columns>
  static Vec load(const char* key, Columns columns) {
    return clara_fast::cpu::load(reinterpret_cast<const T*>(key), columns);
  }
  static Vec dot(Vec key, const char* row, Vec sum) {
    return multiply_add(key, clara_fast::cpu::load(reinterpret_cast<const float*>(row)), sum);
  }
  static Vec norm(Constant<0>, Vec key, Vec sum) { return multiply_add(key, key, sum); }
  static void store_norms(const Vec (*norms)[kStreams], KeySums out) { sums(norms[0], out.squares); }
};

template <class T>
void stream_floats(const StreamedKeys& keys, int64_t n, const void* const* rows, int64_t num_rows,
                   void* const* outs, KeySums sums) {
  for (int64_t r = 0; r < num_rows; r += kWideRows) {
    const int64_t left = num_rows - r < kWideRows ? num_rows - r : kWideRows;
    const auto some = left == 1   ? &stream_rows<FloatStream<T>, 1>
                      : left == 2 ? &stream_rows<FloatStream<T>, 2>
                      : left <= 4 ? &stream_rows<FloatStream<T>, 4>
                                  : &stream_rows<FloatStream<T>, kWideRows>;
    some(keys, n, rows + r, left, outs + r, sums);
  }
}

struct FloatTile {
  using Vector = Vec;
  static constexpr int kVectorsPerPanel = kLanes / kWidth;
  static constexpr int kSums = kTileSums;
  static constexpr int kPanels = kTileSums / kVectorsPerPanel >= 24 ? 4 : 1;
  static Vec zero() { return zeros(); }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec load(const char* p) { return clara_fast::cpu::load(reinterpret_cast<const float*>(p)); }
  static void store(char* p, Vec v) { clara_fast::cpu::store(reinterpret_cast<float*>(p), v); }
  static Vec broadcast(const char* p) {
    return clara_fast::cpu::broadcast(*reinterpret_cast<const float*>(p));
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return clara_fast::cpu::multiply_add(a, b, c); }
};

template <class T>
void sum_keys(const void* keys, int64_t stride, int64_t count, int64_t n, KeySums sums) {
  for (int64_t j = 0; j < count; ++j) {
    sums.squares[j] += square_sum<T>(static_cast<const char*>(keys) + j * stride, n);
  }
}

template <class T>
void convert_to_floats(const void* row, int64_t n, void* out) {
  const T* x = static_cast<const T*>(row);
  float* y = static_cast<float*>(out);
  for_columns(0, n, [&](int64_t i, auto columns) { store(y + i, load(x + i, columns), columns); });
}

void add_spans(const float* parts, int64_t num_keys, double* totals, float* dots, bool first) {
  for (int64_t j = 0; j < num_keys; ++j, parts += kLanes, totals += kLanes, dots += kLanes) {
    double sums[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] = (first ? 0.0 : totals[lane]) + parts[lane];
    for (int64_t lane = 0; lane < kLanes; ++lane) totals[lane] = sums[lane];
    for (int64_t lane = 0; lane < kLanes; ++lane) dots[lane] = static_cast<float>(sums[lane]);
  }
}

bool inverse_lengths(const float* squares, int64_t n, float smallest, float largest, float* factors) {
  // Two loops, and an integer for the answer, so that compilers make vectors of them.
  int32_t odd = 0;
  for (int64_t j = 0; j < n; ++j) odd |= !(squares[j] >= smallest) | !(squares[j] <= largest);
  for (int64_t j = 0; j < n; ++j) factors[j] = 1.0f / __builtin_sqrtf(squares[j]);
  return odd == 0;
}

int64_t pick(const float* dots, int64_t num_keys, const float* key_factors, const float* lane_factors,
             const float* thresholds, int64_t lanes, Hit* hits) {
  constexpr int kParts = kLanes / kWidth;
  Vec factor[kParts];
  Vec threshold[kParts];
  for (int v = 0; v < kParts; ++v) {
    factor[v] = load(lane_factors + v * kWidth);
    threshold[v] = load(thresholds + v * kWidth);
  }
  const uint32_t counted = (uint32_t{1} << lanes) - 1;
  int64_t found = 0;
  for (int64_t j = 0; j < num_keys; ++j) {
    const Vec key = broadcast(key_factors[j]);
    Vec score[kParts];
    uint32_t mask = 0;
    for (int v = 0; v < kParts; ++v) {
      score[v] = load(dots + j * kLanes + v * kWidth) * key * factor[v];
      mask |= not_at_most(score[v], threshold[v]) << (v * kWidth);
    }
    mask &= counted;
    if (mask == 0) continue;
    float scores[kLanes];
    for (int v = 0; v < kParts; ++v) store(scores + v * kWidth, score[v]);
    for (; mask != 0; mask &= mask - 1) {
      const int32_t lane = __builtin_ctz(mask);
      hits[found++] = {static_cast<int32_t>(j), lane, scores[lane]};
    }
  }
  return found;
}

int64_t pick_streamed(const float* dots, const float* key_factors, float factor, const float* thresholds,
                      Hit* hits) {
  constexpr int kParts = kLanes / kWidth;
  static_assert(kStreamBlock % kLanes == 0 && kLanes % kStreams == 0);
  float repeated[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) repeated[i] = thresholds[i % kStreams];
  int64_t found = 0;
  for (int64_t first = 0; first < kStreamBlock; first += kLanes) {
    float scores[kLanes];
    uint32_t mask = 0;
    for (int v = 0; v < kParts; ++v) {
      const int64_t place = first + v * kWidth;
      const Vec score = load(dots + place) * load(key_factors + place) * broadcast(factor);
      store(scores + v * kWidth, score);
      mask |= not_at_most(score, load(repeated + v * kWidth)) << (v * kWidth);
    }
    for (; mask != 0; mask &= mask - 1) {
      const int32_t i = __builtin_ctz(mask);
      hits[found++] = {static_cast<int32_t>(first) + i, 0, scores[i]};
    }
  }
  return found;
}

template <class T>
constexpr void add_storage(SearchKernels& search, Storage storage) {
  const int at = static_cast<int>(storage);
  search.stream[static_cast<int>(Format::kFloats)][at] = &stream_floats<T>;
  search.sum_keys[at] = &sum_keys<T>;
  search.convert[static_cast<int>(Format::kFloats)][at] = &convert_to_floats<T>;
}

constexpr SearchKernels make_search_kernels() {
  SearchKernels search{};
  add_storage<float>(search, Storage::kFloat32);
  add_storage<bf16>(search, Storage::kBFloat16);
  add_storage<f16>(search, Storage::kFloat16);
  add_storage<int8_t>(search, Storage::kInt8);
  add_storage<f8e4m3>(search, Storage::kFloat8);
  search.tile[static_cast<int>(Format::kFloats)] = &tile<FloatTile>;
  search.add_spans = &add_spans;
  search.inverse_lengths = &inverse_lengths;
  search.pick = &pick;
  search.pick_streamed = &pick_streamed;
  return search;
}

}  // namespace
}  // namespace clara_fast::cpu
