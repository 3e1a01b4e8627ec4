#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "calibrator/linear_algebra.h"
#include "calibrator/linear_fit.h"
#include "calibrator/parallel.h"
#include "calibrator/statistics.h"
#include "tests/calibrator/random_matrix.h"

namespace mobi {
namespace {

// What the device makes is compared with what the host makes; with no room there for some of the
// matrices, or for any, the host's values are the device's too.
class DeviceMatrixTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    if (const absl::Status status = UseDevice("cuda", GetParam()); !status.ok()) {
      GTEST_SKIP() << status;
    }
  }
  void TearDown() override { UseHost(); }
  static void UseHost() { ASSERT_TRUE(UseDevice("cpu").ok()); }

  static void ExpectNear(const std::vector<Matrix>& a, const std::vector<Matrix>& b,
                         double tolerance) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      ASSERT_EQ(a[i].size(), b[i].size());
      for (int64_t j = 0; j < a[i].size(); ++j) {
        ASSERT_NEAR(a[i].data()[j], b[i].data()[j], tolerance) << i << " at " << j;
      }
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Room, DeviceMatrixTest,
                         testing::Values(kMostKeptOnDevice, int64_t{1} << 20, int64_t{0}));

// Products of every kind into a whole matrix, into a piece and from one, small ones among them.
std::vector<Matrix> Walk() {
  const Matrix a = RandomMatrix(131, 67, 1), b = RandomMatrix(67, 389, 2);
  DeviceMatrix held(131, 389), square = DeviceMatrix::Unfilled(389, 389),
                               sent(RandomMatrix(131, 389, 3));
  std::vector<Matrix> out;
  Multiply(a, b, held, 0.5f, 1);
  Multiply(ConstMatrixView(a).Rows(5, 3).Columns(7, 2), ConstMatrixView(b).Rows(3, 2),
           MatrixView(held).Rows(11, 3), -1, 1);
  out.push_back(held.Fetch());
  MultiplyTransposed(ConstMatrixView(a).Columns(1, 60),
                     ConstMatrixView(a).Rows(2, 30).Columns(4, 60),
                     MatrixView(sent).Columns(13, 30), 1, 0);
  TransposedMultiply(held, sent, square);
  AddGram(held, square, 2);
  MatrixView columns = sent.FetchColumns(9, 129);
  out.push_back(Matrix(columns.rows, columns.cols));
  for (int64_t i = 0; i < columns.rows; ++i) {
    std::copy_n(columns.Row(i), columns.cols, out.back().Row(i));
  }
  held.Add(sent);
  out.push_back(held.Fetch());
  out.push_back(square.Fetch());
  for (int64_t i = 0; i < 389; ++i) {
    for (int64_t j = i + 1; j < 389; ++j) out.back()(i, j) = 0;  // of no meaning behind AddGram
  }
  Matrix down(131, 5);
  MultiplyTransposed(held, ConstMatrixView(sent).Rows(0, 5), down);
  out.push_back(down);
  return out;
}

TEST_P(DeviceMatrixTest, IsWhereProductsFindIt) {
  const auto device = Walk(), again = Walk();
  ExpectNear(device, again, 0);
  UseHost();
  ExpectNear(device, Walk(), 0.5);  // sums of some 1e5
}

TEST_P(DeviceMatrixTest, LivesWhereItIsMovedTo) {
  DeviceMatrix a(RandomMatrix(300, 70, 1)), b(200, 33);
  a = DeviceMatrix(RandomMatrix(40, 50, 2));
  std::swap(a, b);
  EXPECT_EQ(a.rows(), 200);
  DeviceMatrix c = std::move(b);
  std::vector<Matrix> moved;
  moved.push_back(a.Fetch());
  moved.push_back(c.Fetch());
  std::vector<Matrix> expected;
  expected.push_back(Matrix(200, 33));
  expected.push_back(RandomMatrix(40, 50, 2));
  ExpectNear(moved, expected, 0);
}

// Larger than what is copied at once, rows longer than that, from many threads, again and again in
// the same memory.
TEST_P(DeviceMatrixTest, TakesAndGivesManyAtOnce) {
  const Matrix wide = RandomMatrix(2, (int64_t{1} << 20) + 3, 1), tall = RandomMatrix(5000, 701, 2);
  ParallelFor(4, 24, [&](int64_t i) {
    const Matrix& m = i % 3 == 0 ? wide : tall;
    DeviceMatrix held{Matrix(m)};
    DeviceMatrix zeros(m.rows(), m.cols());
    zeros.Add(held);
    const Matrix& back = zeros.Fetch();
    for (int64_t j = 0; j < m.size(); ++j) ASSERT_EQ(back.data()[j], m.data()[j]);
    const MatrixView columns = held.FetchColumns(i, 640 - i);
    for (int64_t r = 0; r < m.rows(); ++r) {
      for (int64_t c = 0; c < columns.cols; ++c) ASSERT_EQ(columns.Row(r)[c], m(r, i + c));
    }
  });
}

