#include "stream_search.h"

namespace clara_fast::cpu {

StreamSearch::StreamSearch(const KeyBank& like, const QueryGroup& group)
    : keys_(&like),
      group_(group),
      kernels_(search_kernels()),
      stream_(kernels_.stream[static_cast<int>(group.plan.format)][static_cast<int>(like.storage)]),
      one_span_(like.span_end(0, kStreamSpan) == like.columns),
      sums_(group.operands.count() * group.plan.terms * kStreamBlock),
      dots_(one_span_ && group.plan.terms == 1 ? 0 : group.operands.count() * kStreamBlock),
      totals_(one_span_ ? 0 : group.operands.count() * kStreamBlock),
      weights_(like, kStreamBlock) {}

void StreamSearch::run(const KeyBank& keys, int64_t begin, int64_t end, Best* best) {
  keys_ = &keys;
  const Streams streams(begin, end);
  for (int64_t at = 0; at < streams.length(); at += kStreamKeys) {
    multiply(streams, at);
    lengths_.measure(keys, squares_, kStreamBlock, [&](int64_t place) { return streams.key_at(at, place); });
    offer(streams, at, best);
  }
}

void StreamSearch::multiply(const Streams& streams, int64_t at) {
  if (weights_.empty()) return multiply(streams.keys(keys_->rows, at, kStreamKeys), 0, kStreamBlock);
  // One key of each stream at a time: short spans of many would jump about in memory.
  for (int64_t j = 0; j < kStreamKeys && at + j < streams.length(); ++j) {
    const int64_t first = j * kStreams;
    for (int64_t place = first; place < first + kStreams; ++place) {
      const int64_t key = streams.key_at(at, place);
      if (key >= 0) weights_.set(*keys_, place, key);
    }
    multiply(streams.keys(keys_->rows, at + j, 1), first, kStreams);
  }
}

// `places` of them from `place` on, which is the first key's.
void StreamSearch::multiply(const StreamedKeys& keys, int64_t place, int64_t places) {
  const void* rows[kStreamRows * kTerms];
  void* outs[kStreamRows * kTerms];
  const int64_t num_rows = group_.operands.count() * group_.plan.terms;
  StreamedKeys span = keys;
  for (int64_t column = 0, end; column < keys_->columns; column = end) {
    end = keys_->span_end(column, kStreamSpan);
    for (int64_t r = 0; r < num_rows; ++r) {
      rows[r] = group_.operands.row(r / group_.plan.terms, r % group_.plan.terms, column);
      outs[r] = sums_.data() + r * kStreamBlock + place;
    }
    span.first = static_cast<const char*>(keys.first) + column * element_size(keys_->storage);
    stream_(span, end - column, rows, num_rows, outs, {squares_ + place, key_sums_ + place});
    for (int64_t q = 0; q < group_.operands.count(); ++q) join(q, place, places, column);
    if (one_span_) return;
    const float* weights = weights_.of(column);
    for (int64_t p = place; p < place + places; ++p) {
      const double weight = weights == nullptr ? 1.0 : weights[p];
      total_squares_[p] = (column == 0 ? 0.0 : total_squares_[p]) + squares_[p] * weight * weight;
    }
  }
  for (int64_t p = place; p < place + places; ++p) squares_[p] = static_cast<float>(total_squares_[p]);
}

// A query's dots from the sums of several terms, and of several spans.
void StreamSearch::join(int64_t query, int64_t place, int64_t places, int64_t column) {
  if (dots_.empty()) return;
  const int32_t* sums = sums_.data() + query * group_.plan.terms * kStreamBlock + place;
  float* dots = dots_.data() + query * kStreamBlock + place;
  const float* parts = reinterpret_cast<const float*>(sums);
  if (group_.plan.format == Format::kDigits) {
    kernels_.join_streamed_digits(sums, kStreamBlock, key_sums_ + place, places,
                                  group_.operands.units(0)[query], dots);
    parts = dots;
  }
  if (one_span_) return;
  double* totals = totals_.data() + query * kStreamBlock + place;
  const float* weights = weights_.of(column);
  for (int64_t p = 0; p < places; ++p) {
    const float part = weights == nullptr ? parts[p] : parts[p] * weights[place + p];
    totals[p] = (column == 0 ? 0.0 : totals[p]) + part;
    dots[p] = static_cast<float>(totals[p]);
  }
}

void StreamSearch::offer(const Streams& streams, int64_t at, Best* best) {
  const int64_t count = group_.operands.count();
  for (int64_t q = 0; q < count; ++q) {
    const float* dots =
        (dots_.empty() ? reinterpret_cast<const float*>(sums_.data()) : dots_.data()) + q * kStreamBlock;
    float thresholds[kStreams];
    for (int64_t s = 0; s < kStreams; ++s) thresholds[s] = best[s * count + q].threshold();
    const int64_t hits =
        kernels_.pick_streamed(dots, lengths_.factors, group_.operands.inverses(0)[q], thresholds, hits_);
    for (int64_t h = 0; h < hits; ++h) {
      const int64_t place = hits_[h].key;
      const int64_t key = streams.key_at(at, place);
      if (key < 0 || !keys_->may_be_found(key)) continue;
      best[place % kStreams * count + q].offer(
          {settled(*keys_, hits_[h], key, lengths_.kinds[place], group_.queries, q), keys_->first + key});
    }
  }
}

}  // namespace clara_fast::cpu
