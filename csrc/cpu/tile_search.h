// One thread's share of cosine_topk where queries are many: panels of them against blocks of keys.
#pragma once

#include <vector>

#include "topk_operands.h"
#include "topk_search.h"

namespace clara_fast::cpu {

class TileSearch {
 public:
  static constexpr int64_t kParts = 1;  // of a range that have a best of their own

  TileSearch(const KeyBank& like, const QueryGroup& group);

  // Offers the keys of [begin, end), which are of the kind of `like`, in order, to best[query].
  void run(const KeyBank& keys, int64_t begin, int64_t end, Best* best);

 private:
  static constexpr int64_t kBlockSums = kKeyBlock * kLanes;

  void multiply(int64_t first, int64_t count);
  const void* block_of(int64_t first, int64_t count, int64_t column, int64_t n, int64_t* stride);
  void join(int64_t count, int64_t column);
  void offer(int64_t first, int64_t count, Best* best);

  const KeyBank* keys_;
  const QueryGroup& group_;
  const SearchKernels& kernels_;
  // sums_[panel][term][key][lane] of a span, float32 or int32; dots_[panel][key][lane] where they differ from
  // these, totals_ where there are several spans.
  std::vector<int32_t> sums_;
  std::vector<float> dots_;
  std::vector<double> totals_;
  KeyWeights weights_;
  std::vector<int32_t> converted_;  // a block of keys over the groups that `tile` takes at a time
  KeyLengths lengths_;
  double squares_[kKeyBlock];
  int32_t key_sums_[kKeyBlock];
  Hit hits_[kBlockSums];
};

}  // namespace clara_fast::cpu
