#include "tile_search.h"

#include <cstring>

namespace clara_fast::cpu {
namespace {

Storage stored_as(Format format) {
  return format == Format::kPairs    ? Storage::kBFloat16
         : format == Format::kDigits ? Storage::kInt8
                                     : Storage::kFloat32;
}

}  // namespace

TileSearch::TileSearch(const KeyBank& like, const QueryGroup& group)
    : keys_(&like),
      group_(group),
      kernels_(search_kernels()),
      sums_(group.operands.panels() * group.plan.terms * kBlockSums),
      dots_(group.plan.terms == 1 && like.span_end(0, kTileSpan) == like.columns
                ? 0
                : group.operands.panels() * kBlockSums),
      totals_(like.span_end(0, kTileSpan) == like.columns ? 0 : group.operands.panels() * kBlockSums),
      weights_(like, kKeyBlock),
      converted_(kKeyBlock * kGroups) {}

void TileSearch::run(const KeyBank& keys, int64_t begin, int64_t end, Best* best) {
  keys_ = &keys;
  for (int64_t first = begin; first < end; first += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, end - first);
    for (int64_t j = 0; j < count && !weights_.empty(); ++j) weights_.set(keys, j, first + j);
    multiply(first, count);
    float squares[kKeyBlock];
    for (int64_t j = 0; j < count; ++j) squares[j] = static_cast<float>(squares_[j]);
    lengths_.measure(keys, squares, count, [&](int64_t place) { return first + place; });
    offer(first, count, best);
  }
}

void TileSearch::multiply(int64_t first, int64_t count) {
  const int64_t step = kGroups * 4 / element_bytes(group_.plan.format);
  const int64_t bytes = element_size(keys_->storage);
  const bool digits = group_.plan.format == Format::kDigits;
  const SumKeys sum_keys = digits ? kernels_.sum_digits : kernels_.sum_keys[static_cast<int>(keys_->storage)];
  std::fill_n(squares_, count, 0.0);
  for (int64_t begin = 0, end; begin < keys_->columns; begin = end) {
    end = keys_->span_end(begin, kTileSpan);
    std::fill_n(key_sums_, count, 0);
    const float* weights = weights_.of(begin);
    for (int64_t column = begin; column < end; column += step) {
      const int64_t n = std::min(step, end - column);
      float squares[kKeyBlock] = {};
      sum_keys(static_cast<const char*>(keys_->rows[first]) + column * bytes, keys_->rows.stride, count, n,
               {squares, digits ? key_sums_ : nullptr});
      for (int64_t j = 0; j < count; ++j) {
        const double weight = weights == nullptr ? 1.0 : weights[j];
        squares_[j] += squares[j] * weight * weight;
      }
      int64_t stride;
      const void* block = block_of(first, count, column, n, &stride);
      kernels_.tile[static_cast<int>(group_.plan.format)](
          block, stride, group_.operands.panel(0, 0, column), group_.operands.panel_stride(),
          group_.operands.panels() * group_.plan.terms,
          ceil_div(n * element_bytes(group_.plan.format), kRowAlign) * kRowAlign / 4, sums_.data(),
          column == begin);
    }
    join(count, begin);
  }
}

// A block of keys over n columns as `tile` wants it: as it is stored where possible, else a copy with zeros
// after it.
const void* TileSearch::block_of(int64_t first, int64_t count, int64_t column, int64_t n, int64_t* stride) {
  const char* stored = static_cast<const char*>(keys_->rows[first]) + column * element_size(keys_->storage);
  const int64_t bytes = n * element_bytes(group_.plan.format);
  if (keys_->storage == stored_as(group_.plan.format) && count == kKeyBlock && bytes % kRowAlign == 0) {
    *stride = keys_->rows.stride;
    return stored;
  }
  const Convert convert =
      kernels_.convert[static_cast<int>(group_.plan.format)][static_cast<int>(keys_->storage)];
  const int64_t padded = ceil_div(bytes, kRowAlign) * kRowAlign;
  char* block = reinterpret_cast<char*>(converted_.data());
  for (int64_t j = 0; j < count; ++j) {
    convert(stored + j * keys_->rows.stride, n, block + j * padded);
    std::memset(block + j * padded + bytes, 0, padded - bytes);
  }
  std::memset(block + count * padded, 0, (kKeyBlock - count) * padded);
  *stride = padded;
  return block;
}

// Dots of a block from the sums of several terms, and of several spans.
void TileSearch::join(int64_t count, int64_t column) {
  if (dots_.empty()) return;
  for (int64_t panel = 0; panel < group_.operands.panels(); ++panel) {
    const int32_t* sums = sums_.data() + panel * group_.plan.terms * kBlockSums;
    const float* terms = reinterpret_cast<const float*>(sums);
    float* dots = dots_.data() + panel * kBlockSums;
    if (group_.plan.format == Format::kDigits) {
      kernels_.join_digits(sums, kBlockSums, key_sums_, count, group_.operands.units(panel), dots);
    } else if (group_.plan.terms > 1) {
      for (int64_t i = 0; i < count * kLanes; ++i) {
        dots[i] = terms[i] + (terms[kBlockSums + i] + terms[2 * kBlockSums + i]);
      }
    }
    if (totals_.empty()) continue;
    const float* parts = group_.plan.terms > 1 ? dots : terms;
    if (const float* weights = weights_.of(column)) {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = j * kLanes; i < (j + 1) * kLanes; ++i) dots[i] = parts[i] * weights[j];
      }
      parts = dots;
    }
    kernels_.add_spans(parts, count, totals_.data() + panel * kBlockSums, dots, column == 0);
  }
}

void TileSearch::offer(int64_t first, int64_t count, Best* best) {
  const float* dots = dots_.empty() ? reinterpret_cast<const float*>(sums_.data()) : dots_.data();
  for (int64_t panel = 0; panel < group_.operands.panels(); ++panel, dots += kBlockSums) {
    const int64_t first_query = panel * kLanes;
    const int64_t lanes = std::min(kLanes, group_.operands.count() - first_query);
    float thresholds[kLanes] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) thresholds[lane] = best[first_query + lane].threshold();
    const int64_t hits = kernels_.pick(dots, count, lengths_.factors, group_.operands.inverses(panel),
                                       thresholds, lanes, hits_);
    for (int64_t h = 0; h < hits; ++h) {
      const int64_t query = first_query + hits_[h].lane;
      const int64_t key = first + hits_[h].key;
      if (!keys_->may_be_found(key)) continue;
      best[query].offer({settled(*keys_, hits_[h], key, lengths_.kinds[hits_[h].key], group_.queries, query),
                         keys_->first + key});
    }
  }
}

}  // namespace clara_fast::cpu
