// What both ways of searching for cosine_topk share: the keys, their scales and lengths.
#pragma once

#include <vector>

#include "cosine.h"
#include "search_kernels.h"

namespace clara_fast::cpu {

// Keys that lie side by side in memory; a search is over one such bank, or several of the same kind.
struct KeyBank {
  Rows rows;
  Storage storage;
  int64_t count, columns;
  int64_t first;        // number of its first key among those of all banks
  int64_t groups;       // of columns, each with a scale of its own
  const float* scales;  // [count, groups], or null: all 1
  const bool* allowed;  // [count], which keys may be found, or null: all

  const RowKernels& kernels_of() const { return kernels()[storage]; }
  bool may_be_found(int64_t key) const { return allowed == nullptr || allowed[key]; }
  KeyScales scales_of(int64_t key) const {
    return scales == nullptr ? KeyScales{} : KeyScales{scales + key * groups, groups};
  }
  // Where the columns end that are added up together from `column` on: `longest`, or those of one scale.
  int64_t span_end(int64_t column, int64_t longest) const {
    const int64_t width = columns / groups;
    return std::min(column + longest, (column / width + 1) * width);
  }
};

// Where each key has several scales: what they are to a block of keys, as parts of a key's largest, since
// scales as they are may be too large or too small for float32 squares.
class KeyWeights {
 public:
  KeyWeights(const KeyBank& like, int64_t places)
      : width_(like.columns / like.groups),
        places_(places),
        weights_(like.groups > 1 ? like.groups * places : 0) {}

  bool empty() const { return weights_.empty(); }
  void set(const KeyBank& keys, int64_t place, int64_t key) {
    const KeyScales scales = keys.scales_of(key);
    const float largest = scales.largest();
    for (int64_t g = 0; g < keys.groups; ++g)
      weights_[g * places_ + place] = largest > 0.0f ? scales[g] / largest : 0.0f;
  }
  // By place, for the group that a column is in; null where each key has one scale.
  const float* of(int64_t column) const {
    return empty() ? nullptr : weights_.data() + column / width_ * places_;
  }

 private:
  int64_t width_, places_;
  std::vector<float> weights_;  // [group][place]
};

// Lengths and kinds of a block of keys.
struct KeyLengths {
  static constexpr int64_t kPlaces = std::max(kKeyBlock, kStreamBlock);
  float factors[kPlaces];
  KeyKind kinds[kPlaces];

  // From the squares of `places` keys; key_at(place) is the key there, or negative for none.
  template <class KeyAt>
  void measure(const KeyBank& keys, const float* squares, int64_t places, KeyAt key_at) {
    std::fill_n(kinds, places, KeyKind::kPlain);
    // A place without a key may pass for a key that is not plain: then all go the slow way.
    bool plain = search_kernels().inverse_lengths(squares, places, kSmallestSquare, kLargestSquare, factors);
    for (int64_t place = 0; place < places && keys.scales != nullptr; ++place) {
      const int64_t key = key_at(place);
      if (key < 0) continue;
      const KeyScales scales = keys.scales_of(key);
      const float scale = scales.count == 1 ? scales[0] : scales.largest();
      plain &= scale > 0.0f && scale <= std::numeric_limits<float>::max();
    }
    for (int64_t place = 0; place < places && !plain; ++place) {
      const int64_t key = key_at(place);
      if (key < 0) continue;
      const KeyFactor found =
          key_factor(keys.kernels_of(), keys.rows[key], keys.columns, squares[place], keys.scales_of(key));
      factors[place] = found.factor;
      kinds[place] = found.kind;
    }
  }
};

// The score of a hit.
inline float settled(const KeyBank& keys, const Hit& hit, int64_t key, KeyKind kind, const Queries& queries,
                     int64_t query) {
  const float score = hit.score + 0.0f;  // -0 becomes 0
  if (!std::isnan(score)) return score;
  return special_score(keys.kernels_of(), keys.rows[key], keys.columns, kind, keys.scales_of(key), queries,
                       query);
}

}  // namespace clara_fast::cpu
