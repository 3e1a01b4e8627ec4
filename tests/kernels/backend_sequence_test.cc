// Ops in the order in which a model calls them. A backend may do a norm or SwiGLU together with the
// route that follows, or a rotation with the attention that follows: the results must be those of
// the ops one by one.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "backend_suite.h"
#include "kernels/cpu/reference_ops.h"

namespace mobi {
namespace {

class BackendSequence : public BackendTest {
 protected:
  struct Routed {
    Matrix x, residual;
    std::vector<uint8_t> levels;
    std::vector<uint32_t> tiles;
    uint64_t loaded = 0;
  };

  // A router in host memory, its tensors in the backend's.
  struct TestRouter {
    Matrix w1, b1, u, w2, b2;
    RoutedWeight host, device;
  };

  TestRouter RandomRouter(int num_hidden, const std::vector<int64_t>& rows, int64_t cols) {
    const int scores = static_cast<int>(rows.size()) * kNumLevels;
    TestRouter router{
        Normal(DType::kF16, num_hidden, cols, 1 / std::sqrt(static_cast<float>(cols))),
        Normal(DType::kF32, 1, num_hidden),
        Normal(DType::kF32, 1, num_hidden, 0.3f),
        Normal(DType::kF32, scores, num_hidden, 0.3f),
        Normal(DType::kF32, 1, scores),
        {},
        {}};
    RoutedWeight& host = router.host;
    host.weight.cols = cols;
    host.weight.num_segments = static_cast<int>(rows.size());
    for (size_t s = 0; s < rows.size(); ++s) {
      host.weight.segment_end[s] = host.weight.rows += rows[s];
      for (int k = 0; k < kNumLevels; ++k) {
        host.router.bytes[s][k] = static_cast<float>(BytesAtLevel(rows[s], cols, k + 1));
        router.b2.set(0, s * kNumLevels + k, router.b2.at(0, s * kNumLevels + k) - 1.5f * k);
      }
    }
    host.router.num_hidden = num_hidden;
    router.device = host;
    const auto place = [&](const Matrix& matrix, Tensor Router::*tensor) {
      host.router.*tensor = matrix.view();
      router.device.router.*tensor = OnDevice(matrix);
    };
    place(router.w1, &Router::w1);
    place(router.b1, &Router::b1);
    place(router.u, &Router::u);
    place(router.w2, &Router::w2);
    place(router.b2, &Router::b2);
    return router;
  }

  struct Batch {
    int num_coherent;
    std::vector<float> price;
    std::vector<uint8_t> min_level, max_level;
  };

  // Of many tokens the second half is pinned, so that whole groups of tokens choose nothing.
  Batch RandomBatch(int tokens, int num_coherent, const RoutedWeight& linear) {
    Batch batch{num_coherent, {}, {}, {}};
    const int first_pinned = tokens > 128 ? tokens / 2 : tokens;
    for (int i = 0; i < tokens; ++i) {
      const float step = linear.router.bytes[0][1] - linear.router.bytes[0][0];
      batch.price.push_back(std::exp(static_cast<float>(Uniform(-30, 10)) / 10) / step);
      const bool pinned = i >= first_pinned || Uniform(0, 7) == 0;
      const auto level = static_cast<uint8_t>(Uniform(1, kNumLevels));
      batch.min_level.push_back(pinned ? level : 1);
      batch.max_level.push_back(pinned ? level : kNumLevels);
    }
    return batch;
  }

  static RoutingBatch View(const Batch& batch, const float* price, const uint8_t* min_level,
                           const uint8_t* max_level, uint32_t* tiles, uint64_t* loaded) {
    return {static_cast<int>(batch.price.size()),
            batch.num_coherent,
            price,
            min_level,
            max_level,
            tiles,
            loaded};
  }

