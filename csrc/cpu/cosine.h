// Cosines in float32 that stay right where float32 squares would overflow or vanish, and the k best of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace clara_fast::cpu {

// Float32 sums of squares in this range lost nothing to overflow or underflow, even where subnormal numbers
// are taken for zero and a row has a million columns.
constexpr float kSmallestSquare = 1e-24f;
constexpr float kLargestSquare = 1e30f;

// Queries as float32 rows, each scaled by a power of two to a length in [0.5, 1): a cosine does not change by
// it.
class Queries {
 public:
  // `count` of the tensor's rows from row `begin` on.
  Queries(const Tensor& tensor, Storage storage, int64_t begin, int64_t count, int64_t columns);

  const float* operator[](int64_t query) const { return values_.data() + query * stride_; }
  int64_t stride() const { return stride_; }
  // 1 / length; 0 for a zero vector, NaN for one that holds NaN or infinity.
  float inverse(int64_t query) const { return inverse_[query]; }

 private:
  int64_t stride_;
  std::vector<float> values_;
  std::vector<float> inverse_;
};

enum class KeyKind : uint8_t {
  kPlain,  // score = dot * factor * query.inverse
  kZero,   // score = 0
  kNan,    // score = NaN, unless the query is zero
  kExact,  // too large or too small for float32 squares: see exact_cosine
};

struct KeyFactor {
  float factor;  // 1 / length for a plain key, 0 for a zero one, else NaN
  KeyKind kind;
};

// What a key's columns are multiplied with: one number for each of `count` groups of equal width.
struct KeyScales {
  const float* values = nullptr;  // null: all 1
  int64_t count = 1;

  float operator[](int64_t group) const { return values == nullptr ? 1.0f : values[group]; }
  // The largest in size, or NaN where one is not finite.
  float largest() const;
};

// What a key's sum of squares and its scales say about its scores. The sum is that of the key without its
// scale, or with several, of the key times scale / largest.
KeyFactor key_factor(const RowKernels& rows, const void* key, int64_t columns, float square,
                     const KeyScales& scales);

// The score of a key that is not plain, or of any key with a query that is not.
float special_score(const RowKernels& rows, const void* key, int64_t columns, KeyKind kind,
                    const KeyScales& scales, const Queries& queries, int64_t query);

// Length in float64.
double exact_norm(const float* row, int64_t columns);

struct Scored {
  float score;
  int64_t index;
};

// Higher score first, NaN last, ties by index.
inline bool better(const Scored& a, const Scored& b) {
  const bool a_nan = std::isnan(a.score);
  const bool b_nan = std::isnan(b.score);
  if (a_nan != b_nan) return b_nan;
  if (!a_nan && a.score != b.score) return a.score > b.score;
  return a.index < b.index;
}

// The best `kept` of the entries offered, in memory for `room` entries, more than `kept`, that the caller
// owns. It is cut down to the best whenever it is full, so that an offer costs little for any `kept`.
class Best {
 public:
  // Room that makes cuts rare, unless all there is fits.
  static int64_t room(int64_t kept, int64_t offers) {
    return std::min(2 * kept + 64, std::max(kept, offers) + 1);
  }

  Best(Scored* entries, int64_t kept, int64_t room) : entries_(entries), kept_(kept), room_(room) {}

  // An entry at or below this score changes nothing if its index is higher than all before. NaN: every entry
  // may count.
  float threshold() const { return threshold_; }

  void offer(Scored entry) {
    if (entry.score <= threshold_) return;
    entries_[count_++] = entry;
    if (count_ == room_) cut();
  }

  // Leaves the best ones, in no order.
  void cut() {
    if (count_ < kept_ || kept_ == 0) return;
    std::nth_element(entries_, entries_ + (kept_ - 1), entries_ + count_, better);
    count_ = kept_;
    threshold_ = entries_[kept_ - 1].score;
  }

  int64_t count() const { return count_; }
  Scored* begin() const { return entries_; }
  Scored* end() const { return entries_ + count_; }

 private:
  Scored* entries_;
  int64_t kept_, room_;
  int64_t count_ = 0;
  float threshold_ = std::numeric_limits<float>::quiet_NaN();
};

}  // namespace clara_fast::cpu
