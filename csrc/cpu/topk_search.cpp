#include "topk_search.h"

#include <cstring>

namespace clara_fast::cpu {
namespace {

Storage stored_as(Format format) {
  return format == Format::kPairs    ? Storage::kBFloat16
         : format == Format::kDigits ? Storage::kInt8
                                     : Storage::kFloat32;
}

}  // namespace

Search::Search(const KeyBank& keys, const Plan& plan, const Queries& queries, const Operands& operands)
    : keys_(keys),
      plan_(plan),
      queries_(queries),
      operands_(operands),
      kernels_(search_kernels()),
      span_(plan.streams ? kStreamSpan : kTileSpan),
      sums_(operands.panels() * plan.terms * kBlockSums),
      dots_(plan.terms == 1 && span_end(0) == keys.columns ? 0 : operands.panels() * kBlockSums),
      totals_(span_end(0) == keys.columns ? 0 : operands.panels() * kBlockSums),
      weights_(keys.groups > 1 ? keys.groups * kKeyBlock : 0),
      converted_(plan.streams ? 0 : kKeyBlock * kGroups),
      hits_(kBlockSums),
      thresholds_(operands.panels() * kLanes) {}

const float* Search::dots(int64_t panel) const {
  return (dots_.empty() ? reinterpret_cast<const float*>(sums_.data()) : dots_.data()) + panel * kBlockSums;
}

int64_t Search::span_end(int64_t column) const {
  const int64_t width = keys_.columns / keys_.groups;
  return std::min(column + span_, (column / width + 1) * width);
}

const float* Search::weights_of(int64_t column) const {
  return weights_.empty() ? nullptr : weights_.data() + column / (keys_.columns / keys_.groups) * kKeyBlock;
}

// Of the largest, since scales as they are may be too large or too small for float32 squares.
void Search::weigh(int64_t first, int64_t count) {
  if (weights_.empty()) return;
  for (int64_t j = 0; j < count; ++j) {
    const KeyScales scales = keys_.scales_of(first + j);
    const float largest = scales.largest();
    for (int64_t g = 0; g < keys_.groups; ++g)
      weights_[g * kKeyBlock + j] = largest > 0.0f ? scales[g] / largest : 0.0f;
  }
}

void Search::run(int64_t begin, int64_t end, Best* best) {
  for (int64_t q = 0; q < operands_.count(); ++q) thresholds_[q] = best[q].threshold();
  for (int64_t first = begin; first < end; first += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, end - first);
    weigh(first, count);
    plan_.streams ? stream(first, count) : multiply(first, count);
    measure(first, count);
    for (int64_t panel = 0; panel < operands_.panels(); ++panel) {
      const int64_t first_query = panel * kLanes;
      const int64_t hits = kernels_.pick(dots(panel), count, factors_, operands_.inverses(panel),
                                         thresholds_.data() + first_query,
                                         std::min(kLanes, operands_.count() - first_query), hits_.data());
      for (int64_t h = 0; h < hits; ++h) {
        const Hit& hit = hits_[h];
        const int64_t query = first_query + hit.lane;
        float score = hit.score + 0.0f;  // -0 becomes 0
        if (std::isnan(score)) {
          score = special_score(keys_.kernels_of(), keys_.rows[first + hit.key], keys_.columns,
                                kinds_[hit.key], keys_.scales_of(first + hit.key), queries_, query);
        }
        best[query].offer({score, first + hit.key});
        thresholds_[query] = best[query].threshold();
      }
    }
  }
}

void Search::stream(int64_t first, int64_t count) {
  // Short spans of many keys would jump about in memory.
  const int64_t together = weights_.empty() ? count : kStreamTogether;
  std::fill_n(squares_, count, 0.0);
  for (int64_t from = 0; from < count; from += together) {
    stream(first, from, std::min(together, count - from));
  }
}

// The keys [from, from + count) of the block that begins with key `first`.
void Search::stream(int64_t first, int64_t from, int64_t count) {
  const void* rows[kStreamRows * kTerms];
  void* outs[kStreamRows * kTerms];
  const int64_t num_rows = operands_.count() * plan_.terms;
  const int64_t bytes = element_size(keys_.storage);
  for (int64_t column = 0, end; column < keys_.columns; column = end) {
    end = span_end(column);
    for (int64_t r = 0; r < num_rows; ++r) {
      rows[r] = operands_.row(r / plan_.terms, r % plan_.terms, column);
      outs[r] = sums_.data() + r % plan_.terms * kBlockSums + from * kLanes + r / plan_.terms;
    }
    float squares[kKeyBlock];
    kernels_.stream[static_cast<int>(plan_.format)][static_cast<int>(keys_.storage)](
        static_cast<const char*>(keys_.rows[first + from]) + column * bytes, keys_.rows.stride, count,
        end - column, rows, num_rows, outs, {squares, key_sums_ + from});
    add_squares(from, count, squares, column);
    join(from, count, column);
  }
}

