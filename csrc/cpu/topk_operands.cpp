#include "topk_operands.h"

#include <cmath>
#include <cstring>
#include <memory>

namespace clara_fast::cpu {
namespace {

// More queries than this meet the keys in panels.
constexpr int64_t kFewQueries = 8;
// Rows are padded to so many columns, a vector of the widest step.
constexpr int64_t kPadColumns = 64;

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // x is finite and at most 1
}

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// Each of these writes the terms of `row`, `stride` bytes apart, over zeros.

void write_halves(const float* row, int64_t columns, float* out) {
  for (int64_t i = 0; i < columns; ++i) out[i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = row[i];
}

void write_pairs(const float* row, int64_t columns, int64_t terms, char* out, int64_t stride) {
  for (int64_t i = 0; i < columns; ++i) {
    float left = row[i];
    for (int64_t t = 0; t < terms; ++t) {
      const uint16_t term = to_bf16(left);
      std::memcpy(out + t * stride + i * 2, &term, sizeof(term));
      left -= from_bf16(term);
    }
  }
}

// Returns the value of a unit.
float write_digits(const float* row, int64_t columns, char* out, int64_t stride) {
  float largest = 0.0f;
  for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, std::fabs(row[i]));
  int exponent;
  std::frexp(largest, &exponent);
  const float scale = std::ldexp(static_cast<float>(kDigitOffset), -exponent);
  for (int64_t i = 0; i < columns; ++i) {
    const int32_t whole = std::min(static_cast<int32_t>(std::lrint(row[i] * scale)), kDigitOffset - 1);
    const uint32_t raised = static_cast<uint32_t>(whole + kDigitOffset);
    for (int64_t t = 0; t < kTerms; ++t) out[t * stride + i] = static_cast<char>(raised >> (8 * t));
  }
  return 1.0f / scale;
}

}  // namespace

Plan choose_plan(Storage queries, Storage keys, int64_t num_queries) {
  const SearchKernels& has = search_kernels();
  const auto index = [](auto which) { return static_cast<int>(which); };
  const bool halves = queries == Storage::kBFloat16;
  if (num_queries <= kFewQueries) {
    const auto streams = [&](Format format) { return has.stream[index(format)][index(keys)] != nullptr; };
    if (streams(Format::kDigits)) return {Format::kDigits, kTerms, true};
    if (halves && streams(Format::kPairs)) return {Format::kPairs, 1, true};
    if (streams(Format::kHalves)) return {Format::kHalves, 1, true};
    return {Format::kFloats, 1, true};
  }
  const auto multiplies = [&](Format format) {
    return has.tile[index(format)] != nullptr && has.convert[index(format)][index(keys)] != nullptr;
  };
  if (halves && multiplies(Format::kPairs)) return {Format::kPairs, 1, false};
  if (multiplies(Format::kDigits)) return {Format::kDigits, kTerms, false};
  if (has.prefers_terms && multiplies(Format::kPairs)) return {Format::kPairs, kTerms, false};
  return {Format::kFloats, 1, false};
}

Operands::Operands(const Plan& plan, const Queries& queries, int64_t count, int64_t columns)
    : plan_(plan),
      count_(count),
      row_bytes_(ceil_div(columns, kPadColumns) * kPadColumns * element_bytes(plan.format)),
      units_(panels() * kLanes),
      inverses_(panels() * kLanes) {
  const int64_t rows = (plan.streams ? count : panels() * kLanes) * plan.terms;
  size_t room = rows * row_bytes_ + kRowAlign;
  memory_.resize(room);
  void* start = memory_.data();
  data_ = static_cast<char*>(std::align(kRowAlign, rows * row_bytes_, start, room));

  const int64_t per_item = plan.streams ? 1 : kLanes;
  torch::stable::parallel_for(
      0, ceil_div(count, per_item), grain(per_item * columns), [&](int64_t first, int64_t last) {
        std::vector<char> terms(plan.terms * row_bytes_);
        for (int64_t q = first * per_item; q < std::min(count, last * per_item); ++q) {
          inverses_[q] = queries.inverse(q);
          if (std::isnan(inverses_[q])) continue;  // all its scores are NaN
          std::fill(terms.begin(), terms.end(), 0);
          float* floats = reinterpret_cast<float*>(terms.data());
          switch (plan.format) {
            case Format::kHalves:
              write_halves(queries[q], columns, floats);
              break;
            case Format::kPairs:
              write_pairs(queries[q], columns, plan.terms, terms.data(), row_bytes_);
              break;
            case Format::kDigits:
              units_[q] = write_digits(queries[q], columns, terms.data(), row_bytes_);
              break;
            default:
              std::copy_n(queries[q], columns, floats);
          }
          for (int64_t t = 0; t < plan.terms; ++t) {
            const char* term = terms.data() + t * row_bytes_;
            if (plan.streams) {
              std::memcpy(at(q * plan.terms + t), term, row_bytes_);
            } else {
              char* lane = at((q / kLanes * plan.terms + t) * kLanes) + q % kLanes * 4;
              for (int64_t g = 0; g < row_bytes_ / 4; ++g)
                std::memcpy(lane + g * kLanes * 4, term + g * 4, 4);
            }
          }
        }
      });
}

char* Operands::at(int64_t row) const { return data_ + row * row_bytes_; }

const void* Operands::row(int64_t query, int64_t term, int64_t column) const {
  return at(query * plan_.terms + term) + column * element_bytes(plan_.format);
}

const void* Operands::panel(int64_t panel, int64_t term, int64_t column) const {
  return at((panel * plan_.terms + term) * kLanes) + column * element_bytes(plan_.format) * kLanes;
}

}  // namespace clara_fast::cpu
