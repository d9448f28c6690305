#include "cosine.h"

namespace clara_fast::cpu {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

}  // namespace

double exact_norm(const float* row, int64_t columns) {
  double square = 0.0;
  for (int64_t i = 0; i < columns; ++i) square += static_cast<double>(row[i]) * row[i];
  return std::sqrt(square);
}

Queries::Queries(const Tensor& tensor, Storage storage, int64_t begin, int64_t count, int64_t columns)
    : stride_(ceil_div(columns, kPad) * kPad), values_(count * stride_), inverse_(count) {
  const Rows rows(tensor, storage, columns);
  torch::stable::parallel_for(0, count, grain(columns), [&](int64_t first, int64_t last) {
    for (int64_t q = first; q < last; ++q) {
      float* row = values_.data() + q * stride_;
      kernels()[storage].widen(rows[begin + q], columns, stride_, row);
      const double norm = exact_norm(row, columns);
      if (norm == 0.0) {
        inverse_[q] = 0.0f;
      } else if (!std::isfinite(norm)) {
        inverse_[q] = kNaN;
      } else {
        int exponent;
        inverse_[q] = static_cast<float>(1.0 / std::frexp(norm, &exponent));
        const double scale = std::ldexp(1.0, -exponent);
        for (int64_t i = 0; i < columns; ++i) row[i] = static_cast<float>(row[i] * scale);
      }
    }
  });
}

float KeyScales::largest() const {
  float found = 0.0f;
  for (int64_t g = 0; g < count; ++g) {
    const float size = std::fabs((*this)[g]);
    if (!(size <= std::numeric_limits<float>::max())) return kNaN;
    found = std::max(found, size);
  }
  return found;
}

KeyFactor key_factor(const RowKernels& rows, const void* key, int64_t columns, float square,
                     const KeyScales& scales) {
  const float largest = scales.largest();
  if (std::isnan(square) || std::isnan(largest)) return {kNaN, KeyKind::kNan};
  if (largest == 0.0f) return {0.0f, KeyKind::kZero};
  if (square >= kSmallestSquare && square <= kLargestSquare) {
    const float sign = scales.count == 1 ? scales[0] : 1.0f;  // several are in the sums with their signs
    return {std::copysign(1.0f / std::sqrt(square), sign), KeyKind::kPlain};
  }
  std::vector<float> wide(columns);
  rows.widen(key, columns, columns, wide.data());
  const int64_t width = columns / scales.count;
  for (int64_t i = 0; i < columns; ++i) {
    if (wide[i] != 0.0f && scales[i / width] != 0.0f) return {kNaN, KeyKind::kExact};
  }
  return {0.0f, KeyKind::kZero};
}

float special_score(const RowKernels& rows, const void* key, int64_t columns, KeyKind kind,
                    const KeyScales& scales, const Queries& queries, int64_t query) {
  if (kind == KeyKind::kZero || queries.inverse(query) == 0.0f) return 0.0f;
  if (kind == KeyKind::kNan || std::isnan(queries.inverse(query))) return kNaN;
  std::vector<float> wide(columns);
  rows.widen(key, columns, columns, wide.data());
  const float* q = queries[query];
  const int64_t width = columns / scales.count;
  double dot = 0.0, square = 0.0;
  for (int64_t i = 0; i < columns; ++i) {
    const double value = static_cast<double>(wide[i]) * scales[i / width];
    dot += value * q[i];
    square += value * value;
  }
  return static_cast<float>(dot / std::sqrt(square) * queries.inverse(query));
}

}  // namespace clara_fast::cpu
