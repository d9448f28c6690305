// A linear layer, with a LoRA adapter if given, for so few rows that reading the weight is all of the work,
// as in decoding. The weight is read once, by all threads, as cosine_topk reads its keys.
#include <vector>

#include "ops.h"
#include "search_kernels.h"
#include "tensors.h"

namespace clara_fast::cpu {
namespace {

constexpr int64_t kBlock = 48;              // outputs that a thread computes at a time
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

// sums[j][row] += the product of row j of the matrix, from `first` on, with each input.
void add_products(const Matrix& matrix, int64_t first, int64_t count, const Inputs& inputs,
                  float (*sums)[kLanes]) {
  const Stream stream =
      search_kernels().stream[static_cast<int>(Format::kFloats)][static_cast<int>(matrix.storage)];
  float parts[kBlock][kLanes];
  float squares[kBlock];  // what else Stream computes
  for (int64_t begin = 0; begin < matrix.columns; begin += kStreamSpan) {
    const void* rows[kStreamRows];
    void* outs[kStreamRows];
    for (int64_t r = 0; r < inputs.count; ++r) {
      rows[r] = inputs[r] + begin;
      outs[r] = &parts[0][r];
    }
    const char* keys = static_cast<const char*>(matrix.rows[first]) + begin * element_size(matrix.storage);
    stream(keys, matrix.rows.stride, count, std::min(kStreamSpan, matrix.columns - begin), rows, inputs.count,
           outs, {squares, nullptr});
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t r = 0; r < inputs.count; ++r) sums[j][r] += parts[j][r];
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
    for (int64_t begin = 0; begin < rank; begin += kBlock) {
      const int64_t block = std::min(kBlock, rank - begin);
      float sums[kBlock][kLanes] = {};
      add_products(first, begin, block, inputs, sums);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t j = 0; j < block; ++j) hidden[r][begin + j] = static_cast<float>(scaling) * sums[j][r];
      }
    }
  }

  Tensor out = torch::stable::new_empty(x, {count, outputs});
  const MutableRows results(out, storage, outputs);
  const int64_t share = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, columns * kBlock));
  torch::stable::parallel_for(0, ceil_div(outputs, kBlock), share, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kBlock; first < std::min(outputs, end * kBlock); first += kBlock) {
      const int64_t block = std::min(kBlock, outputs - first);
      float sums[kBlock][kLanes] = {};
      add_products(matrix, first, block, inputs, sums);
      if (adapter.has_value()) add_products(*adapter, first, block, hidden, sums);
      for (int64_t r = 0; r < count; ++r) {
        float row[kBlock];
        for (int64_t j = 0; j < block; ++j) row[j] = sums[j][r] + shift[first + j];
        kernels()[storage].narrow(row, block, static_cast<char*>(results[r]) + first * element_size(storage));
      }
    }
  });
  return out;
}

}  // namespace clara_fast::cpu
