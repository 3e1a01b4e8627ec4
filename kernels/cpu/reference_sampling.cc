#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/cpu/reference_ops.h"
#include "kernels/random.h"

namespace mobi::reference {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();

std::vector<double> LogitsOf(Tensor logits, int64_t row) {
  const float* values = logits.Row<float>(row);
  return {values, values + logits.cols};
}

double LogSumExp(const std::vector<double>& x) {
  const double largest = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double value : x) sum += std::exp(value - largest);
  return largest + std::log(sum);
}

// Token ids by descending score, ties by ascending id.
std::vector<int32_t> Descending(const std::vector<double>& scores) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  return order;
}

// Keeps the tokens that score at least as high as the k-th: ties stay, as in Hugging Face.
void KeepTopK(int k, std::vector<double>& scores) {
  if (k <= 0 || k >= static_cast<int>(scores.size())) return;
  const double limit = scores[Descending(scores)[k - 1]];
  for (double& score : scores) {
    if (score < limit) score = kNever;
  }
}

// Keeps the smallest set of most likely tokens whose probability reaches top_p, at least one.
void KeepTopP(double top_p, std::vector<double>& scores) {
  if (top_p >= 1) return;
  const double normalizer = LogSumExp(scores);
  double before = 0;
  bool first = true;
  for (const int32_t token : Descending(scores)) {
    const double probability = std::exp(scores[token] - normalizer);
    if (!first && before >= top_p) scores[token] = kNever;
    before += probability;
    first = false;
  }
}

// Keeps the tokens at least min_p times as likely as the most likely one.
void KeepMinP(double min_p, std::vector<double>& scores) {
  if (min_p <= 0) return;
  const double largest = *std::max_element(scores.begin(), scores.end());
  for (double& score : scores) {
    if (std::exp(score - largest) < min_p) score = kNever;
  }
}

int32_t Argmax(const std::vector<double>& scores) {
  return static_cast<int32_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
}

}  // namespace

std::vector<double> FilteredScores(Tensor logits, const SamplingRow& row, const LogitEdit* edits) {
  std::vector<double> scores = LogitsOf(logits, row.logits_row);
  for (const double score : scores) {
    if (!std::isfinite(score)) return {};
  }
  for (int32_t i = row.edit_begin; i < row.edit_end; ++i) {
    double& score = scores[edits[i].token];
    score = (score > 0 ? score / edits[i].repetition : score * edits[i].repetition) + edits[i].bias;
  }
  if (*std::max_element(scores.begin(), scores.end()) == kNever) return {};
  if (row.temperature == 0) return scores;
  for (double& score : scores) score /= row.temperature;
  KeepTopK(row.top_k, scores);
  KeepTopP(row.top_p, scores);
  KeepMinP(row.min_p, scores);
  return scores;
}

void Sample(Tensor logits, const SamplingBatch& batch, Sampled* out) {
  for (int i = 0; i < batch.num_rows; ++i) {
    const SamplingRow& row = batch.rows[i];
    std::vector<double> scores = FilteredScores(logits, row, batch.edits);
    out[i] = {kNonFiniteLogits, 0.0f};
    if (scores.empty()) continue;
    if (row.temperature > 0) {
      const uint64_t key = DrawKey(row.seed, row.counter);
      for (size_t token = 0; token < scores.size(); ++token) {
        const double uniform = DrawUniform(DrawBits(key, static_cast<int32_t>(token)));
        scores[token] -= std::log(-std::log1p(-uniform));
      }
    }
    out[i].token = Argmax(scores);
    TokenLogprobs({logits.Row<float>(row.logits_row), DType::kF32, 1, logits.cols, logits.cols},
                  &out[i].token, &out[i].logprob);
  }
}

void TokenLogprobs(Tensor logits, const int32_t* ids, float* out) {
  for (int64_t i = 0; i < logits.rows; ++i) {
    out[i] = 0;
    if (ids[i] < 0) continue;
    const std::vector<double> values = LogitsOf(logits, i);
    out[i] = static_cast<float>(values[ids[i]] - LogSumExp(values));
  }
}

void MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count, TopLogprobs* out) {
  for (int i = 0; i < num_rows; ++i) {
    std::vector<double> values = LogitsOf(logits, rows[i]);
    const double normalizer = LogSumExp(values);
    for (int rank = 0; rank < count; ++rank) {
      const int32_t token = Argmax(values);
      out[i].tokens[rank] = token;
      out[i].logprobs[rank] = static_cast<float>(values[token] - normalizer);
      values[token] = kNever;
    }
  }
}

}  // namespace mobi::reference
