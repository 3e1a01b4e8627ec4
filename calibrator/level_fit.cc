#include "calibrator/level_fit.h"

#include <algorithm>
#include <vector>

#include "calibrator/linear_algebra.h"
#include "calibrator/parallel.h"

namespace mobi {
namespace {

// A group whose codes are all equal has only rounding noise for a variance, and noise divided by
// noise is no range: below this share of the squared full range its codes count as equal.
constexpr double kLeastVariance = 1e-12;

// Position of a level's codes in the range, centred: (Q_k + 1/2) / 4^k - 1/2.
void CentredFractions(const uint8_t* codes, int64_t count, int level, float* out) {
  const int shift = kSliceBits * (kNumLevels - level);
  const float scale = 1.0f / static_cast<float>(1 << BitsOfLevel(level));
  for (int64_t j = 0; j < count; ++j) {
    out[j] = (static_cast<float>(codes[j] >> shift) + 0.5f) * scale - 0.5f;
  }
}

// Of a row's normal equations the lower triangle. The unknowns: the change of every group's range,
// then of every group's centre. `products` is the row's of PiecewiseProducts.
void FillSystem(const float* products, const std::vector<double>& group_sums, int64_t groups,
                double* a) {
  const int64_t n = 2 * groups;
  for (int64_t g = 0; g < groups; ++g) {
    const float* sums = products + g * n;
    for (int64_t h = 0; h < groups; ++h) a[(groups + h) * n + g] = sums[h];
    for (int64_t h = 0; h <= g; ++h) {
      a[g * n + h] = sums[groups + h];
      a[(groups + g) * n + groups + h] = group_sums[g * groups + h];
    }
  }
}

}  // namespace

std::vector<double> GroupSums(const Matrix& hessian, int num_threads) {
  const int64_t groups = hessian.cols() / kGroupSize;
  std::vector<double> sums(static_cast<size_t>(groups * groups));
  ParallelFor(num_threads, groups, [&](int64_t group) {
    for (int64_t i = group * kGroupSize; i < (group + 1) * kGroupSize; ++i) {
      for (int64_t h = 0; h < groups; ++h) {
        sums[group * groups + h] += Sum(hessian.Row(i) + h * kGroupSize, kGroupSize);
      }
    }
  });
  return sums;
}

ScaleFit FitScale(const float* target, const float* importance, const uint8_t* codes, int level) {
  float fraction[kGroupSize];
  CentredFractions(codes, kGroupSize, level, fraction);
  double s = 0, sf = 0, sw = 0;
  for (int j = 0; j < kGroupSize; ++j) {
    s += importance[j];
    sf += importance[j] * fraction[j];
    sw += importance[j] * target[j];
  }
  const double mean_f = s > 0 ? sf / s : 0, mean_w = s > 0 ? sw / s : 0;
  double ff = 0, fw = 0, ww = 0;
  for (int j = 0; j < kGroupSize; ++j) {
    const double f = fraction[j] - mean_f, w = target[j] - mean_w;
    ff += importance[j] * f * f;
    fw += importance[j] * f * w;
    ww += importance[j] * w * w;
  }
  const double range = ff > kLeastVariance * s ? std::max(fw / ff, 0.0) : 0.0;
  return {RoundedScale(range, mean_w - range * mean_f), ww - range * (2 * fw - range * ff)};
}

void FitRowDiagonal(const float* target, const float* importance, int64_t row,
                    NestedWeight& weight) {
  for (int64_t g = 0; g < weight.groups(); ++g) {
    const int64_t j = g * kGroupSize;
    for (int level = 1; level <= kNumLevels; ++level) {
      weight.Scale(level, row, g) =
          FitScale(target + j, importance + j, weight.Codes(row) + j, level).scale;
    }
  }
}

void RefitLevel(const Matrix& hessian, const std::vector<double>& group_sums, int level,
                int64_t begin, ConstMatrixView gradient, double ridge, NestedWeight& weight) {
  const int64_t rows = gradient.rows, cols = weight.cols, groups = weight.groups();
  const int n = static_cast<int>(2 * groups);
  Matrix fractions = Matrix::Unfilled(rows, cols), products;
  for (int64_t r = 0; r < rows; ++r) {
    CentredFractions(weight.Codes(begin + r), cols, level, fractions.Row(r));
  }
  PiecewiseProducts(fractions, hessian, kGroupSize, products);
  std::vector<double> system(static_cast<size_t>(n) * n), change(n);
  for (int64_t r = 0; r < rows; ++r) {
    double* a = system.data();
    FillSystem(products.Row(r), group_sums, groups, a);
    for (int i = 0; i < n; ++i) a[i * n + i] *= 1 + ridge;
    for (int64_t g = 0; g < groups; ++g) {
      const float* piece = gradient.Row(r) + g * kGroupSize;
      change[g] = -Dot(piece, fractions.Row(r) + g * kGroupSize, kGroupSize);
      change[groups + g] = -Sum(piece, kGroupSize);
    }
    if (!SolveSmall(a, change.data(), n)) continue;
    for (int64_t g = 0; g < groups; ++g) {
      LevelScale& scale = weight.Scale(level, begin + r, g);
      const double range = scale.range + change[g];
      scale = RoundedScale(range, scale.offset + 0.5 * scale.range + change[groups + g]);
    }
  }
}

}  // namespace mobi
