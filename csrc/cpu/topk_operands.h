// How cosine_topk multiplies: the choice of a format, and a group of queries brought into it.
#pragma once

#include <cstdint>
#include <vector>

#include "cosine.h"
#include "search_kernels.h"

namespace clara_fast::cpu {

struct Plan {
  Format format;
  int64_t terms;  // rows per query
  bool streams;   // query rows against keys as they arrive, else panels against blocks of keys
};

// The fastest way for these keys; it depends on nothing but types and the number of queries, so that scores
// do not depend on how the work is split.
Plan choose_plan(Storage queries, Storage keys, int64_t num_queries);

constexpr int64_t element_bytes(Format format) {
  return format == Format::kPairs ? 2 : format == Format::kDigits ? 1 : 4;
}

// Queries in the plan's format, padded with zeros to whole groups, vectors and panels.
class Operands {
 public:
  Operands(const Plan& plan, const Queries& queries, int64_t count, int64_t columns);

  int64_t count() const { return count_; }
  int64_t panels() const { return (count_ + kLanes - 1) / kLanes; }
  // A row, or a panel from one of its columns on.
  const void* row(int64_t query, int64_t term, int64_t column) const;
  const void* panel(int64_t panel, int64_t term, int64_t column) const;
  int64_t panel_stride() const { return row_bytes_ * kLanes; }
  // Per query, zeros up to whole panels: the value of a digit's unit; 1 / length.
  const float* units(int64_t panel) const { return units_.data() + panel * kLanes; }
  const float* inverses(int64_t panel) const { return inverses_.data() + panel * kLanes; }

 private:
  char* at(int64_t row_or_panel) const;

  Plan plan_;
  int64_t count_, row_bytes_;
  std::vector<char> memory_;
  char* data_;  // in memory_, on a cache line
  std::vector<float> units_, inverses_;
};

// Queries that share a pass over the keys, as they are and as they are multiplied.
struct QueryGroup {
  Plan plan;
  Queries queries;
  Operands operands;

  // `count` of the tensor's rows from row `begin` on.
  QueryGroup(const Plan& plan, const Tensor& tensor, Storage storage, int64_t begin, int64_t count,
             int64_t columns)
      : plan(plan),
        queries(tensor, storage, begin, count, columns),
        operands(plan, queries, count, columns) {}
};

}  // namespace clara_fast::cpu
