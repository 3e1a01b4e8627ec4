#include "calibrator/mixed_linear.h"

#include <algorithm>
#include <random>
#include <utility>

#include "calibrator/linear_algebra.h"
#include "calibrator/vector_math.h"

namespace mobi {
namespace {

Matrix GatherRows(ConstMatrixView x, const std::vector<int64_t>& rows) {
  Matrix out(static_cast<int64_t>(rows.size()), x.cols);
  for (size_t i = 0; i < rows.size(); ++i) {
    std::copy_n(x.Row(rows[i]), x.cols, out.Row(static_cast<int64_t>(i)));
  }
  return out;
}

}  // namespace

std::array<std::vector<int64_t>, kNumLevels> TokensByLevel(const uint8_t* levels, int64_t tokens) {
  std::array<std::vector<int64_t>, kNumLevels> of_level;
  for (int64_t t = 0; t < tokens; ++t) of_level[levels[t] - 1].push_back(t);
  return of_level;
}

std::vector<uint8_t> DrawLevels(const std::array<uint64_t, 3>& key,
                                const std::array<double, kNumLevels>& shares, size_t count) {
  std::seed_seq seed{key[0], key[0] >> 32, key[1], key[2]};
  std::mt19937_64 random(seed);
  std::vector<uint8_t> levels(count);
  for (uint8_t& level : levels) {
    double left = static_cast<double>(random() >> 11) * 0x1.0p-53;
    level = 1;
    while (level < kNumLevels && left >= shares[level - 1]) left -= shares[level++ - 1];
  }
  return levels;
}

MixedLinear::MixedLinear(const NestedWeight& weight, std::vector<int64_t> segment_rows,
                         int num_threads)
    : segment_rows_(std::move(segment_rows)) {
  for (int level = 1; level <= kNumLevels; ++level) {
    levels_[level - 1] = KeptMatrix(Dequantize(weight, level, num_threads));
  }
}

int64_t MixedLinear::SegmentBegin(int segment) const {
  int64_t begin = 0;
  for (int s = 0; s < segment; ++s) begin += segment_rows_[s];
  return begin;
}

void MixedLinear::Forward(ConstMatrixView x, const uint8_t* levels, MatrixView out) const {
  for (int s = 0; s < num_segments(); ++s) {
    const int64_t begin = SegmentBegin(s), rows = segment_rows_[s];
    const auto tokens = TokensByLevel(levels + s * x.rows, x.rows);
    for (int k = 0; k < kNumLevels; ++k) {
      const ConstMatrixView weight = ConstMatrixView(levels_[k].get()).Rows(begin, rows);
      const auto count = static_cast<int64_t>(tokens[k].size());
      if (count == 0) continue;
      if (count == x.rows) {
        MultiplyTransposed(x, weight, out.Columns(begin, rows));
        continue;
      }
      Matrix product(count, rows);
      MultiplyTransposed(GatherRows(x, tokens[k]), weight, product);
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(product.Row(i), rows, out.Row(tokens[k][i]) + begin);
      }
    }
  }
}

void MixedLinear::Backward(ConstMatrixView d_out, const uint8_t* levels, MatrixView d_x) const {
  for (int64_t t = 0; t < d_x.rows; ++t) std::fill_n(d_x.Row(t), d_x.cols, 0.0f);
  for (int s = 0; s < num_segments(); ++s) {
    const int64_t begin = SegmentBegin(s), rows = segment_rows_[s];
    const ConstMatrixView d_segment = d_out.Columns(begin, rows);
    const auto tokens = TokensByLevel(levels + s * d_out.rows, d_out.rows);
    for (int k = 0; k < kNumLevels; ++k) {
      const ConstMatrixView weight = ConstMatrixView(levels_[k].get()).Rows(begin, rows);
      const auto count = static_cast<int64_t>(tokens[k].size());
      if (count == 0) continue;
      if (count == d_out.rows) {
        Multiply(d_segment, weight, d_x, 1, 1);
        continue;
      }
      Matrix product(count, d_x.cols);
      Multiply(GatherRows(d_segment, tokens[k]), weight, product);
      for (int64_t i = 0; i < count; ++i) {
        AddScaled(d_x.Row(tokens[k][i]), product.Row(i), 1, d_x.cols);
      }
    }
  }
}

Matrix MixedLinear::WeightGradient(int segment, ConstMatrixView x, ConstMatrixView d_out,
                                   const uint8_t* levels, int level) const {
  const auto tokens = TokensByLevel(levels + segment * x.rows, x.rows)[level - 1];
  if (tokens.empty()) return {};
  const int64_t rows = segment_rows_[segment];
  const ConstMatrixView d_segment = d_out.Columns(SegmentBegin(segment), rows);
  Matrix gradient(rows, cols());
  if (static_cast<int64_t>(tokens.size()) == x.rows) {
    TransposedMultiply(d_segment, x, gradient);
  } else {
    TransposedMultiply(GatherRows(d_segment, tokens), GatherRows(x, tokens), gradient);
  }
  return gradient;
}

void MixedLinear::Refresh(const NestedWeight& weight, int level) {
  levels_[level - 1] = KeptMatrix(Dequantize(weight, level));
}

}  // namespace mobi
