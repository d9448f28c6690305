#include "attention.h"

namespace clara_fast::cpu {
namespace {

struct Ints {
  const int32_t* data;
  int64_t rows, stride;

  Ints(const Tensor& tensor, const char* name, int64_t dims)
      : data(static_cast<const int32_t*>(tensor.const_data_ptr())),
        rows(tensor.dim() == dims ? tensor.size(0) : 0),
        stride(tensor.dim() == dims ? tensor.stride(0) : 0) {
    check_type(tensor, name, ScalarType::Int);
    STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, not ", tensor.dim());
  }
  int64_t operator[](int64_t i) const { return data[i * stride]; }
};

void check_range(const char* name, int64_t segment, int64_t start, int64_t length, int64_t rows) {
  STD_TORCH_CHECK(start >= 0 && length >= 0, name, "_start (", start, ") and ", name, "_len (", length,
                  ") of segment ", segment, " must not be negative");
  STD_TORCH_CHECK(start + length <= rows, name, "_start + ", name, "_len (", start + length, ") of segment ",
                  segment, " must be at most the number of rows (", rows, ")");
}

}  // namespace

Layout::Layout(const Tensor& q_start_, const Tensor& q_len_, const Tensor& kv_start_, const Tensor& kv_len_,
               const Tensor& contexts_, int64_t query_rows, int64_t key_rows) {
  const Ints q_start(q_start_, "q_start", 1);
  const Ints q_len(q_len_, "q_len", 1);
  const Ints kv_start(kv_start_, "kv_start", 1);
  const Ints kv_len(kv_len_, "kv_len", 1);
  const Ints contexts(contexts_, "contexts", 2);
  const int64_t count = q_start.rows;
  STD_TORCH_CHECK(
      q_len.rows == count && kv_start.rows == count && kv_len.rows == count && contexts.rows == count,
      "q_start, q_len, kv_start, kv_len and contexts must have one row per segment");
  const int64_t width = contexts_.size(1);
  const int64_t column = contexts_.stride(1);
  segments_.resize(count);
  for (int64_t s = 0; s < count; ++s) {
    check_range("q", s, q_start[s], q_len[s], query_rows);
    check_range("kv", s, kv_start[s], kv_len[s], key_rows);
    segments_[s] = {q_start[s], q_len[s], kv_start[s], kv_len[s], 0, 0, 0};
    rows_of_segments_ += q_len[s];
  }
  ranges_.reserve(count);
  for (int64_t s = 0; s < count; ++s) {
    Segment& segment = segments_[s];
    segment.first_range = static_cast<int64_t>(ranges_.size());
    for (int64_t c = 0; c < width; ++c) {
      const int64_t other = contexts.data[s * contexts.stride + c * column];
      STD_TORCH_CHECK(other >= -1 && other < count, "contexts (", other, ") of segment ", s,
                      " must be -1 or a segment below ", count);
      if (other < 0 || segments_[other].kv_len == 0) continue;
      ranges_.push_back({segments_[other].kv_start, segments_[other].kv_len});
      segment.context_keys += segments_[other].kv_len;
    }
    ranges_.push_back({segment.kv_start, segment.kv_len});
    segment.last_range = static_cast<int64_t>(ranges_.size());
  }
}

HeadsOf::HeadsOf(const Tensor& tensor, const char* name, Storage storage) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have 3 dimensions, not ", tensor.dim());
  STD_TORCH_CHECK(storage_of(tensor, name) == storage, name, " must have the dtype of query");
  rows = tensor.size(0);
  heads = tensor.size(1);
  size = tensor.size(2);
  STD_TORCH_CHECK(size < 2 || tensor.stride(2) == 1, name, " must have a last dimension without gaps");
  const int64_t bytes = element_size(storage);
  data_ = static_cast<const char*>(tensor.const_data_ptr());
  position_ = tensor.stride(0) * bytes;
  head_ = tensor.stride(1) * bytes;
}

}  // namespace clara_fast::cpu
