// A range of rows as kStreams parts of equal length, read side by side.
#pragma once

#include "search_kernels.h"
#include "tensors.h"

namespace clara_fast::cpu {

class Streams {
 public:
  Streams(int64_t begin, int64_t end) : begin_(begin), end_(end), length_(ceil_div(end - begin, kStreams)) {}

  // Of the longest, which is the first.
  int64_t length() const { return length_; }
  // Row `at` of stream s.
  int64_t row(int64_t s, int64_t at) const { return begin_ + s * length_ + at; }
  // How many rows stream s has from `at` on, `most` at most.
  int64_t count(int64_t s, int64_t at, int64_t most) const {
    return std::clamp<int64_t>(std::min(row(s, length_), end_) - row(s, at), 0, most);
  }
  // The row at a place of the block that begins with row `at` of each stream; -1 where there is none.
  int64_t key_at(int64_t at, int64_t place) const {
    const int64_t s = place % kStreams, j = place / kStreams;
    return j < count(s, at, kStreamKeys) ? row(s, at + j) : -1;
  }
  StreamedKeys keys(const Rows& rows, int64_t at, int64_t most) const {
    StreamedKeys keys{rows[row(0, at)], rows.stride, length_ * rows.stride, {}};
    for (int64_t s = 0; s < kStreams; ++s) keys.counts[s] = count(s, at, most);
    return keys;
  }

 private:
  int64_t begin_, end_, length_;
};

}  // namespace clara_fast::cpu