  // Runs `make_x` (which fills x on the device) and then Route.
  template <typename MakeX>
  Routed Run(const TestRouter& router, const Batch& batch, int64_t cols, MakeX make_x) {
    const auto tokens = static_cast<int64_t>(batch.price.size());
    const int segments = router.host.weight.num_segments;
    const Tensor x = OnDevice(Matrix::Poisoned(activations(), tokens, cols));
    auto* levels = OnDevice(std::vector<uint8_t>(tokens * segments, uint8_t{0xEE}));
    auto* tiles = OnDevice(std::vector<uint32_t>(tokens));
    auto* loaded = OnDevice(std::vector<uint64_t>(1));
    const RoutingBatch view = View(batch, OnDevice(batch.price), OnDevice(batch.min_level),
                                   OnDevice(batch.max_level), tiles, loaded);
    make_x(x);
    backend().Route(x, router.device, view, levels, tokens);
    return {ToHost(x),
            {},
            ToHost(levels, tokens * segments),
            ToHost(tiles, tokens),
            ToHost(loaded, 1)[0]};
  }

  // The levels are the reference's for the very x that the backend made, but for near ties.
  static void ExpectRoutedFrom(const Matrix& x, const TestRouter& router, const Batch& batch,
                               const Routed& actual) {
    const auto tokens = static_cast<int64_t>(batch.price.size());
    std::vector<uint8_t> levels(actual.levels.size());
    std::vector<uint32_t> tiles(tokens);
    uint64_t loaded = 0;
    reference::Route(x.view(), router.host,
                     View(batch, batch.price.data(), batch.min_level.data(), batch.max_level.data(),
                          tiles.data(), &loaded),
                     levels.data(), tokens);
    int differ = 0;
    for (size_t i = 0; i < levels.size(); ++i) differ += levels[i] != actual.levels[i];
    EXPECT_LE(differ, 1 + tokens / 50);
    if (differ == 0) {
      EXPECT_EQ(actual.tiles, tiles);
      EXPECT_EQ(actual.loaded, loaded);
    }
  }
};

TEST_P(BackendSequence, AddRmsNormThenRoute) {
  for (const int tokens : {1, 2, 7, 16, 31, 64, 100, 400}) {
    for (const int64_t cols : {int64_t{128}, int64_t{kGroupSize} * Uniform(2, 40)}) {
      const TestRouter router = RandomRouter(Uniform(1, 32), {64, 32, 16}, cols);
      const Batch batch = RandomBatch(tokens, tokens % 2 == 0 ? tokens / 2 : 0, router.host);
      const Matrix delta = Normal(activations(), tokens, cols);
      const Matrix residual = Normal(activations(), tokens, cols);
      const Matrix weight = Normal(DType::kF32, 1, cols);
      const Matrix sum = residual.As(DType::kF32);
      const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, cols);
      reference::AddRmsNorm(delta.view(), weight.view(), 1e-5f, sum.view(), expected.view());
      const Tensor residual_device = OnDevice(residual);
      const Tensor delta_device = OnDevice(delta), weight_device = OnDevice(weight);
      const Routed routed = Run(router, batch, cols, [&](Tensor x) {
        backend().AddRmsNorm(delta_device, weight_device, 1e-5f, residual_device, x);
      });
      const std::string what =
          std::to_string(tokens) + " tokens of " + std::to_string(cols) + " columns";
      const Tolerance tolerance = ToleranceOf(Op::kElementwise, activations());
      ExpectClose(ToHost(residual_device), sum, tolerance, what + ": residual");
      ExpectClose(routed.x, expected, tolerance, what + ": x");
      ExpectRoutedFrom(routed.x, router, batch, routed);
    }
  }
}

TEST_P(BackendSequence, RmsNormThenRouteLeavesItsInput) {
  const int tokens = 5;
  const int64_t cols = 3 * kGroupSize;
  const TestRouter router = RandomRouter(32, {64}, cols);
  const Batch batch = RandomBatch(tokens, 0, router.host);
  const Matrix input = Normal(activations(), tokens, cols);
  const Matrix weight = Normal(DType::kF32, 1, cols);
  const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, cols);
  reference::RmsNorm(input.view(), weight.view(), 1e-5f, expected.view());
  const Tensor input_device = OnDevice(input), weight_device = OnDevice(weight);
  const Routed routed = Run(router, batch, cols, [&](Tensor x) {
    backend().RmsNorm(input_device, weight_device, 1e-5f, x);
  });
  ExpectClose(routed.x, expected, ToleranceOf(Op::kElementwise, activations()), "x");
  ExpectSame(ToHost(input_device), input, "the input");
  ExpectRoutedFrom(routed.x, router, batch, routed);
}

