#include <numeric>
#include <string>
#include <vector>

#include "backend_suite.h"
#include "kernels/cpu/reference_ops.h"

namespace mobi {
namespace {

class BackendElementwise : public BackendTest {
 protected:
  void ExpectElementwise(Tensor device, const Matrix& expected, const std::string& what) {
    ExpectClose(ToHost(device), expected, ToleranceOf(Op::kElementwise, activations()), what);
  }
};

TEST_P(BackendElementwise, MemoryIsAlignedAndCopiesAreExact) {
  const std::vector<int32_t> values = {1, -2, 3};
  int32_t* device = OnDevice(values);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(device) % 256, 0u);
  EXPECT_EQ(ToHost(device, 3), values);
  backend().Zero(device, 8);
  EXPECT_EQ(ToHost(device, 3), (std::vector<int32_t>{0, 0, 3}));
  // As large as a weight, which may be copied in parts.
  std::vector<int32_t> weight((9 << 18) + 7);
  std::iota(weight.begin(), weight.end(), 0);
  EXPECT_EQ(ToHost(OnDevice(weight), weight.size()), weight);
  EXPECT_GT(backend().memory().total, 0u);
  EXPECT_LE(backend().memory().free, backend().memory().total);
}

TEST_P(BackendElementwise, TooLargeAnAllocationNamesWhatAskedAndFree) {
  const size_t asked = backend().memory().total * 2;
  const absl::Status status = backend().Allocate(asked, "the KV cache").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  const std::string message(status.message());
  EXPECT_NE(message.find("the KV cache"), std::string::npos) << message;
  EXPECT_NE(message.find(std::to_string(asked)), std::string::npos) << message;
  EXPECT_NE(message.find("free"), std::string::npos) << message;
}

TEST_P(BackendElementwise, RunStepRunsTheBodyAgainAndAgain) {
  const Matrix x = Normal(activations(), 3, 64);
  const Tensor source = OnDevice(x), out = OnDevice(Matrix::Poisoned(activations(), 3, 64));
  int32_t* rows = OnDevice(std::vector<int32_t>{0, 1, 2});
  const StepKey key{.num_tokens = 3, .num_seqs = 3, .num_logits = 3, .decode_only = true};
  for (const std::vector<int32_t>& order :
       std::vector<std::vector<int32_t>>{{2, 1, 0}, {0, 0, 1}, {1, 2, 2}}) {
    backend().Upload(order.data(), order.size() * 4, rows);
    backend().RunStep(key, [&] { backend().GatherRows(source, rows, out); });
    const Matrix expected = Matrix::Poisoned(activations(), 3, 64);
    reference::GatherRows(x.view(), order.data(), expected.view());
    ExpectSame(ToHost(out), expected, "gathered rows");
  }
}

TEST_P(BackendElementwise, Embed) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const int64_t vocab = Uniform(5, 300), cols = 8 * Uniform(1, 40);
    const Matrix table = Normal(dtype, vocab, cols);
    std::vector<int32_t> ids(Uniform(1, 50));
    for (int32_t& id : ids) id = Uniform(0, static_cast<int>(vocab) - 1);
    ids[0] = static_cast<int32_t>(vocab) - 1;
    const auto tokens = static_cast<int64_t>(ids.size());
    const Matrix expected = Matrix::Poisoned(activations(), tokens, cols);
    reference::Embed(table.view(), ids.data(), expected.view());
    const Tensor out = OnDevice(Matrix::Poisoned(activations(), tokens, cols, cols + 8));
    backend().Embed(OnDevice(table), OnDevice(ids), out);
    ExpectSame(ToHost(out), expected, std::string(Name(dtype)));
  }
}

TEST_P(BackendElementwise, GatherRows) {
  const Matrix x = Normal(activations(), 40, 136, 1, 144);
  std::vector<int32_t> rows(23);
  for (int32_t& row : rows) row = Uniform(0, 39);
  const Matrix expected = Matrix::Poisoned(activations(), 23, 136);
  reference::GatherRows(x.view(), rows.data(), expected.view());
  const Tensor out = OnDevice(Matrix::Poisoned(activations(), 23, 136));
  backend().GatherRows(OnDevice(x), OnDevice(rows), out);
  ExpectSame(ToHost(out), expected, "gathered rows");
}

