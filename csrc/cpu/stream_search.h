// One thread's share of cosine_topk where queries are few: keys stream in from memory, each read once.
#pragma once

#include <vector>

#include "streams.h"
#include "topk_operands.h"
#include "topk_search.h"

namespace clara_fast::cpu {

class StreamSearch {
 public:
  // Parts of a range that have a best of their own: they are read side by side, each in order.
  static constexpr int64_t kParts = kStreams;

  StreamSearch(const KeyBank& like, const QueryGroup& group);

  // Offers the keys of [begin, end), which are of the kind of `like`, to best[part][query].
  void run(const KeyBank& keys, int64_t begin, int64_t end, Best* best);

 private:
  void multiply(const Streams& streams, int64_t at);
  void multiply(const StreamedKeys& keys, int64_t place, int64_t places);
  void join(int64_t query, int64_t place, int64_t places, int64_t column);
  void offer(const Streams& streams, int64_t at, Best* best);

  const KeyBank* keys_;
  const QueryGroup& group_;
  const SearchKernels& kernels_;
  const Stream stream_;
  const bool one_span_;
  // By [query][place]: sums_ has a row for each term, float32 or int32; dots_ is used where they are not the
  // sums themselves, totals_ where there are several spans.
  std::vector<int32_t> sums_;
  std::vector<float> dots_;
  std::vector<double> totals_;
  KeyWeights weights_;
  KeyLengths lengths_;
  float squares_[kStreamBlock] = {};
  double total_squares_[kStreamBlock] = {};
  int32_t key_sums_[kStreamBlock] = {};
  Hit hits_[kStreamBlock];
};

}  // namespace clara_fast::cpu
