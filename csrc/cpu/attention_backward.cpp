// compressed_context_attention, backward: a task is some key rows, with one head, and everyone who reads
// them, in order. It finishes the gradients of its keys and values; a query that several tasks know something
// about gets its gradient from their parts, added up in order.
#include <cstring>

#include "attention.h"
#include "ops.h"

namespace clara_fast::cpu {
namespace {

constexpr int64_t kChunkKeys = 384;
constexpr int64_t kMostChunks = 8;  // of a range: they decide how many parts a query's gradient has
constexpr int64_t kSeesAll = int64_t{1} << 40;

struct Read {
  int64_t segment;
  int64_t first, offset;  // the first position that sees any key, and Reader::offset
  int64_t part;           // of the segment's gradient; -1: it is the only one, and whole
};

struct Chunk {
  int64_t start, keys;
  std::vector<Read> reads;
  double pairs = 0;
};

struct Parts {
  int64_t begin = 0;           // where its parts start in the buffer of parts, in rows
  std::vector<int64_t> first;  // position, per part; never falling
};

struct Work {
  std::vector<Chunk> chunks;
  std::vector<Parts> parts;  // per segment
  int64_t part_rows = 0;
  int64_t longest = 0;
  double pairs = 0;
};

// Cuts the key rows where any range begins or ends, and long pieces evenly.
std::vector<Chunk> cut(const Layout& layout, int64_t key_rows) {
  std::vector<int64_t> bounds = {0, key_rows};
  for (const Layout::Segment& segment : layout.segments()) {
    bounds.push_back(segment.kv_start);
    bounds.push_back(segment.kv_start + segment.kv_len);
  }
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  std::vector<Chunk> chunks;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    const int64_t length = bounds[i + 1] - bounds[i];
    const int64_t count = std::min(ceil_div(length, kChunkKeys), kMostChunks);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t first = part_begin(length, c, count);
      chunks.push_back({bounds[i] + first, part_begin(length, c + 1, count) - first, {}});
    }
  }
  return chunks;
}

Work work_of(const Layout& layout, int64_t key_rows) {
  Work work;
  work.chunks = cut(layout, key_rows);
  work.parts.resize(layout.segments().size());
  const auto chunk_at = [&](int64_t row) {
    return std::partition_point(work.chunks.begin(), work.chunks.end(),
                                [row](const Chunk& chunk) { return chunk.start < row; });
  };
  for (int64_t s = 0; s < static_cast<int64_t>(layout.segments().size()); ++s) {
    const Layout::Segment& segment = layout.segments()[s];
    Parts& parts = work.parts[s];
    for (int64_t r = segment.first_range; r < segment.last_range && segment.q_len > 0; ++r) {
      const KeyRange& range = layout.ranges()[r];
      const bool own = r + 1 == segment.last_range;
      for (auto chunk = chunk_at(range.start);
           chunk != work.chunks.end() && chunk->start < range.start + range.length; ++chunk) {
        const int64_t ahead = own ? chunk->start - range.start - segment.offset() : 0;
        const int64_t first = std::max<int64_t>(0, ahead);
        if (first >= segment.q_len) continue;
        const int64_t offset = own ? first - ahead : kSeesAll;
        chunk->reads.push_back({s, first, offset, static_cast<int64_t>(parts.first.size())});
        parts.first.push_back(first);
        chunk->pairs += static_cast<double>(segment.q_len - first) * static_cast<double>(chunk->keys);
      }
    }
    const bool whole = parts.first.size() == 1 && parts.first[0] == 0;
    if (!whole) {
      parts.begin = work.part_rows;
      work.part_rows += static_cast<int64_t>(parts.first.size()) * segment.q_len;
    }
  }
  for (Chunk& chunk : work.chunks) {
    work.longest = std::max(work.longest, chunk.keys);
    work.pairs += chunk.pairs;
    for (Read& read : chunk.reads) {
      const Parts& parts = work.parts[read.segment];
      if (parts.first.size() == 1 && parts.first[0] == 0) read.part = -1;
    }
  }
  return work;
}

}  // namespace

