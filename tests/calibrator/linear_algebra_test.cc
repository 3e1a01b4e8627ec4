#include "calibrator/linear_algebra.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "calibrator/parallel.h"
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

// Products and matrices large enough for a device.
class DeviceTest : public testing::Test {
 protected:
  static constexpr int64_t kM = 300, kN = 520, kK = 400;
  void SetUp() override {
    if (const absl::Status status = UseDevice("cuda"); !status.ok()) GTEST_SKIP() << status;
  }
  void TearDown() override { ASSERT_TRUE(UseDevice("cpu").ok()); }

  static void ExpectNear(const Matrix& a, const Matrix& b) {
    ASSERT_EQ(a.size(), b.size());
    for (int64_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a.data()[i], b.data()[i], 2e-3) << i;
  }
};

// The three products of the same operands, read as pieces of them.
std::vector<Matrix> Products(const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k) {
  std::vector<Matrix> out;
  const ConstMatrixView x(a), y(b);
  out.push_back(RandomMatrix(m, n, 7));
  MultiplyTransposed(x.Rows(3, m).Columns(5, k), y.Rows(2, n).Columns(1, k), out.back(), 0.5f, 1);
  out.push_back(RandomMatrix(m, n, 8));
  Multiply(x.Rows(0, m).Columns(0, k), y.Rows(4, k).Columns(3, n), out.back());
  out.push_back(RandomMatrix(m, n, 9));
  TransposedMultiply(x.Rows(1, k).Columns(2, m), y.Rows(0, k).Columns(0, n), out.back(), 2, -1);
  out.push_back(RandomMatrix(k, k, 10));
  AddGram(x.Rows(1, m).Columns(2, k), out.back());
  MirrorLower(out.back());
  return out;
}

TEST_F(DeviceTest, MakesTheHostsProducts) {
  const Matrix a = RandomMatrix(420, 560, 1), b = RandomMatrix(540, 560, 2);
  const auto device = Products(a, b, kM, kN, kK);
  ASSERT_TRUE(UseDevice("cpu").ok());
  const auto host = Products(a, b, kM, kN, kK);
  for (size_t i = 0; i < host.size(); ++i) ExpectNear(device[i], host[i]);
}

TEST_F(DeviceTest, ReadsWhatIsKeptThereUntilItIsReplaced) {
  const Matrix a = RandomMatrix(420, 560, 1);
  KeptMatrix b(RandomMatrix(540, 560, 2));
  std::vector<Matrix> device;
  {
    const DeviceCopy copy(a);
    device = Products(a, b, kM, kN, kK);
  }
  b = KeptMatrix(RandomMatrix(540, 560, 3));
  for (Matrix& m : Products(a, b, kM, kN, kK)) device.push_back(std::move(m));
  b = KeptMatrix();
  ASSERT_TRUE(UseDevice("cpu").ok());
  std::vector<Matrix> host = Products(a, RandomMatrix(540, 560, 2), kM, kN, kK);
  for (Matrix& m : Products(a, RandomMatrix(540, 560, 3), kM, kN, kK)) host.push_back(std::move(m));
  ASSERT_EQ(device.size(), host.size());
  for (size_t i = 0; i < host.size(); ++i) ExpectNear(device[i], host[i]);
}

// Longer than what is copied at once, wider than a piece of rows, and from many threads.
TEST_F(DeviceTest, CopiesInPiecesSideBySide) {
  const Matrix a = RandomMatrix(6000, 640, 4), b = RandomMatrix(700, 640, 5);
  std::vector<Matrix> device(6, Matrix(6000, 700));
  ParallelFor(3, 6, [&](int64_t i) { MultiplyTransposed(a, b, device[i]); });
  ASSERT_TRUE(UseDevice("cpu").ok());
  Matrix host(6000, 700);
  MultiplyTransposed(a, b, host);
  for (const Matrix& m : device) ExpectNear(m, host);
}

// Factors and solutions of Hessians of several sizes, the larger ones read as pieces of a matrix.
std::vector<Matrix> Factors() {
  std::vector<Matrix> out;
  for (const int64_t n : {512, 701, 1408}) {
    const Matrix h = RandomHessian(n, 11), b = RandomMatrix(n / 3, n, 12);
    EXPECT_TRUE(InverseFactor(h, out.emplace_back()).ok());
    EXPECT_TRUE(SolveRows(h, b, out.emplace_back()).ok());
    const ConstMatrixView piece = ConstMatrixView(h).Rows(1, 600).Columns(1, 600);
    if (n <= piece.rows) continue;
    EXPECT_TRUE(InverseFactor(piece, out.emplace_back()).ok());
    EXPECT_TRUE(
        SolveRows(piece, ConstMatrixView(b).Rows(2, 1).Columns(3, 600), out.emplace_back()).ok());
  }
  return out;
}

// Both are made in double, the host's by either of its libraries' kernels: they differ by what the
// condition of the matrices makes of that.
TEST_F(DeviceTest, FactorizesAsTheHostDoes) {
  const auto device = Factors(), again = Factors();
  ASSERT_TRUE(UseDevice("cpu").ok());
  const auto host = Factors();
  ASSERT_EQ(device.size(), host.size());
  for (size_t i = 0; i < host.size(); ++i) {
    ASSERT_EQ(device[i].rows(), host[i].rows());
    ASSERT_EQ(device[i].cols(), host[i].cols());
    float largest = 0;
    for (int64_t j = 0; j < host[i].size(); ++j) {
      largest = std::max(largest, std::abs(host[i].data()[j]));
    }
    for (int64_t j = 0; j < host[i].size(); ++j) {
      ASSERT_NEAR(device[i].data()[j], host[i].data()[j], 4e-6 * largest) << i << " at " << j;
      ASSERT_EQ(device[i].data()[j], again[i].data()[j]) << i << " at " << j;
    }
  }
}

TEST_F(DeviceTest, RefusesWhatIsNotPositiveDefiniteAsTheHostDoes) {
  constexpr int64_t n = 650;
  const Matrix b = RandomMatrix(4, n, 13);
  const auto refusals = [&](float value) {
    Matrix h = RandomHessian(n, 14), out;
    h(400, 400) = value;
    return std::vector<absl::Status>{InverseFactor(h, out), SolveRows(h, b, out)};
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto device = refusals(-1), device_nan = refusals(nan);
  ASSERT_TRUE(UseDevice("cpu").ok());
  const auto host = refusals(-1), host_nan = refusals(nan);
  for (size_t i = 0; i < host.size(); ++i) {
    EXPECT_EQ(host[i].code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(device[i], host[i]);
    EXPECT_EQ(device_nan[i].code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(host_nan[i].code(), absl::StatusCode::kFailedPrecondition);
  }
}

TEST_F(DeviceTest, FactorizesBesideProducts) {
  const Matrix a = RandomMatrix(900, 640, 15), b = RandomMatrix(700, 640, 16);
  const Matrix h = RandomHessian(768, 17);
  const auto run = [&] {
    std::vector<Matrix> out(8);
    ParallelFor(4, 8, [&](int64_t i) {
      if (i % 2 == 0) {
        EXPECT_TRUE(InverseFactor(h, out[i]).ok());
        return;
      }
      out[i] = Matrix(900, 700);
      MultiplyTransposed(a, b, out[i]);
    });
    return out;
  };
  const auto device = run();
  ASSERT_TRUE(UseDevice("cpu").ok());
  const auto host = run();
  for (size_t i = 0; i < host.size(); ++i) ExpectNear(device[i], host[i]);
}

}  // namespace
}  // namespace mobi
