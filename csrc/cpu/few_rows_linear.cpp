// A linear layer, with a LoRA adapter if given, for so few rows that reading the weight is all of the work,
// as in decoding. The weight is read once, by all threads, as cosine_topk reads its keys.
#include <vector>

#include "ops.h"
#include "streams.h"
#include "tensors.h"

namespace clara_fast::cpu {
namespace {

constexpr int64_t kWorthAThread = 1 << 16;  // elements of the weight

// Rows in float32, padded with zeros to what Stream reads.
struct Inputs {
  int64_t count, stride;
  std::vector<float> values;

  Inputs(int64_t count, int64_t columns)
      : count(count), stride(ceil_div(columns, kSpanAlign) * kSpanAlign), values(count * stride) {}
  float* operator[](int64_t row) { return values.data() + row * stride; }
  const float* operator[](int64_t row) const { return values.data() + row * stride; }
};

struct Matrix {
  Storage storage;
  int64_t columns;
  Rows rows;

  Matrix(const Tensor& tensor, const char* name)
      : storage(storage_of(tensor, name)), columns(tensor.size(1)), rows(tensor, storage, columns) {}
};

// Products by [row][place]: see StreamedKeys.
using Products = float[kStreamRows][kStreamBlock];

// products += those of each input with the rows of the matrix that streams have from `at` on.
void add_products(const Matrix& matrix, const Streams& streams, int64_t at, const Inputs& inputs,
                  Products& products) {
  const Stream stream =
      search_kernels().stream[static_cast<int>(Format::kFloats)][static_cast<int>(matrix.storage)];
  Products parts;
  float squares[kStreamBlock];  // what else Stream computes
  for (int64_t begin = 0; begin < matrix.columns; begin += kStreamSpan) {
    const void* rows[kStreamRows];
    void* outs[kStreamRows];
    for (int64_t r = 0; r < inputs.count; ++r) {
      rows[r] = inputs[r] + begin;
      outs[r] = parts[r];
    }
    StreamedKeys keys = streams.keys(matrix.rows, at, kStreamKeys);
    keys.first = static_cast<const char*>(keys.first) + begin * element_size(matrix.storage);
    stream(keys, std::min(kStreamSpan, matrix.columns - begin), rows, inputs.count, outs, {squares, nullptr});
    for (int64_t r = 0; r < inputs.count; ++r) {
      for (int64_t place = 0; place < keys.counts[0] * kStreams; ++place)
        products[r][place] += parts[r][place];
    }
  }
}

}  // namespace

Tensor few_rows_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> down,
                       std::optional<Tensor> up, double scaling) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and weight must have two dimensions");
  STD_TORCH_CHECK(down.has_value() == up.has_value(), "down and up go together");
  const int64_t count = x.size(0), columns = x.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(count >= 1 && count <= kStreamRows, "x must have 1 to ", kStreamRows, " rows");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  check_shape(weight, "weight", {outputs, columns});
  const Storage storage = storage_of(x, "x");
  const Matrix matrix(weight, "weight");

  std::vector<float> shift(outputs);
  if (bias.has_value()) {
    check_shape(*bias, "bias", {outputs});
    kernels()[storage_of(*bias, "bias")].widen(bias->const_data_ptr(), outputs, outputs, shift.data());
  }
  Inputs inputs(count, columns);
  const Rows rows(x, storage, columns);
  for (int64_t r = 0; r < count; ++r) kernels()[storage].widen(rows[r], columns, columns, inputs[r]);

  std::optional<Matrix> adapter;
  Inputs hidden(count, 0);
  if (down.has_value()) {
    const int64_t rank = down->size(0);
    check_shape(*down, "down", {rank, columns});
    check_shape(*up, "up", {outputs, rank});
    adapter.emplace(*up, "up");
    hidden = Inputs(count, rank);
    const Matrix first(*down, "down");
    const Streams streams(0, rank);
    for (int64_t at = 0; at < streams.length(); at += kStreamKeys) {
      Products products = {};
      add_products(first, streams, at, inputs, products);
      for (int64_t s = 0; s < kStreams; ++s) {
        for (int64_t j = 0; j < streams.count(s, at, kStreamKeys); ++j) {
          for (int64_t r = 0; r < count; ++r) {
            hidden[r][streams.row(s, at) + j] = static_cast<float>(scaling) * products[r][j * kStreams + s];
          }
        }
      }
    }
  }

  Tensor out = torch::stable::new_empty(x, {count, outputs});
  const MutableRows results(out, storage, outputs);
  const int64_t blocks = ceil_div(outputs, kStreamBlock);
  const int64_t share = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, columns * kStreamBlock));
  torch::stable::parallel_for(0, blocks, share, [&](int64_t begin, int64_t end) {
    const Streams streams(begin * kStreamBlock, std::min(outputs, end * kStreamBlock));
    for (int64_t at = 0; at < streams.length(); at += kStreamKeys) {
      Products products = {};
      add_products(matrix, streams, at, inputs, products);
      if (adapter.has_value()) add_products(*adapter, streams, at, hidden, products);
      for (int64_t s = 0; s < kStreams; ++s) {
        const int64_t first = streams.row(s, at), some = streams.count(s, at, kStreamKeys);
        for (int64_t r = 0; r < count; ++r) {
          float row[kStreamKeys];
          for (int64_t j = 0; j < some; ++j) row[j] = products[r][j * kStreams + s] + shift[first + j];
          kernels()[storage].narrow(row, some,
                                    static_cast<char*>(results[r]) + first * element_size(storage));
        }
      }
    }
  });
  return out;
}

}  // namespace clara_fast::cpu