void compressed_context_attention_backward(Tensor grad_out_, std::optional<Tensor> grad_lse_, Tensor query_,
                                           Tensor key_, Tensor value_, Tensor out_, Tensor lse_,
                                           Tensor q_start, Tensor q_len, Tensor kv_start, Tensor kv_len,
                                           Tensor contexts, double scale, Tensor grad_query_,
                                           Tensor grad_key_, Tensor grad_value_) {
  const Storage storage = storage_of(query_, "query");
  for (Tensor* tensor : {&grad_out_, &query_, &key_, &value_, &out_}) make_dense(*tensor);
  if (!lse_.is_contiguous()) lse_ = torch::stable::contiguous(lse_);
  if (grad_lse_.has_value() && !grad_lse_->is_contiguous()) grad_lse_ = torch::stable::contiguous(*grad_lse_);
  const HeadsOf query(query_, "query", storage);
  const HeadsOf key(key_, "key", storage);
  const HeadsOf value(value_, "value", storage);
  const HeadsOf out(out_, "out", storage);
  const HeadsOf grad_out(grad_out_, "grad_out", storage);
  const HeadsOf grad_query(grad_query_, "grad_query", storage);
  const HeadsOf grad_key(grad_key_, "grad_key", storage);
  const HeadsOf grad_value(grad_value_, "grad_value", storage);
  const AttentionShape shape = attention_shape(query, key, value, scale);
  for (const HeadsOf* of : {&out, &grad_out}) {
    STD_TORCH_CHECK(of->rows == query.rows && of->heads == query.heads && of->size == value.size,
                    "out and grad_out must have the rows and heads of query and the size of value");
  }
  check_shape(grad_query_, "grad_query", {query.rows, query.heads, query.size});
  check_shape(grad_key_, "grad_key", {key.rows, key.heads, key.size});
  check_shape(grad_value_, "grad_value", {value.rows, value.heads, value.size});
  check_shape(lse_, "lse", {query.rows, query.heads});
  check_type(lse_, "lse", ScalarType::Float);
  const float* lse = static_cast<const float*>(lse_.const_data_ptr());
  const float* grad_lse = nullptr;
  if (grad_lse_.has_value()) {
    check_shape(*grad_lse_, "grad_lse", {query.rows, query.heads});
    check_type(*grad_lse_, "grad_lse", ScalarType::Float);
    grad_lse = static_cast<const float*>(grad_lse_->const_data_ptr());
  }
  const Layout layout(q_start, q_len, kv_start, kv_len, contexts, query.rows, key.rows);
  if (layout.rows_of_segments() < query.rows) {
    std::memset(grad_query_.mutable_data_ptr(), 0,
                static_cast<size_t>(grad_query_.numel() * element_size(storage)));
  }

  const AttentionLoops& loops = attention_kernels()[storage];
  const Work work = work_of(layout, key.rows);
  const int64_t part_row = query.heads * query.size;
  const Floats64 parts(work.part_rows * part_row);
  const auto run = [&](int64_t index, float* scratch) {
    const Chunk& chunk = work.chunks[index / key.heads];
    const int64_t head = index % key.heads;
    const int64_t first_head = head * shape.groups;
    std::vector<Reader> readers;
    readers.reserve(chunk.reads.size());
    for (const Read& read : chunk.reads) {
      const Layout::Segment& segment = layout.segments()[read.segment];
      const int64_t row = segment.q_start + read.first;
      Reader reader{};
      reader.positions = segment.q_len - read.first;
      reader.query = query.at(row, first_head);
      reader.grad_out = grad_out.at(row, first_head);
      reader.out = out.at(row, first_head);
      reader.lse = lse + row * query.heads + first_head;
      reader.grad_lse = grad_lse == nullptr ? nullptr : grad_lse + row * query.heads + first_head;
      reader.lse_position = query.heads;
      reader.offset = read.offset;
      reader.partial = read.part >= 0;
      if (reader.partial) {
        const int64_t part = work.parts[read.segment].begin + read.part * segment.q_len + read.first;
        float* data = parts.data + part * part_row + first_head * query.size;
        const auto bytes = static_cast<int64_t>(sizeof(float));
        reader.grad_query = {reinterpret_cast<char*>(data), part_row * bytes, query.size * bytes};
      } else {
        reader.grad_query = grad_query.mutable_at(row, first_head);
      }
      readers.push_back(reader);
    }
    const BackwardTask task{chunk.keys,
                            key.at(chunk.start, head),
                            value.at(chunk.start, head),
                            grad_key.mutable_at(chunk.start, head),
                            grad_value.mutable_at(chunk.start, head),
                            readers.data(),
                            static_cast<int64_t>(readers.size())};
    loops.backward(shape, task, scratch);
  };
  const double multiplications = work.pairs * static_cast<double>(query.heads) *
                                 static_cast<double>(3 * shape.size + 2 * shape.value_size);
  run_tasks(static_cast<int64_t>(work.chunks.size()) * key.heads, multiplications,
            backward_scratch(shape, work.longest), run);

  const auto add_up = [&](int64_t s, float*) {
    const Layout::Segment& segment = layout.segments()[s];
    const std::vector<int64_t>& first = work.parts[s].first;
    if (first.size() == 1 && first[0] == 0) return;
    int64_t count = 0;
    for (int64_t i = 0; i < segment.q_len; ++i) {
      while (count < static_cast<int64_t>(first.size()) && first[count] <= i) ++count;
      void* target = grad_query.mutable_at(segment.q_start + i, 0).data;
      if (count == 0) {
        std::memset(target, 0, static_cast<size_t>(part_row * element_size(storage)));
        continue;
      }
      loops.add_up(parts.data + (work.parts[s].begin + i) * part_row, segment.q_len * part_row, count,
                   part_row, target);
    }
  };
  run_tasks(static_cast<int64_t>(layout.segments().size()),
            static_cast<double>(work.part_rows * part_row) * 10, 0, add_up);
}

}  // namespace clara_fast::cpu