void Search::multiply(int64_t first, int64_t count) {
  const int64_t step = kGroups * 4 / element_bytes(plan_.format);
  const int64_t bytes = element_size(keys_.storage);
  const bool digits = plan_.format == Format::kDigits;
  const SumKeys sum_keys = digits ? kernels_.sum_digits : kernels_.sum_keys[static_cast<int>(keys_.storage)];
  std::fill_n(squares_, count, 0.0);
  for (int64_t begin = 0, end; begin < keys_.columns; begin = end) {
    end = span_end(begin);
    std::fill_n(key_sums_, count, 0);
    for (int64_t column = begin; column < end; column += step) {
      const int64_t n = std::min(step, end - column);
      float squares[kKeyBlock] = {};
      sum_keys(static_cast<const char*>(keys_.rows[first]) + column * bytes, keys_.rows.stride, count, n,
               {squares, digits ? key_sums_ : nullptr});
      add_squares(0, count, squares, column);
      int64_t stride;
      const void* block = block_of(first, count, column, n, &stride);
      kernels_.tile[static_cast<int>(plan_.format)](
          block, stride, operands_.panel(0, 0, column), operands_.panel_stride(),
          operands_.panels() * plan_.terms,
          ceil_div(n * element_bytes(plan_.format), kRowAlign) * kRowAlign / 4, sums_.data(),
          column == begin);
    }
    join(0, count, begin);
  }
}

// A block of keys over n columns as `tile` wants it: as it is stored where possible, else a copy with zeros
// after it.
const void* Search::block_of(int64_t first, int64_t count, int64_t column, int64_t n, int64_t* stride) {
  const char* stored = static_cast<const char*>(keys_.rows[first]) + column * element_size(keys_.storage);
  const int64_t bytes = n * element_bytes(plan_.format);
  if (keys_.storage == stored_as(plan_.format) && count == kKeyBlock && bytes % kRowAlign == 0) {
    *stride = keys_.rows.stride;
    return stored;
  }
  const Convert convert = kernels_.convert[static_cast<int>(plan_.format)][static_cast<int>(keys_.storage)];
  const int64_t padded = ceil_div(bytes, kRowAlign) * kRowAlign;
  char* block = reinterpret_cast<char*>(converted_.data());
  for (int64_t j = 0; j < count; ++j) {
    convert(stored + j * keys_.rows.stride, n, block + j * padded);
    std::memset(block + j * padded + bytes, 0, padded - bytes);
  }
  std::memset(block + count * padded, 0, (kKeyBlock - count) * padded);
  *stride = padded;
  return block;
}

// Dots of the keys [from, from + count) from the sums of several terms, and of several spans.
void Search::join(int64_t from, int64_t count, int64_t column) {
  if (dots_.empty()) return;
  for (int64_t panel = 0; panel < operands_.panels(); ++panel) {
    const int32_t* sums = sums_.data() + panel * plan_.terms * kBlockSums + from * kLanes;
    const float* terms = reinterpret_cast<const float*>(sums);
    const int64_t place = panel * kBlockSums + from * kLanes;
    float* dots = dots_.data() + place;
    if (plan_.format == Format::kDigits) {
      kernels_.join_digits(sums, kBlockSums, key_sums_ + from, count, operands_.units(panel), dots);
    } else if (plan_.terms > 1) {
      for (int64_t i = 0; i < count * kLanes; ++i) {
        dots[i] = terms[i] + (terms[kBlockSums + i] + terms[2 * kBlockSums + i]);
      }
    }
    if (totals_.empty()) continue;
    const float* parts = plan_.terms > 1 ? dots : terms;
    if (const float* weights = weights_of(column)) {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = j * kLanes; i < (j + 1) * kLanes; ++i) dots[i] = parts[i] * weights[from + j];
      }
      parts = dots;
    }
    kernels_.add_spans(parts, count, totals_.data() + place, dots, column == 0);
  }
}

void Search::add_squares(int64_t from, int64_t count, const float* part, int64_t column) {
  const float* weights = weights_of(column);
  for (int64_t j = 0; j < count; ++j) {
    const double weight = weights == nullptr ? 1.0 : weights[from + j];
    squares_[from + j] += part[j] * weight * weight;
  }
}

// Lengths and kinds of a block of keys.
void Search::measure(int64_t first, int64_t count) {
  bool plain = true;
  float squares[kKeyBlock];
  for (int64_t j = 0; j < count; ++j) squares[j] = static_cast<float>(squares_[j]);
  for (int64_t j = 0; j < count && keys_.scales != nullptr; ++j) {
    const KeyScales scales = keys_.scales_of(first + j);
    const float scale = scales.count == 1 ? scales[0] : scales.largest();
    plain &= scale > 0.0f && scale <= std::numeric_limits<float>::max();
  }
  std::fill_n(kinds_, count, KeyKind::kPlain);
  if (kernels_.inverse_lengths(squares, count, kSmallestSquare, kLargestSquare, factors_) && plain) return;
  for (int64_t j = 0; j < count; ++j) {
    const KeyFactor key = key_factor(keys_.kernels_of(), keys_.rows[first + j], keys_.columns, squares[j],
                                     keys_.scales_of(first + j));
    factors_[j] = key.factor;
    kinds_[j] = key.kind;
  }
}

}  // namespace clara_fast::cpu
