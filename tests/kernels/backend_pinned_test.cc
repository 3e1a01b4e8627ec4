// A linear of tokens that are pinned, in the order in which a model calls its ops: what makes x,
// the sliced matmul, and the norm that adds to the residual. A backend may do them together: the
// bits must be those of the ops one by one.
#include <iterator>
#include <string>
#include <vector>

#include "backend_suite.h"

namespace mobi {
namespace {

class BackendPinned : public BackendTest {};

TEST_P(BackendPinned, InputThenMatmulThenAddRmsNorm) {
  enum Input { kPlain, kNorm, kAddNorm, kSwiGlu };
  struct Case {
    Input input;
    int tokens;
    int64_t cols;
    std::vector<int64_t> rows;
    int level;  // 0: each token has its own
  };
  for (const Case& c : {Case{kNorm, 1, 4096, {512, 128, 128}, 1},
                        {kNorm, 1, 8192, {80}, 3},
                        {kNorm, 2, 2048, {1024, 16}, 0},
                        {kNorm, 3, 4096, {4096, 1024, 1024}, 2},
                        {kNorm, 16, 4096, {96, 2000}, 4},
                        {kAddNorm, 7, 2048, {96}, 0},
                        {kPlain, 1, 4096, {4096}, 2},
                        {kPlain, 8, 2048, {208}, 0},
                        {kPlain, 9, 4096, {64, 2000}, 1},
                        {kSwiGlu, 1, 14336, {144}, 4},
                        {kSwiGlu, 4, 14336, {4096}, 0},
                        {kSwiGlu, 13, 6144, {1600}, 3},
                        {kAddNorm, 17, 4096, {256, 64, 64}, 2},
                        {kNorm, 40, 1024, {96, 16}, 0},
                        {kPlain, 33, 2048, {64, 400}, 4},
                        {kSwiGlu, 64, 14336, {48}, 1},
                        {kAddNorm, 128, 2048, {16, 16, 96}, 3},
                        {kPlain, 130, 2048, {80}, 0}}) {
    const std::string what = std::to_string(c.tokens) + " tokens, " + std::to_string(c.cols) +
                             " columns, input " + std::to_string(c.input);
    const SlicedWeight weight = OnDevice(RandomWeight(c.rows, c.cols));
    const Matrix source = Normal(activations(), c.tokens, c.cols * (c.input == kSwiGlu ? 2 : 1));
    const Matrix residual = Normal(activations(), c.tokens, weight.rows);
    const Tensor delta = OnDevice(Normal(activations(), c.tokens, c.cols));
    const Tensor norm = OnDevice(Normal(DType::kF32, 1, c.cols));
    const Tensor next_norm = OnDevice(Normal(DType::kF32, 1, weight.rows));
    std::vector<uint8_t> levels;
    for (size_t i = 0; i < c.tokens * c.rows.size(); ++i) {
      const size_t token = i % c.tokens;
      const int own = c.level > 0 ? c.level : Uniform(1, kNumLevels);
      levels.push_back(i == token ? static_cast<uint8_t>(own) : levels[token]);
    }
    const uint8_t* const levels_device = OnDevice(levels);
    std::vector<Matrix> results[2];  // one by one, together
    for (const bool together : {false, true}) {
      const auto after = [&] {
        if (!together) {
          EXPECT_TRUE(backend().Synchronize().ok());
        }
      };
      const Tensor from = OnDevice(source), sum = OnDevice(residual);
      const Tensor x =
          OnDevice(c.input == kPlain ? source : Matrix::Poisoned(activations(), c.tokens, c.cols));
      const Tensor out = OnDevice(Matrix::Poisoned(activations(), c.tokens, weight.rows));
      const Tensor normed = OnDevice(Matrix::Poisoned(activations(), c.tokens, weight.rows));
      if (c.input == kNorm) backend().RmsNorm(from, norm, 1e-5f, x);
      if (c.input == kAddNorm) backend().AddRmsNorm(delta, norm, 1e-5f, from, x);
      if (c.input == kSwiGlu) backend().SwiGlu(from, x);
      after();
      backend().SlicedMatmul(x, weight, levels_device, together ? 0 : c.tokens, out);
      after();
      backend().AddRmsNorm(out, next_norm, 1e-5f, sum, normed);
      results[together] = {ToHost(x), ToHost(from), ToHost(out), ToHost(sum), ToHost(normed)};
    }
    const char* const names[] = {": x", ": source", ": out", ": residual", ": the next norm"};
    for (size_t i = 0; i < std::size(names); ++i) {
      ExpectSame(results[1][i], results[0][i], what + names[i]);
    }
  }
}

MOBI_BACKEND_SUITE(BackendPinned);

}  // namespace
}  // namespace mobi