// A norm gives the same bits alone and made by a router: a prompt has one beside decodes.
TEST_P(BackendSequence, NormHasTheBitsOfTheNormInTheRouter) {
  for (const int tokens : {1, 20, 200}) {
    for (const int64_t cols : {int64_t{kGroupSize}, int64_t{4096}, kGroupSize * int64_t{37}}) {
      const TestRouter router = RandomRouter(32, {64}, cols);
      const Batch batch = RandomBatch(tokens, 0, router.host);
      const Matrix residual = Normal(activations(), tokens, cols);
      const Tensor delta = OnDevice(Normal(activations(), tokens, cols));
      const Tensor weight = OnDevice(Normal(DType::kF32, 1, cols));
      std::vector<Matrix> sums, results;
      for (const bool alone : {true, false}) {
        const Tensor sum = OnDevice(residual);
        const auto norm = [&](Tensor x) { backend().AddRmsNorm(delta, weight, 1e-5f, sum, x); };
        if (alone) {
          const Tensor x = OnDevice(Matrix::Poisoned(activations(), tokens, cols));
          norm(x);
          results.push_back(ToHost(x));
        } else {
          results.push_back(Run(router, batch, cols, norm).x);
        }
        sums.push_back(ToHost(sum));
      }
      const std::string what = std::to_string(tokens) + " x " + std::to_string(cols);
      ExpectSame(results[1], results[0], what);
      ExpectSame(sums[1], sums[0], what + ": residual");
    }
  }
}

TEST_P(BackendSequence, SwiGluThenRoute) {
  for (const int tokens : {1, 3, 16, 50, 830}) {
    const int64_t cols = int64_t{kGroupSize} * Uniform(1, tokens > 50 ? 20 : 90);
    const TestRouter router = RandomRouter(32, {48}, cols);
    const Batch batch = RandomBatch(tokens, tokens == 16 ? tokens : 0, router.host);
    const Matrix gate_up = Normal(activations(), tokens, 2 * cols);
    const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, cols);
    reference::SwiGlu(gate_up.view(), expected.view());
    const Tensor gate_up_device = OnDevice(gate_up);
    const Routed routed =
        Run(router, batch, cols, [&](Tensor x) { backend().SwiGlu(gate_up_device, x); });
    ExpectClose(routed.x, expected, ToleranceOf(Op::kElementwise, activations()),
                std::to_string(tokens) + " tokens of " + std::to_string(cols) + " columns");
    ExpectRoutedFrom(routed.x, router, batch, routed);
  }
}

// The same bits for a token alone and in company.
TEST_P(BackendSequence, AddRmsNormThenRouteIsBatchInvariant) {
  const int64_t cols = 21 * kGroupSize;
  const int tokens = 850;
  const TestRouter router = RandomRouter(32, {64, 32}, cols);
  const Batch batch = RandomBatch(tokens, 0, router.host);
  const Matrix delta = Normal(activations(), tokens, cols);
  const Matrix residual = Normal(activations(), tokens, cols);
  const Tensor weight = OnDevice(Normal(DType::kF32, 1, cols));
  const auto run = [&](int first, int count) {
    Matrix some_delta = Matrix::Poisoned(activations(), count, cols), some_residual = some_delta;
    for (int i = 0; i < count; ++i) {
      for (int64_t c = 0; c < cols; ++c) {
        some_delta.set(i, c, delta.at(first + i, c));
        some_residual.set(i, c, residual.at(first + i, c));
      }
    }
    const Batch some{0,
                     {batch.price.begin() + first, batch.price.begin() + first + count},
                     {batch.min_level.begin() + first, batch.min_level.begin() + first + count},
                     {batch.max_level.begin() + first, batch.max_level.begin() + first + count}};
    const Tensor delta_device = OnDevice(some_delta), residual_device = OnDevice(some_residual);
    return Run(router, some, cols, [&](Tensor x) {
      backend().AddRmsNorm(delta_device, weight, 1e-5f, residual_device, x);
    });
  };
  const Routed together = run(0, tokens);
  for (const int count : {1, 9, 17, 150, 400}) {
    const int first = Uniform(0, tokens - count);
    const Routed some = run(first, count);
    for (int i = 0; i < count; ++i) {
      for (int64_t c = 0; c < cols; ++c) ASSERT_EQ(some.x.at(i, c), together.x.at(first + i, c));
      for (int s = 0; s < 2; ++s) {
        EXPECT_EQ(some.levels[s * count + i], together.levels[s * tokens + first + i]);
      }
    }
  }
}

