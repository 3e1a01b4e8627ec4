#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "calibrator/block_calibration.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/linear_fit.h"
#include "calibrator/llama_block.h"
#include "calibrator/parallel.h"
#include "calibrator/statistics.h"
#include "engine/rope.h"
#include "tests/calibrator/random_matrix.h"

namespace mobi {
namespace {

constexpr int64_t kRoomForSome = int64_t{1} << 20;  // bytes

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
  // Where there is room for some, which of them is chance with more threads, and so are roundings.
  static int Threads() { return GetParam() == kRoomForSome ? 1 : 3; }

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
                         testing::Values(kMostKeptOnDevice, kRoomForSome, int64_t{0}));

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
  const Matrix kept = RandomMatrix(80, 90, 6), other = RandomMatrix(80, 400, 7);
  const DeviceCopy copy(kept), other_copy(other);
  DeviceMatrix parts(3 * 41, 77);
  const ConstMatrixView k = ConstMatrixView(kept).Rows(1, 33).Columns(5, 60);
  const ConstMatrixView o = ConstMatrixView(other).Rows(20, 33).Columns(301, 60);
  MultiplyParts(ConstMatrixView(RandomMatrix(3 * 41, 40, 8)).Columns(2, 33), {k, o, k},
                MatrixView(parts).Columns(9, 60), -0.5f, 1);
  out.push_back(parts.Fetch());
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

// Three queries to a key, sequences that no block of queries divides, small ones for the host.
ModelConfig SmallConfig(int head_dim) {
  ModelConfig config;
  config.hidden_size = 256;
  config.intermediate_size = 384;
  config.num_attention_heads = 6;
  config.num_key_value_heads = 2;
  config.head_dim = head_dim;
  config.max_position_embeddings = 700;
  config.rms_norm_eps = 1e-5f;
  config.rope_theta = 1e4;
  return config;
}

std::vector<Matrix> Attended() {
  const ModelConfig config = SmallConfig(40);
  const RopeValues rope = ComputeRope(config, 700);
  std::vector<Matrix> out;
  for (const int64_t length : {601, 256, 7}) {
    Matrix qkv = RandomMatrix(2 * length, 400, 1);
    out.emplace_back(2 * length, 250);
    Attend({config, rope, length}, qkv, MatrixView(out.back()).Columns(3, 240));
  }
  return out;
}

TEST_P(DeviceMatrixTest, AttendsAsTheHostDoes) {
  const auto device = Attended(), again = Attended();
  ExpectNear(device, again, 0);
  UseHost();
  ExpectNear(device, Attended(), 1e-4);
}

// From and to a part, and to the host.
std::vector<Matrix> Activated() {
  DeviceMatrix gate_up(RandomMatrix(130, 302, 1, 4)), into(70, 155);
  std::vector<Matrix> out;
  SwiGlu(gate_up, out.emplace_back(130, 151));
  SwiGlu(ConstMatrixView(gate_up).Rows(51, 60).Columns(1, 300),
         MatrixView(into).Rows(3, 60).Columns(2, 150));
  out.push_back(into.Fetch());
  SwiGlu(RandomMatrix(70, 310, 3), into);
  out.push_back(into.Fetch());
  into = DeviceMatrix(RandomMatrix(70, 155, 2));
  const ConstMatrixView rows = into.FetchRows(3, 60);
  out.push_back(Matrix(60, 155));
  for (int64_t i = 0; i < 60; ++i) std::copy_n(rows.Row(i), 155, out.back().Row(i));
  return out;
}

TEST_P(DeviceMatrixTest, ActivatesAsTheHostDoes) {
  const auto device = Activated(), again = Activated();
  ExpectNear(device, again, 0);
  UseHost();
  ExpectNear(device, Activated(), 1e-5);
}

// The float stream behind a block that is calibrated, what its fit lost, and the codes.
struct Block {
  std::vector<Matrix> hidden;
  std::vector<uint8_t> codes;
};

Block CalibrateOne(int threads) {
  SetBlasThreads(threads);
  const ModelConfig config = SmallConfig(64);
  const RopeValues rope = ComputeRope(config, 700);
  BlockWeights weights;
  weights.linear = {RandomMatrix(640, 256, 1, 0.05f), RandomMatrix(256, 384, 2, 0.05f),
                    RandomMatrix(768, 256, 3, 0.05f), RandomMatrix(256, 384, 4, 0.05f)};
  weights.input_norm.assign(256, 1);
  weights.post_attention_norm.assign(256, 1);
  CalibrationStreams streams;
  streams.seq_len = 130;
  streams.float_hidden = RandomMatrix(6 * 130, 256, 5);
  streams.hidden = {RandomMatrix(6 * 130, 256, 5), RandomMatrix(6 * 130, 256, 5)};
  BlockCalibrationOptions options;
  options.num_threads = threads;
  const auto fitted = CalibrateBlock(config, weights, rope, options, streams,
                                     [](const std::string&, double) { return absl::OkStatus(); });
  EXPECT_TRUE(fitted.ok()) << fitted.status();
  Block block;
  block.hidden.push_back(streams.float_hidden);
  for (const Matrix& hidden : streams.hidden) block.hidden.push_back(hidden);
  block.codes = fitted->linear.back().codes;
  return block;
}

TEST_P(DeviceMatrixTest, CalibratesBlocksAsTheHostDoes) {
  const Block device = CalibrateOne(Threads()), again = CalibrateOne(Threads());
  ExpectNear(device.hidden, again.hidden, 0);
  EXPECT_EQ(device.codes, again.codes);
  UseHost();
  const Block host = CalibrateOne(Threads());
  ExpectNear({device.hidden[0]}, {host.hidden[0]}, 1e-3);
  // Codes differ, and what a stream is off the float model with them: not in size.
  for (size_t s = 1; s < host.hidden.size(); ++s) {
    const auto error = [&](const Block& block) {
      double sum = 0;
      for (int64_t i = 0; i < block.hidden[0].size(); ++i) {
        sum += std::pow(block.hidden[s].data()[i] - block.hidden[0].data()[i], 2);
      }
      return sum;
    };
    EXPECT_NEAR(error(device), error(host), 0.05 * error(host)) << "stream " << s;
  }
}

// What a linear is fitted from and the fit. Rounding chooses other codes, which are no worse.
struct Fit {
  std::vector<Matrix> sums;
  std::array<double, kNumLevels> losses;
  std::vector<uint8_t> codes;
};

Fit FitOne(int threads) {
  SetBlasThreads(threads);  // of what is left to the host; sums of more threads round otherwise
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
  const auto weight = FitLinear(problem, LinearFitOptions(), threads);
  EXPECT_TRUE(weight.ok()) << weight.status();
  fit.losses = LevelLosses(problem, *weight, threads);
  fit.codes = weight->codes;
  return fit;
}

TEST_P(DeviceMatrixTest, FitsLinearsAsTheHostDoes) {
  const Fit device = FitOne(Threads()), again = FitOne(Threads());
  EXPECT_EQ(device.codes, again.codes);
  UseHost();
  const Fit host = FitOne(Threads());
  ExpectNear(device.sums, host.sums, 0.1);
  for (int k = 0; k < kNumLevels; ++k) {
    EXPECT_NEAR(device.losses[k], host.losses[k], 0.05 * host.losses[k]) << "level " << k + 1;
  }
}

}  // namespace
}  // namespace mobi