// Rows of pieces that no power of two divides, operands that are pieces of matrices, more products
// than are made at once; where the host makes them, and where the device does.
std::vector<Matrix> Pieces() {
  std::vector<Matrix> out;
  const Matrix a = RandomMatrix(67, 1300, 1), b = RandomMatrix(1300, 1310, 2);
  const ConstMatrixView x(a), y(b);
  PiecewiseProducts(x.Columns(3, 1280), y.Rows(5, 1280).Columns(7, 1280), 128, out.emplace_back());
  PiecewiseProducts(x.Rows(1, 5).Columns(0, 120), y.Rows(0, 120).Columns(1, 120), 40,
                    out.emplace_back());
  PiecewiseProducts(x.Rows(2, 64).Columns(9, 1221), y.Rows(3, 1221).Columns(2, 1221), 37,
                    out.emplace_back());
  const Matrix h = RandomMatrix(640, 640, 3);
  const DeviceCopy kept(h);
  PiecewiseProducts(x.Rows(0, 66).Columns(1, 640), h, 128, out.emplace_back());
  for (Matrix& m : out) {
    const auto pieces = static_cast<int64_t>(std::sqrt(m.cols() / 2));
    for (int64_t i = 0; i < m.size(); ++i) {
      const int64_t h = i % pieces, g = i / (2 * pieces) % pieces;
      if (i / pieces % 2 == 1 && h > g) m.data()[i] = 0;  // not made
    }
  }
  return out;
}

TEST_P(DeviceMatrixTest, ReducesProductsByPieces) {
  const auto device = Pieces(), again = Pieces();
  ExpectNear(device, again, 0);
  UseHost();
  ExpectNear(device, Pieces(), 5e-2);  // sums of 16384 products
}

// What a linear is fitted from and the fit. Rounding chooses other codes, which are no worse.
struct Fit {
  std::vector<Matrix> sums;
  std::array<double, kNumLevels> losses;
  std::vector<uint8_t> codes;
};

Fit FitOne() {
  SetBlasThreads(3);  // of what is left to the host; sums of more threads round otherwise
  constexpr int64_t kRows = 150, kCols = 640, kTokens = 1500;
  FittingProblem problem;
  problem.weight = RandomMatrix(kRows, kCols, 1, 0.05f);
  const Matrix float_inputs = CorrelatedInputs(kTokens, kCols, 2);
  Matrix inputs = float_inputs;
  const Matrix noise = RandomMatrix(kTokens, kCols, 3, 0.3f),
               outputs = RandomMatrix(kTokens, kRows, 4);
  for (int64_t i = 0; i < inputs.size(); ++i) inputs.data()[i] += noise.data()[i];
  const ConstMatrixView x(inputs), y(float_inputs), z(outputs);
  StreamStatistics first(kCols, 0), second(kCols, 0), wanted(kCols, kRows);
  first.Add(x.Rows(0, 700), y.Rows(0, 700));
  second.Add(x.Rows(700, 800), y.Rows(700, 800));
  first.Add(second);
  wanted.AddWanted(x, z);
  Fit fit;
  for (const StreamStatistics* sums : {&first, &wanted}) {
    auto stream = sums->Problem(problem.weight, 1e-2);
    EXPECT_TRUE(stream.ok()) << stream.status();
    fit.sums.push_back(stream->hessian);
    fit.sums.push_back(stream->target);
    if (sums == &first) problem.streams.push_back(*std::move(stream));
  }
  problem.level_weights = {1, 4, 8, 16};
  for (int64_t j = 0; j < kCols; ++j) {
    problem.importance.push_back(problem.streams[0].hessian(j, j));
  }
  const auto weight = FitLinear(problem, LinearFitOptions(), 3);
  EXPECT_TRUE(weight.ok()) << weight.status();
  fit.losses = LevelLosses(problem, *weight, 3);
  fit.codes = weight->codes;
  return fit;
}

TEST_P(DeviceMatrixTest, FitsLinearsAsTheHostDoes) {
  const Fit device = FitOne(), again = FitOne();
  EXPECT_EQ(device.codes, again.codes);
  UseHost();
  const Fit host = FitOne();
  ExpectNear(device.sums, host.sums, 0.1);
  for (int k = 0; k < kNumLevels; ++k) {
    EXPECT_NEAR(device.losses[k], host.losses[k], 0.05 * host.losses[k]) << "level " << k + 1;
  }
}

}  // namespace
}  // namespace mobi