// A linear of a decode step and the residual that takes its output: with a wait between the ops and
// without, the same bits, whatever levels the array had before (they may be taken for a guess).
TEST_P(BackendSequence, RouteThenMatmulThenAddRmsNorm) {
  enum Input { kPlain, kNorm, kAddNorm, kSwiGlu };
  struct Case {
    Input input;
    int tokens, num_coherent, num_hidden;
    int64_t cols;
    std::vector<int64_t> rows;
  };
  for (const Case& c : {Case{kNorm, 1, 1, 32, 4096, {512, 128, 128}},
                        {kNorm, 1, 0, 9, 2048, {80}},
                        {kNorm, 7, 3, 32, 2048, {1024, 16}},
                        {kNorm, 16, 16, 20, 2048, {96, 16}},
                        {kPlain, 8, 0, 17, 2048, {208}},
                        {kPlain, 9, 9, 32, 4096, {64, 2000}},
                        {kSwiGlu, 1, 1, 32, 14336, {144}},
                        {kSwiGlu, 13, 5, 32, 6144, {1600}},
                        {kAddNorm, 9, 9, 32, 2048, {96}},
                        {kAddNorm, 17, 17, 32, 4096, {256, 64, 64}},
                        {kNorm, 40, 25, 20, 1024, {96, 16}},
                        {kPlain, 33, 0, 17, 2048, {64, 400}},
                        {kSwiGlu, 64, 64, 32, 14336, {48}},
                        {kAddNorm, 128, 100, 32, 10240, {16, 16, 96}},
                        {kSwiGlu, 70, 1, 9, 3200, {208}},
                        {kPlain, 130, 130, 32, 2048, {80}},
                        {kNorm, 3, 2, 32, 4096, {256, 64}},
                        {kPlain, 2, 2, 20, 2048, {144}},
                        {kSwiGlu, 4, 3, 32, 14336, {400}},
                        {kNorm, 4, 4, 16, 8192, {96, 16, 16}}}) {
    const std::string what = std::to_string(c.tokens) + " tokens, " + std::to_string(c.cols) +
                             " columns, input " + std::to_string(c.input);
    TestRouter router = RandomRouter(c.num_hidden, c.rows, c.cols);
    const HostWeight weight = RandomWeight(c.rows, c.cols);
    router.host.weight = weight.view;
    router.device.weight = OnDevice(weight);
    const Batch batch = RandomBatch(c.tokens, c.num_coherent, router.host);
    const int64_t out_cols = router.host.weight.rows;
    const Matrix source = Normal(activations(), c.tokens, c.cols * (c.input == kSwiGlu ? 2 : 1));
    const Matrix delta = Normal(activations(), c.tokens, c.cols);
    const Matrix residual = Normal(activations(), c.tokens, out_cols);
    const Tensor norm = OnDevice(Normal(DType::kF32, 1, c.cols));
    const Tensor next_norm = OnDevice(Normal(DType::kF32, 1, out_cols));
    struct Result {
      Routed routed;
      Matrix source, out, residual, normed;
    };
    const auto segments = static_cast<int64_t>(c.rows.size());
    const auto run = [&](bool wait, const std::vector<uint8_t>& levels_before) {
      const auto after = [&] {
        if (wait) {
          EXPECT_TRUE(backend().Synchronize().ok());
        }
      };
      const Tensor from = OnDevice(source), residual_device = OnDevice(residual);
      const Tensor delta_device = OnDevice(delta);
      const Tensor x =
          OnDevice(c.input == kPlain ? source : Matrix::Poisoned(activations(), c.tokens, c.cols));
      const Tensor out = OnDevice(Matrix::Poisoned(activations(), c.tokens, out_cols));
      const Tensor normed = OnDevice(Matrix::Poisoned(activations(), c.tokens, out_cols));
      auto* levels = OnDevice(levels_before);
      auto* tiles = OnDevice(std::vector<uint32_t>(c.tokens));
      auto* loaded = OnDevice(std::vector<uint64_t>(1));
      const RoutingBatch view = View(batch, OnDevice(batch.price), OnDevice(batch.min_level),
                                     OnDevice(batch.max_level), tiles, loaded);
      if (c.input == kNorm) backend().RmsNorm(from, norm, 1e-5f, x);
      if (c.input == kAddNorm) backend().AddRmsNorm(delta_device, norm, 1e-5f, from, x);
      if (c.input == kSwiGlu) backend().SwiGlu(from, x);
      backend().Route(x, router.device, view, levels, c.tokens);
      after();
      backend().SlicedMatmul(x, router.device.weight, levels, c.tokens, out);
      after();
      backend().AddRmsNorm(out, next_norm, 1e-5f, residual_device, normed);
      after();
      return Result{{ToHost(x),
                     {},
                     ToHost(levels, c.tokens * segments),
                     ToHost(tiles, c.tokens),
                     ToHost(loaded, 1)[0]},
                    ToHost(from),
                    ToHost(out),
                    ToHost(residual_device),
                    ToHost(normed)};
    };
    const auto every = [&](int level) {
      return std::vector<uint8_t>(c.tokens * segments, static_cast<uint8_t>(level));
    };
    std::vector<uint8_t> random_levels = every(0);
    for (uint8_t& level : random_levels) level = static_cast<uint8_t>(Uniform(1, kNumLevels));
    const Result alone = run(true, every(0xEE));
    for (const std::vector<uint8_t>& before :
         {every(0xEE), every(1), random_levels, alone.routed.levels}) {
      const Result guessed = run(false, before);
      ExpectSame(guessed.routed.x, alone.routed.x, what + ": x");
      EXPECT_EQ(guessed.routed.levels, alone.routed.levels) << what;
      EXPECT_EQ(guessed.routed.tiles, alone.routed.tiles) << what;
      EXPECT_EQ(guessed.routed.loaded, alone.routed.loaded) << what;
      ExpectSame(guessed.source, alone.source, what + ": source");
      ExpectSame(guessed.out, alone.out, what + ": out");
      ExpectSame(guessed.residual, alone.residual, what + ": residual");
      ExpectSame(guessed.normed, alone.normed, what + ": the next norm");
    }
    ExpectRoutedFrom(alone.routed.x, router, batch, alone.routed);
    const Matrix expected = Matrix::Poisoned(DType::kF32, c.tokens, out_cols);
    reference::SlicedMatmul(alone.routed.x.view(), router.host.weight, alone.routed.levels.data(),
                            c.tokens, expected.view());
    Tolerance tolerance = ToleranceOf(Op::kSlicedMatmul, activations());
    if (c.input == kSwiGlu) tolerance.scaled *= 2;  // a group's largest is farther from its rms
    ExpectClose(alone.out, expected, tolerance, what);
  }
}

