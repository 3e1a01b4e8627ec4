#include "calibrator/linear_algebra.h"

#include <gtest/gtest.h>

#include "tests/calibrator/random_matrix.h"

namespace mobi {
namespace {

Matrix RandomHessian(int64_t n, uint64_t seed) {
  const Matrix x = RandomMatrix(2 * n, n, seed);
  Matrix h(n, n);
  AddGram(x, h, 1.0f / static_cast<float>(x.rows()));
  MirrorLower(h);
  return h;
}

TEST(LinearAlgebraTest, InverseFactorIsUpperAndItsSquareInverts) {
  constexpr int64_t n = 40;
  const Matrix h = RandomHessian(n, 1);
  Matrix u;
  ASSERT_TRUE(InverseFactor(h, u).ok());
  Matrix inverse(n, n), identity(n, n);
  TransposedMultiply(u, u, inverse);
  Multiply(inverse, h, identity);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      EXPECT_NEAR(identity(i, j), i == j, 1e-3);
      if (j < i) {
        EXPECT_EQ(u(i, j), 0);
      }
    }
  }
}

TEST(LinearAlgebraTest, SolveRowsSolves) {
  const Matrix h = RandomHessian(30, 2), b = RandomMatrix(5, 30, 3);
  Matrix x, product(5, 30);
  ASSERT_TRUE(SolveRows(h, b, x).ok());
  Multiply(x, h, product);
  for (int64_t i = 0; i < b.size(); ++i) EXPECT_NEAR(product.data()[i], b.data()[i], 1e-4);
}

TEST(LinearAlgebraTest, IndefiniteMatricesAreRefused) {
  Matrix h(3, 3);
  h(0, 0) = h(1, 1) = 1;
  h(2, 2) = -1;
  Matrix out;
  EXPECT_EQ(InverseFactor(h, out).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(SolveRows(h, Matrix(1, 3), out).code(), absl::StatusCode::kFailedPrecondition);
  double a[4] = {1, 0, 2, 1}, b[2] = {1, 1};  // [[1, 2], [2, 1]]
  EXPECT_FALSE(SolveSmall(a, b, 2));
}

TEST(LinearAlgebraTest, SolveSmallSolves) {
  double a[9] = {4, 0, 0, 1, 3, 0, -1, 0.5, 2}, b[3] = {1, 2, 3};
  ASSERT_TRUE(SolveSmall(a, b, 3));
  EXPECT_NEAR(4 * b[0] + 1 * b[1] - 1 * b[2], 1, 1e-12);
  EXPECT_NEAR(1 * b[0] + 3 * b[1] + 0.5 * b[2], 2, 1e-12);
  EXPECT_NEAR(-1 * b[0] + 0.5 * b[1] + 2 * b[2], 3, 1e-12);
}

}  // namespace
}  // namespace mobi