TEST_P(BackendElementwise, RmsNorm) {
  for (const int tokens : {1, 2, 9, 64}) {
    const int64_t cols = 8 * (tokens == 2   ? Uniform(513, 1024)
                              : tokens == 9 ? Uniform(1025, 2048)
                                            : Uniform(1, 512));
    const Matrix x = Normal(activations(), tokens, cols, 3);
    const Matrix weight = Normal(DType::kF32, 1, cols);
    const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, cols);
    reference::RmsNorm(x.view(), weight.view(), 1e-5f, expected.view());
    const Tensor out = OnDevice(Matrix::Poisoned(activations(), tokens, cols));
    backend().RmsNorm(OnDevice(x), OnDevice(weight), 1e-5f, out);
    ExpectElementwise(out, expected, std::to_string(cols) + " columns");
  }
}

TEST_P(BackendElementwise, RmsNormOfZerosIsZero) {
  Matrix x = Matrix::Poisoned(activations(), 1, 64);
  for (int c = 0; c < 64; ++c) x.set(0, c, 0);
  const Tensor out = OnDevice(Matrix::Poisoned(activations(), 1, 64));
  backend().RmsNorm(OnDevice(x), OnDevice(Normal(DType::kF32, 1, 64)), 1e-5f, out);
  for (int c = 0; c < 64; ++c) ASSERT_EQ(ToHost(out).at(0, c), 0);
}

TEST_P(BackendElementwise, AddRmsNorm) {
  for (const int tokens : {1, 3, 33}) {
    const int64_t cols = 8 * Uniform(1, 300);
    const Matrix delta = Normal(activations(), tokens, cols);
    const Matrix residual = Normal(activations(), tokens, cols);
    const Matrix weight = Normal(DType::kF32, 1, cols);
    const Matrix sum = residual.As(DType::kF32);
    const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, cols);
    reference::AddRmsNorm(delta.view(), weight.view(), 1e-5f, sum.view(), expected.view());
    const Tensor residual_device = OnDevice(residual);
    const Tensor out = OnDevice(Matrix::Poisoned(activations(), tokens, cols));
    backend().AddRmsNorm(OnDevice(delta), OnDevice(weight), 1e-5f, residual_device, out);
    ExpectElementwise(residual_device, sum, "residual");
    ExpectElementwise(out, expected, "norm");
  }
}

TEST_P(BackendElementwise, SwiGlu) {
  for (const int tokens : {1, 5, 40}) {
    const int64_t cols = 8 * Uniform(1, 200);
    Matrix gate_up = Normal(activations(), tokens, 2 * cols, 2);
    gate_up.set(0, 0, 90);  // exp(-x) vanishes
    gate_up.set(0, 1, -90);
    gate_up.set(0, 2, -200);  // exp(-x) overflows fp32
    const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, cols);
    reference::SwiGlu(gate_up.view(), expected.view());
    const Tensor out = OnDevice(Matrix::Poisoned(activations(), tokens, cols));
    backend().SwiGlu(OnDevice(gate_up), out);
    ExpectElementwise(out, expected, std::to_string(cols) + " columns");
  }
}

// A row of any of these ops has the same bits alone and among others.
TEST_P(BackendElementwise, RowsAreBatchInvariant) {
  const int64_t cols = 376;
  const Matrix x = Normal(activations(), 70, 2 * cols);
  const Tensor weight = OnDevice(Normal(DType::kF32, 1, 2 * cols));
  const Tensor x_device = OnDevice(x);
  const Tensor norm = OnDevice(Matrix::Poisoned(activations(), 70, 2 * cols));
  const Tensor glu = OnDevice(Matrix::Poisoned(activations(), 70, cols));
  backend().RmsNorm(x_device, weight, 1e-6f, norm);
  backend().SwiGlu(x_device, glu);
  const Matrix all_norm = ToHost(norm), all_glu = ToHost(glu);
  for (const int row : {0, 1, 37, 69}) {
    Tensor one = x_device;
    one.data = x_device.Row<std::byte>(0) + row * x_device.stride * SizeOf(x_device.dtype);
    one.rows = 1;
    const Tensor one_norm = OnDevice(Matrix::Poisoned(activations(), 1, 2 * cols));
    const Tensor one_glu = OnDevice(Matrix::Poisoned(activations(), 1, cols));
    backend().RmsNorm(one, weight, 1e-6f, one_norm);
    backend().SwiGlu(one, one_glu);
    for (int64_t c = 0; c < 2 * cols; ++c)
      ASSERT_EQ(ToHost(one_norm).at(0, c), all_norm.at(row, c));
    for (int64_t c = 0; c < cols; ++c) ASSERT_EQ(ToHost(one_glu).at(0, c), all_glu.at(row, c));
  }
}

MOBI_BACKEND_SUITE(BackendElementwise);

}  // namespace
}  // namespace mobi