// What makes x and a matmul in a step whose long prompts are known to read one level, and where it
// is not known: the same bits.
TEST_P(BackendSequence, InputThenMatmulOfLongPromptsAtOneLevel) {
  enum Input { kNorm, kAddNorm, kSwiGlu };
  for (const Input input : {kNorm, kAddNorm, kSwiGlu}) {
    for (const int num_short : {0, 1, 20}) {
      const int tokens = num_short + Uniform(1, 300);
      const int64_t cols = int64_t{kGroupSize} * Uniform(1, 40);
      const SlicedWeight weight = OnDevice(RandomWeight({48, 160}, cols));
      std::vector<uint8_t> levels;
      const auto level = static_cast<uint8_t>(Uniform(1, kNumLevels));
      for (int i = 0; i < tokens; ++i) {
        levels.push_back(i < num_short ? static_cast<uint8_t>(Uniform(1, kNumLevels)) : level);
      }
      const uint8_t* levels_device = OnDevice(levels);
      const Matrix source = Normal(activations(), tokens, input == kSwiGlu ? 2 * cols : cols);
      const Tensor delta = OnDevice(Normal(activations(), tokens, cols));
      const Tensor norm = OnDevice(Normal(DType::kF32, 1, cols));
      std::vector<Matrix> results[2];
      for (const bool known : {false, true}) {
        const Tensor from = OnDevice(source);
        const Tensor x = OnDevice(Matrix::Poisoned(activations(), tokens, cols));
        const Tensor out = OnDevice(Matrix::Poisoned(activations(), tokens, weight.rows));
        const StepKey key{.num_tokens = tokens,
                          .num_seqs = num_short + 1,
                          .num_short = num_short,
                          .long_level = known ? level : 0};
        backend().RunStep(key, [&] {
          if (input == kSwiGlu) backend().SwiGlu(from, x);
          if (input == kNorm) backend().RmsNorm(from, norm, 1e-5f, x);
          if (input == kAddNorm) backend().AddRmsNorm(delta, norm, 1e-5f, from, x);
          backend().SlicedMatmul(x, weight, levels_device, 0, out);
        });
        results[known] = {ToHost(out), ToHost(from), ToHost(x.FirstRows(num_short))};
      }
      const std::string what = std::to_string(num_short) + " short of " + std::to_string(tokens) +
                               " tokens of " + std::to_string(cols) + " columns";
      ExpectSame(results[1][0], results[0][0], what);
      ExpectSame(results[1][1], results[0][1], "what x is made of");
      ExpectSame(results[1][2], results[0][2], "x of short prompts");
    }
  }
}

