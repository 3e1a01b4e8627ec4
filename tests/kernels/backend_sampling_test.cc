#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "backend_suite.h"
#include "kernels/cpu/reference_ops.h"
#include "kernels/random.h"

namespace mobi {
namespace {

class BackendSampling : public BackendTest {
 protected:
  std::vector<Sampled> Run(const Matrix& logits, const std::vector<SamplingRow>& rows,
                           const std::vector<LogitEdit>& edits = {}) {
    const size_t count = rows.size();
    auto* out = OnDevice(std::vector<Sampled>(count, {-99, NAN}));
    const Tensor device = OnDevice(logits);
    backend().Sample(device, {static_cast<int>(count), OnDevice(rows), OnDevice(edits)}, out);
    std::vector<Sampled> sampled = ToHost(out, count);
    ExpectSame(ToHost(device), logits, "the logits, which are not to change");
    return sampled;
  }

  static SamplingRow Row(int32_t logits_row, float temperature, uint64_t seed, uint64_t counter) {
    SamplingRow row{};
    row.logits_row = logits_row;
    row.temperature = temperature;
    row.top_p = 1;
    row.seed = seed;
    row.counter = counter;
    return row;
  }

  // Any mixture of filters, each off about half of the time.
  SamplingRow RandomRow(int32_t logits_row, int vocab) {
    SamplingRow row =
        Row(logits_row, static_cast<float>(Uniform(1, 30)) / 10, random_(), random_());
    if (Uniform(0, 1) == 0) row.top_k = Uniform(1, vocab + 5);
    if (Uniform(0, 1) == 0) row.top_p = static_cast<float>(Uniform(1, 99)) / 100;
    if (Uniform(0, 2) == 0) row.min_p = static_cast<float>(Uniform(1, 50)) / 100;
    return row;
  }

