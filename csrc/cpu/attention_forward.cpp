// compressed_context_attention, forward: a task is a block of a segment's rows with one key head. A few rows
// on many keys, as in decoding, are shared out by keys too.
#include <array>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "ops.h"

namespace clara_fast::cpu {
namespace {

// Keys of a share: enough to be worth a task, and a number that does not depend on the threads.
constexpr int64_t kShareKeys = 512;

struct Block {
  const Layout::Segment* segment;
  int64_t first, positions;
  int64_t keys;  // that its last position sees
  bool few;
  int64_t share, shares;  // of the keys
  int64_t first_partial;  // of its shares, per key head; -1: one share alone
};

struct Blocks {
  std::vector<Block> blocks;
  int64_t partials = 0;
  double pairs = 0;
};

Blocks blocks_of(const Layout& layout, int64_t groups) {
  Blocks found;
  const int64_t most = std::max<int64_t>(1, kBlockRows / groups);
  for (const Layout::Segment& segment : layout.segments()) {
    const int64_t count = ceil_div(segment.q_len, most);
    const bool few = segment.q_len * groups <= kFewRows;
    // The last ones see most: first, so that they do not end the work alone.
    for (int64_t b = count - 1; b >= 0; --b) {
      const int64_t first = part_begin(segment.q_len, b, count);
      const int64_t end = part_begin(segment.q_len, b + 1, count);
      const int64_t keys = segment.context_keys + std::max<int64_t>(0, end + segment.offset());
      const int64_t shares = few ? std::max<int64_t>(1, ceil_div(keys, kShareKeys)) : 1;
      for (int64_t share = 0; share < shares; ++share) {
        found.blocks.push_back(
            {&segment, first, end - first, keys, few, share, shares, shares > 1 ? found.partials : -1});
      }
      if (shares > 1) found.partials += shares;
      found.pairs += static_cast<double>(end - first) * static_cast<double>(keys);
    }
  }
  return found;
}

}  // namespace

Tensor compressed_context_attention_forward(Tensor query_, Tensor key_, Tensor value_, Tensor q_start,
                                            Tensor q_len, Tensor kv_start, Tensor kv_len, Tensor contexts,
                                            double scale, std::optional<Tensor> lse_) {
  const Storage storage = storage_of(query_, "query");
  for (Tensor* tensor : {&query_, &key_, &value_}) make_dense(*tensor);
  const HeadsOf query(query_, "query", storage);
  const HeadsOf key(key_, "key", storage);
  const HeadsOf value(value_, "value", storage);
  const AttentionShape shape = attention_shape(query, key, value, scale);
  Tensor out_ = new_large(query_, std::array<int64_t, 3>{query.rows, query.heads, value.size});
  const HeadsOf out(out_, "out", storage);
  if (lse_.has_value()) {
    check_shape(*lse_, "lse", {query.rows, query.heads});
    check_type(*lse_, "lse", ScalarType::Float);
  }
  const Layout layout(q_start, q_len, kv_start, kv_len, contexts, query.rows, key.rows);
  float* lse = lse_.has_value() ? static_cast<float*>(lse_->mutable_data_ptr()) : nullptr;
  if (layout.rows_of_segments() < query.rows) {
    std::memset(out_.mutable_data_ptr(), 0, static_cast<size_t>(out_.numel() * element_size(storage)));
    if (lse != nullptr) std::fill_n(lse, query.rows * query.heads, -INFINITY);
  }

  const AttentionLoops& loops = attention_kernels()[storage];
  const Blocks work = blocks_of(layout, shape.groups);
  const Floats64 partials(work.partials * key.heads * partial_size(shape));
  const auto task_of = [&](const Block& block, int64_t head) {
    const Layout::Segment& segment = *block.segment;
    const int64_t row = segment.q_start + block.first;
    const int64_t first_head = head * shape.groups;
    ForwardTask task{};
    task.positions = block.positions;
    task.query = query.at(row, first_head);
    task.key = key.at(0, head);
    task.value = value.at(0, head);
    task.ranges = layout.ranges() + segment.first_range;
    task.own = segment.context_keys;
    task.offset = segment.offset() + block.first;
    task.first_key = part_begin(block.keys, block.share, block.shares);
    task.last_key = part_begin(block.keys, block.share + 1, block.shares);
    task.out = out.mutable_at(row, first_head);
    task.lse = lse == nullptr ? nullptr : lse + row * query.heads + first_head;
    task.lse_position = query.heads;
    if (block.first_partial >= 0) {
      task.partial = partials.data + (block.first_partial * key.heads + head * block.shares + block.share) *
                                         partial_size(shape);
    }
    return task;
  };
  const double multiplications =
      work.pairs * static_cast<double>(query.heads) * static_cast<double>(shape.size + shape.value_size);
  run_tasks(static_cast<int64_t>(work.blocks.size()) * key.heads, multiplications, forward_scratch(shape),
            [&](int64_t index, float* scratch) {
              const Block& block = work.blocks[index / key.heads];
              const ForwardTask task = task_of(block, index % key.heads);
              (block.few ? loops.forward_few : loops.forward)(shape, task, scratch);
            });
  for (const Block& block : work.blocks) {
    if (block.first_partial < 0 || block.share > 0) continue;
    for (int64_t head = 0; head < key.heads; ++head) {
      const ForwardTask task = task_of(block, head);
      loops.merge(shape, task, task.partial, block.shares);
    }
  }
  return out_;
}

}  // namespace clara_fast::cpu