// Decodes and short prompts that are routed beside long prompts that are known to read one level,
// and where it is not known: the same bits, but for what need not be written.
TEST_P(BackendSequence, RouteThenMatmulBesideLongPromptsAtOneLevel) {
  enum Input { kPlain, kAddNorm, kSwiGlu };
  for (const Input input : {kPlain, kAddNorm, kSwiGlu}) {
    for (const int num_short : {1, 5, 16, 20, 100, 140}) {
      const int tokens = num_short + Uniform(1, 300);
      const int64_t cols = int64_t{kGroupSize} * (num_short % 2 == 0 ? 16 : Uniform(1, 20));
      const TestRouter router = RandomRouter(Uniform(1, 32), {64, 32}, cols);
      RoutedWeight linear = router.device;
      linear.weight = OnDevice(RandomWeight({64, 32}, cols));
      Batch batch = RandomBatch(tokens, num_short / 2, router.host);
      const auto level = static_cast<uint8_t>(Uniform(1, kNumLevels));
      std::fill(batch.min_level.begin() + num_short, batch.min_level.end(), level);
      std::fill(batch.max_level.begin() + num_short, batch.max_level.end(), level);
      const Matrix source = Normal(activations(), tokens, input == kSwiGlu ? 2 * cols : cols);
      const Tensor delta = OnDevice(Normal(activations(), tokens, cols));
      const Tensor norm = OnDevice(Normal(DType::kF32, 1, cols));
      const float* price = OnDevice(batch.price);
      const uint8_t *lowest = OnDevice(batch.min_level), *highest = OnDevice(batch.max_level);
      std::vector<Matrix> results[2];
      std::vector<uint8_t> levels[2];
      std::vector<uint32_t> tiles[2];
      uint64_t loaded[2];
      for (const bool known : {false, true}) {
        const Tensor from = OnDevice(source);
        const Tensor x =
            input == kPlain ? from : OnDevice(Matrix::Poisoned(activations(), tokens, cols));
        const Tensor out = OnDevice(Matrix::Poisoned(activations(), tokens, linear.weight.rows));
        auto* chosen = OnDevice(std::vector<uint8_t>(2 * tokens, uint8_t{0xEE}));
        auto* counts = OnDevice(std::vector<uint32_t>(tokens));
        auto* bytes = OnDevice(std::vector<uint64_t>(1));
        const StepKey key{.num_tokens = tokens,
                          .num_seqs = num_short + 1,
                          .num_coherent = batch.num_coherent,
                          .num_short = num_short,
                          .long_level = known ? level : 0};
        backend().RunStep(key, [&] {
          if (input == kSwiGlu) backend().SwiGlu(from, x);
          if (input == kAddNorm) backend().AddRmsNorm(delta, norm, 1e-5f, from, x);
          backend().Route(x, linear, View(batch, price, lowest, highest, counts, bytes), chosen,
                          tokens);
          backend().SlicedMatmul(x, linear.weight, chosen, tokens, out);
        });
        results[known] = {ToHost(out), ToHost(from), ToHost(x.FirstRows(num_short))};
        for (int segment = 0; segment < 2; ++segment) {
          const auto some = ToHost(chosen + segment * tokens, num_short);
          levels[known].insert(levels[known].end(), some.begin(), some.end());
        }
        tiles[known] = ToHost(counts, num_short);
        loaded[known] = ToHost(bytes, 1)[0];
      }
      const std::string what = std::to_string(num_short) + " short of " + std::to_string(tokens) +
                               " tokens of " + std::to_string(cols) + " columns, input " +
                               std::to_string(input);
      ExpectSame(results[1][0], results[0][0], what);
      ExpectSame(results[1][1], results[0][1], what + ": what x is made of");
      ExpectSame(results[1][2], results[0][2], what + ": x of short prompts");
      EXPECT_EQ(levels[1], levels[0]) << what;
      EXPECT_EQ(tiles[1], tiles[0]) << what;
      EXPECT_EQ(loaded[1], loaded[0]) << what;
    }
  }
}

