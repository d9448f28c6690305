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

KeyFactor key_factor(const RowKernels& rows, const void* key, int64_t columns, float square, float scale) {
  if (std::isnan(square) || !std::isfinite(scale)) return {kNaN, KeyKind::kNan};
  if (scale == 0.0f) return {0.0f, KeyKind::kZero};
  if (square >= kSmallestSquare && square <= kLargestSquare) {
    return {std::copysign(1.0f / std::sqrt(square), scale), KeyKind::kPlain};
  }
  std::vector<float> wide(columns);
  rows.widen(key, columns, columns, wide.data());
  const bool zero = std::all_of(wide.begin(), wide.end(), [](float x) { return x == 0.0f; });
  return zero ? KeyFactor{0.0f, KeyKind::kZero} : KeyFactor{kNaN, KeyKind::kExact};
}

float special_score(const RowKernels& rows, const void* key, int64_t columns, KeyKind kind, float scale,
                    const Queries& queries, int64_t query) {
  if (kind == KeyKind::kZero || queries.inverse(query) == 0.0f) return 0.0f;
  if (kind == KeyKind::kNan || std::isnan(queries.inverse(query))) return kNaN;
  std::vector<float> wide(columns);
  rows.widen(key, columns, columns, wide.data());
  const float* q = queries[query];
  double dot = 0.0;
  for (int64_t i = 0; i < columns; ++i) dot += static_cast<double>(wide[i]) * q[i];
  return static_cast<float>(std::copysign(1.0, scale) * dot / exact_norm(wide.data(), columns) *
                            queries.inverse(query));
}

}  // namespace clara_fast::cpu