  static double LogprobOf(const Matrix& logits, int64_t row, int32_t token) {
    Tensor one = logits.view();
    one.data = one.Row<float>(row);
    one.rows = 1;
    float logprob;
    reference::TokenLogprobs(one, &token, &logprob);
    return logprob;
  }
};

// The token drawn is the reference's, or one whose noisy score equals it within rounding.
TEST_P(BackendSampling, DrawsWhatTheReferenceDraws) {
  for (const int vocab : {1, 2, 17, 100, 1003, 8192, 32003}) {
    const int num_logits = 6, num_rows = vocab > 5000 ? 20 : 100;
    const Matrix logits = Normal(DType::kF32, num_logits, vocab, 3, vocab + 8 - vocab % 8);
    std::vector<SamplingRow> rows;
    std::vector<LogitEdit> edits;
    for (int i = 0; i < num_rows; ++i) {
      rows.push_back(RandomRow(Uniform(0, num_logits - 1), vocab));
      rows.back().edit_begin = static_cast<int32_t>(edits.size());
      for (int e = Uniform(0, 8); e > 0; --e) {
        edits.push_back({Uniform(0, vocab - 1), static_cast<float>(Uniform(5, 20)) / 10,
                         static_cast<float>(Uniform(-30, 30)) / 10});
      }
      rows.back().edit_end = static_cast<int32_t>(edits.size());
    }
    const std::vector<Sampled> sampled = Run(logits, rows, edits);
    int forbidden = 0;
    for (int i = 0; i < num_rows; ++i) {
      const std::vector<double> scores =
          reference::FilteredScores(logits.view(), rows[i], edits.data());
      const int32_t token = sampled[i].token;
      ASSERT_GE(token, 0);
      ASSERT_LT(token, vocab);
      ASSERT_NEAR(sampled[i].logprob, LogprobOf(logits, rows[i].logits_row, token), 1e-4);
      const auto noisy = [&](int32_t t) {
        return scores[t] - std::log(-std::log1p(-double{
                               DrawUniform(DrawBits(DrawKey(rows[i].seed, rows[i].counter), t))}));
      };
      double best = -std::numeric_limits<double>::infinity();
      for (int32_t t = 0; t < vocab; ++t) best = std::max(best, noisy(t));
      if (std::isfinite(scores[token])) {
        ASSERT_NEAR(noisy(token), best, 1e-4) << "vocabulary " << vocab << " row " << i;
      } else {
        ++forbidden;  // a top-p sum within rounding of the limit may let in one token more
      }
    }
    EXPECT_LE(forbidden, num_rows / 50) << "vocabulary " << vocab;
  }
}

TEST_P(BackendSampling, GreedyTakesTheLowestOfEquals) {
  const int vocab = 4099;
  Matrix logits = Normal(DType::kF32, 3, vocab);
  for (const int token : {4098, 700, 2000}) logits.set(0, token, 50);
  logits.set(1, 4098, 60);
  for (int t = 0; t < vocab; ++t) logits.set(2, t, -3);
  std::vector<SamplingRow> rows = {Row(0, 0, 1, 1), Row(1, 0, 1, 2), Row(2, 0, 1, 3),
                                   Row(0, 0, 1, 4)};
  rows[0].top_k = 5;  // filters do not matter to an argmax
  rows[1].top_p = 0.1f;
  rows[3].edit_end = 1;  // token 700 is made less likely
  const std::vector<Sampled> sampled = Run(logits, rows, {{700, 2.0f, 0.0f}});
  EXPECT_EQ(sampled[0].token, 700);
  EXPECT_EQ(sampled[1].token, 4098);
  EXPECT_EQ(sampled[2].token, 0);
  EXPECT_EQ(sampled[3].token, 2000);
  EXPECT_NEAR(sampled[2].logprob, -std::log(static_cast<double>(vocab)), 1e-4);
}

TEST_P(BackendSampling, NonFiniteLogitsHarmNoOtherRow) {
  const int vocab = 500;
  const Matrix clean = Normal(DType::kF32, 5, vocab);
  std::vector<SamplingRow> rows;
  for (int i = 0; i < 5; ++i) rows.push_back(Row(i, i % 2 == 0 ? 0.0f : 1.0f, 7, i));
  const std::vector<Sampled> expected = Run(clean, rows);
  Matrix dirty = clean;
  dirty.set(0, 499, std::numeric_limits<float>::quiet_NaN());
  dirty.set(1, 3, std::numeric_limits<float>::infinity());
  dirty.set(3, 77, -std::numeric_limits<float>::infinity());
  const std::vector<Sampled> sampled = Run(dirty, rows);
  for (const int i : {0, 1, 3}) EXPECT_EQ(sampled[i].token, kNonFiniteLogits) << i;
  for (const int i : {2, 4}) {
    EXPECT_EQ(sampled[i].token, expected[i].token);
    EXPECT_EQ(sampled[i].logprob, expected[i].logprob);
  }
}

TEST_P(BackendSampling, BiasCanForceAndForbid) {
  const Matrix logits = Normal(DType::kF32, 1, 64);
  SamplingRow force = Row(0, 1, 3, 0), forbid = Row(0, 1, 3, 0);
  force.edit_end = 1;
  forbid.edit_begin = 1;
  forbid.edit_end = 64;
  std::vector<LogitEdit> edits = {{9, 1.0f, 100.0f}};
  for (int t = 0; t < 63; ++t) edits.push_back({t, 1.0f, -std::numeric_limits<float>::infinity()});
  const std::vector<Sampled> sampled = Run(logits, {force, forbid}, edits);
  EXPECT_EQ(sampled[0].token, 9);
  EXPECT_EQ(sampled[1].token, 63);
}

// Chi-square of many draws against the softmax, over counters and over seeds.
TEST_P(BackendSampling, DrawsFollowTheDistribution) {
  const int vocab = 40, draws = 40000;
  const Matrix logits = Normal(DType::kF32, 1, vocab);
  for (const bool over_counters : {true, false}) {
    std::vector<SamplingRow> rows;
    for (int i = 0; i < draws; ++i) {
      rows.push_back(Row(0, 0.8f, over_counters ? 42 : i, over_counters ? i : 42));
    }
    std::vector<int> count(vocab);
    for (const Sampled& sampled : Run(logits, rows)) ++count[sampled.token];
    double total = 0, chi_square = 0;
    for (int t = 0; t < vocab; ++t) total += std::exp(logits.at(0, t) / 0.8);
    for (int t = 0; t < vocab; ++t) {
      const double expected = draws * std::exp(logits.at(0, t) / 0.8) / total;
      chi_square += (count[t] - expected) * (count[t] - expected) / expected;
    }
    EXPECT_LT(chi_square, 72.1) << "99.9 % point of 39 degrees of freedom";
    EXPECT_GT(chi_square, 15) << "too even to be random";
  }
}

TEST_P(BackendSampling, ADrawDependsOnItsRequestAlone) {
  const int vocab = 3001;
  const Matrix logits = Normal(DType::kF32, 8, vocab);
  std::vector<SamplingRow> rows;
  for (int i = 0; i < 8; ++i) rows.push_back(RandomRow(i, vocab));
  const std::vector<Sampled> together = Run(logits, rows);
  for (int i = 0; i < 8; ++i) {
    const std::vector<Sampled> alone = Run(logits, {rows[i]});
    EXPECT_EQ(alone[0].token, together[i].token);
    EXPECT_EQ(alone[0].logprob, together[i].logprob);
  }
}

TEST_P(BackendSampling, TokenLogprobsEqualsReference) {
  for (const int vocab : {3, 1000, 32003}) {
    const int tokens = 9;
    const Matrix logits = Normal(DType::kF32, tokens, vocab, 4);
    std::vector<int32_t> ids(tokens);
    for (int32_t& id : ids) id = Uniform(0, vocab - 1);
    ids[4] = -1;
    Matrix expected = Matrix::Poisoned(DType::kF32, 1, tokens);
    reference::TokenLogprobs(logits.view(), ids.data(), expected.view().Row<float>(0));
    const Tensor out = OnDevice(Matrix::Poisoned(DType::kF32, 1, tokens));
    backend().TokenLogprobs(OnDevice(logits), OnDevice(ids), out.Row<float>(0));
    const Matrix actual = ToHost(out);
    ExpectClose(actual, expected, ToleranceOf(Op::kLogprob, activations()),
                "vocabulary " + std::to_string(vocab));
    EXPECT_EQ(actual.at(0, 4), 0);
  }
}

TEST_P(BackendSampling, MostLikelyEqualsReference) {
  for (const int vocab : {kMaxTopLogprobs, 999, 32003}) {
    Matrix logits = Normal(DType::kF32, 4, vocab, 4);
    for (int t = 0; t < vocab; t += 2) logits.set(1, t, 7);  // ties: the lower ids come first
    const std::vector<int32_t> rows = {2, 1, 1, 3, 0};
    for (const int count : {1, 5, kMaxTopLogprobs}) {
      const size_t num_rows = rows.size();
      std::vector<TopLogprobs> expected(num_rows);
      reference::MostLikely(logits.view(), rows.data(), static_cast<int>(num_rows), count,
                            expected.data());
      auto* out = OnDevice(std::vector<TopLogprobs>(num_rows));
      backend().MostLikely(OnDevice(logits), OnDevice(rows), static_cast<int>(num_rows), count,
                           out);
      const std::vector<TopLogprobs> actual = ToHost(out, num_rows);
      for (size_t i = 0; i < num_rows; ++i) {
        for (int rank = 0; rank < count; ++rank) {
          ASSERT_EQ(actual[i].tokens[rank], expected[i].tokens[rank])
              << "row " << i << " rank " << rank;
          ASSERT_NEAR(actual[i].logprobs[rank], expected[i].logprobs[rank], 1e-4);
        }
      }
    }
  }
}

MOBI_BACKEND_SUITE(BackendSampling);

TEST(Random, UniformsStayInsideTheOpenInterval) {
  for (const uint32_t bits : {0u, 1u, 0x7FFFFFFFu, 0xFFFFFF00u, 0xFFFFFFFFu}) {
    EXPECT_GT(DrawUniform(bits), 0.0f);
    EXPECT_LT(DrawUniform(bits), 1.0f);
  }
}

TEST(Random, NeighbouringKeysAndTokensAreUncorrelated) {
  // Mean of the product of centred uniforms over neighbours; its deviation is 1/12 / sqrt(n).
  const int n = 200000;
  const auto centred = [](uint64_t seed, uint64_t counter, int32_t token) {
    return double{DrawUniform(DrawBits(DrawKey(seed, counter), token))} - 0.5;
  };
  double by_token = 0, by_counter = 0, by_seed = 0;
  for (int i = 0; i < n; ++i) {
    by_token += centred(5, 6, i) * centred(5, 6, i + 1);
    by_counter += centred(5, i, 6) * centred(5, i + 1, 6);
    by_seed += centred(i, 5, 6) * centred(i + 1, 5, 6);
  }
  const double limit = 4.0 / 12 / std::sqrt(static_cast<double>(n));
  EXPECT_LT(std::abs(by_token / n), limit);
  EXPECT_LT(std::abs(by_counter / n), limit);
  EXPECT_LT(std::abs(by_seed / n), limit);
}

}  // namespace
}  // namespace mobi