// One token per sequence: rotation, cache and attention, with a wait between the ops and without.
TEST_P(BackendSequence, RopeThenDecodeAttention) {
  for (const AttentionShape& shape :
       {AttentionShape{4, 2, 64, 16}, AttentionShape{8, 2, 128, 16}, AttentionShape{3, 3, 32, 8}}) {
    const std::vector<int32_t> context = {1, 16, 17, 128, 129, 700, 0, 255};
    const auto seqs = static_cast<int>(context.size());
    const int stride = 700 / shape.block_size + 2;
    const int64_t q_cols = int64_t{shape.num_heads} * shape.head_dim;
    const int64_t kv_cols = int64_t{shape.num_kv_heads} * shape.head_dim;
    std::vector<int32_t> starts(seqs + 1), table(int64_t{seqs} * stride), positions, slots;
    std::iota(starts.begin(), starts.end(), 0);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), random_);
    for (int s = 0; s < seqs; ++s) {  // a context of 0 is padding
      const int p = context[s] - 1;
      positions.push_back(std::max(p, 0));
      slots.push_back(p < 0 ? -1
                            : table[s * stride + p / shape.block_size] * shape.block_size +
                                  p % shape.block_size);
    }
    const int64_t rows = static_cast<int64_t>(table.size()) * shape.block_size;
    const Matrix k = Normal(activations(), rows, kv_cols), v = Normal(activations(), rows, kv_cols);
    const Matrix qkv = Normal(activations(), seqs, q_cols + 2 * kv_cols);
    const Tensor cos = OnDevice(Normal(DType::kF32, 700, shape.head_dim / 2, 0.7f));
    const Tensor sin = OnDevice(Normal(DType::kF32, 700, shape.head_dim / 2, 0.7f));
    const AttentionBatch batch{.num_seqs = seqs,
                               .max_query_len = 1,
                               .max_context_len = 1024,
                               .query_start = OnDevice(starts),
                               .context_len = OnDevice(context),
                               .block_table = OnDevice(table),
                               .block_table_stride = stride};
    const auto* positions_device = OnDevice(positions);
    const auto* slots_device = OnDevice(slots);
    std::vector<Matrix> results[2];
    for (const bool wait : {true, false}) {
      const Tensor qkv_device = OnDevice(qkv), k_device = OnDevice(k), v_device = OnDevice(v);
      const Tensor out = OnDevice(Matrix::Poisoned(activations(), seqs, q_cols));
      backend().RopeAndWriteKv(qkv_device, {cos, sin}, positions_device, slots_device, shape,
                               {k_device, v_device});
      if (wait) {
        ASSERT_TRUE(backend().Synchronize().ok());
      }
      backend().Attention(qkv_device.Columns(0, q_cols), {k_device, v_device}, batch, shape, out);
      results[wait] = {ToHost(out), ToHost(k_device), ToHost(v_device)};
    }
    for (int s = 0; s < seqs; ++s) {
      if (context[s] == 0) continue;
      for (int64_t c = 0; c < q_cols; ++c) {
        ASSERT_EQ(results[0][0].at(s, c), results[1][0].at(s, c)) << "sequence " << s;
      }
    }
    ExpectSame(results[0][1], results[1][1], "k");
    ExpectSame(results[0][2], results[1][2], "v");
  }
}

MOBI_BACKEND_SUITE(BackendSequence);

}  // namespace
}  // namespace mobi
