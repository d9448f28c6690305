// One thread's share of cosine_topk: a group of queries against a range of keys.
#pragma once

#include <vector>

#include "cosine.h"
#include "topk_operands.h"

namespace clara_fast::cpu {

struct KeyBank {
  const Rows& rows;
  Storage storage;
  const float* scales;  // [count, groups], or null: all 1
  int64_t groups;       // of columns, each with a scale of its own
  int64_t count, columns;

  const RowKernels& kernels_of() const { return kernels()[storage]; }
  KeyScales scales_of(int64_t key) const {
    return scales == nullptr ? KeyScales{} : KeyScales{scales + key * groups, groups};
  }
};

class Search {
 public:
  Search(const KeyBank& keys, const Plan& plan, const Queries& queries, const Operands& operands);

  // Offers the keys of [begin, end), in order, to the best of each query.
  void run(int64_t begin, int64_t end, Best* best);

 private:
  static constexpr int64_t kBlockSums = kKeyBlock * kLanes;
  static constexpr int64_t kStreamTogether = 4;  // keys of several spans each

  void stream(int64_t first, int64_t count);
  void multiply(int64_t first, int64_t count);
  int64_t span_end(int64_t column) const;
  void weigh(int64_t first, int64_t count);
  // Of the keys for the group that a column is in; null where each has one scale.
  const float* weights_of(int64_t column) const;
  void stream(int64_t first, int64_t from, int64_t count);
  void join(int64_t from, int64_t count, int64_t column);
  void add_squares(int64_t from, int64_t count, const float* part, int64_t column);
  void measure(int64_t first, int64_t count);
  const void* block_of(int64_t first, int64_t count, int64_t column, int64_t n, int64_t* stride);
  const float* dots(int64_t panel) const;

  const KeyBank& keys_;
  const Plan plan_;
  const Queries& queries_;
  const Operands& operands_;
  const SearchKernels& kernels_;
  const int64_t span_;  // columns
  // sums[panel][term][key][lane] of a span, float32 or int32; dots_[panel][key][lane] where they differ from
  // these, totals_ where there are several spans. A span lies in one group of columns.
  std::vector<int32_t> sums_;
  std::vector<float> dots_;
  std::vector<double> totals_;
  // Where each key has several scales: [group][key], as parts of the key's largest.
  std::vector<float> weights_;
  std::vector<int32_t> converted_;  // a block of keys over the groups that `tile` takes at a time
  std::vector<Hit> hits_;
  std::vector<float> thresholds_;
  double squares_[kKeyBlock];
  float factors_[kKeyBlock];
  int32_t key_sums_[kKeyBlock];
  KeyKind kinds_[kKeyBlock];
};

}  // namespace clara_fast::cpu
