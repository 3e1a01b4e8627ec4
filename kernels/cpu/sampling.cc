#include "kernels/cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>

#include "kernels/random.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sampling.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/dot-inl.h"
#include "kernels/cpu/math-inl.h"

#ifndef MOBI_KERNELS_CPU_SAMPLING_CC_ONCE_
#define MOBI_KERNELS_CPU_SAMPLING_CC_ONCE_
namespace mobi::cpu {

constexpr float kNever = -std::numeric_limits<float>::infinity();
// Compressed ids are stored as whole vectors: room past the last one.
constexpr int64_t kIdPadding = 16;

// The noisy score of one token: its log probability up to a constant, plus Gumbel noise.
inline double NoisyScore(double score, float uniform) {
  return score - std::log(-std::log1p(-double{uniform}));
}

struct Drawn {
  int32_t token;
  double noisy;
};

}  // namespace mobi::cpu
#endif  // MOBI_KERNELS_CPU_SAMPLING_CC_ONCE_

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

using Floats = hn::Vec<FloatTag>;
using IntTag = hn::Rebind<int32_t, FloatTag>;

// The largest of x; NaN when a value of x is infinite or NaN.
float LargestIfFinite(const float* HWY_RESTRICT x, size_t count) {
  const FloatTag d;
  Floats largest = hn::Set(d, kNever), zeros = hn::Zero(d);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats v = hn::LoadU(d, x + i);
    largest = hn::Max(largest, v);
    zeros = hn::MulAdd(v, hn::Zero(d), zeros);  // NaN from then on if v is not finite
  }
  float most = hn::GetLane(hn::MaxOfLanes(d, largest));
  float zero = hn::GetLane(hn::SumOfLanes(d, zeros));
  for (; i < count; ++i) {
    most = std::max(most, x[i]);
    zero += x[i] * 0.0f;
  }
  return most + zero;
}

float Largest(const float* HWY_RESTRICT x, size_t count) {
  const FloatTag d;
  Floats largest = hn::Set(d, kNever);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = hn::Max(largest, hn::LoadU(d, x + i));
  float most = hn::GetLane(hn::MaxOfLanes(d, largest));
  for (; i < count; ++i) most = std::max(most, x[i]);
  return most;
}

// The first index of `value`, which x contains.
int32_t IndexOf(const float* HWY_RESTRICT x, size_t count, float value) {
  const FloatTag d;
  const Floats wanted = hn::Set(d, value);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const intptr_t lane = hn::FindFirstTrue(d, hn::Eq(hn::LoadU(d, x + i), wanted));
    if (lane >= 0) return static_cast<int32_t>(i + lane);
  }
  while (i + 1 < count && x[i] != value) ++i;
  return static_cast<int32_t>(i);
}

// The sum of exp((x - shift) * factor), none of which is above 1.
float SumExp(const float* HWY_RESTRICT x, size_t count, float shift, float factor) {
  const FloatTag d;
  const Floats shifts = hn::Set(d, shift), factors = hn::Set(d, factor);
  Floats sum0 = hn::Zero(d), sum1 = hn::Zero(d);
  size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Floats a = hn::Sub(hn::LoadU(d, x + i), shifts);
    const Floats b = hn::Sub(hn::LoadU(d, x + i + kLanes), shifts);
    sum0 = hn::Add(sum0, hn::Exp(d, hn::Mul(a, factors)));
    sum1 = hn::Add(sum1, hn::Exp(d, hn::Mul(b, factors)));
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1)));
  for (; i < count; ++i) sum += std::exp((x[i] - shift) * factor);
  return sum;
}

// ids of the values of x that are at least `limit`, ascending; room for count + kIdPadding.
int64_t Collect(const float* HWY_RESTRICT x, size_t count, float limit, int32_t* HWY_RESTRICT ids) {
  const FloatTag d;
  const IntTag di;
  const Floats limits = hn::Set(d, limit);
  size_t found = 0, i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const auto keep = hn::Ge(hn::LoadU(d, x + i), limits);
    if (hn::AllFalse(d, keep)) continue;
    const auto id = hn::Iota(di, static_cast<int32_t>(i));
    found += hn::CompressStore(id, hn::RebindMask(di, keep), di, ids + found);
  }
  for (; i < count; ++i) {
    if (x[i] >= limit) ids[found++] = static_cast<int32_t>(i);
  }
  return static_cast<int64_t>(found);
}

// Argmax over all tokens of score * factor + Gumbel noise. A token beats the best so far only if
// its uniform is below exp(score - best), so that the logarithms are taken for few.
int32_t DrawFromAll(const float* HWY_RESTRICT score, size_t count, float factor, uint64_t key) {
  const FloatTag d;
  const Floats factors = hn::Set(d, factor);
  Drawn best{0, -std::numeric_limits<double>::infinity()};
  const auto consider = [&](size_t token, float uniform) HWY_ATTR {
    const double noisy = NoisyScore(double{score[token]} * factor, uniform);
    if (noisy > best.noisy) best = {static_cast<int32_t>(token), noisy};
  };
  HWY_ALIGN float uniform[kLanes];
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      uniform[lane] = DrawUniform(DrawBits(key, static_cast<int32_t>(i + lane)));
    }
    const Floats lead = hn::Sub(hn::Mul(hn::LoadU(d, score + i), factors),
                                hn::Set(d, static_cast<float>(best.noisy) - 1e-3f));
    const Floats chance = hn::Exp(d, hn::Min(lead, hn::Set(d, 80.0f)));
    if (hn::AllFalse(d, hn::Lt(hn::Load(d, uniform), chance))) continue;
    for (size_t lane = 0; lane < kLanes; ++lane) consider(i + lane, uniform[lane]);
  }
  for (; i < count; ++i) {
    consider(i, DrawUniform(DrawBits(key, static_cast<int32_t>(i))));
  }
  return best.token;
}

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mobi::cpu {
namespace {

HWY_EXPORT(LargestIfFinite);
HWY_EXPORT(Largest);
HWY_EXPORT(IndexOf);
HWY_EXPORT(SumExp);
HWY_EXPORT(Collect);
HWY_EXPORT(DrawFromAll);

struct Candidate {
  float score;
  int32_t token;

  bool operator<(const Candidate& other) const {  // more likely first, then the lower id
    return score != other.score ? score > other.score : token < other.token;
  }
};

// A thread's memory for one row.
struct RowScratch {
  float* scores;  // the row's logits with its edits
  int32_t* ids;
  Candidate* candidates;
  float* selected;  // for the search of the k-th value

  RowScratch(float* memory, int64_t vocab)
      : scores(memory),
        ids(reinterpret_cast<int32_t*>(memory + vocab)),
        candidates(reinterpret_cast<Candidate*>(memory + 2 * vocab + kIdPadding)),
        selected(memory + 4 * vocab + kIdPadding) {}
  static size_t Floats(int64_t vocab) { return 5 * vocab + kIdPadding; }
};

float KthOf(float* values, int64_t count, int64_t k) {
  std::nth_element(values, values + k - 1, values + count, std::greater<float>());
  return values[k - 1];
}

// The k-th largest value of x, 1 <= k <= vocab. The k-th largest of the maxima of parts is a lower
// bound of it, and few values reach that.
float KthLargest(const float* x, int64_t vocab, int64_t k, RowScratch& scratch) {
  constexpr int64_t kPart = 64;
  int64_t count = vocab;
  if (k * 2 <= vocab / kPart) {
    const int64_t parts = vocab / kPart;
    for (int64_t p = 0; p < parts; ++p) {
      scratch.selected[p] = HWY_DYNAMIC_DISPATCH(Largest)(x + p * kPart, kPart);
    }
    const float bound = KthOf(scratch.selected, parts, k);
    count = HWY_DYNAMIC_DISPATCH(Collect)(x, vocab, bound, scratch.ids);
    for (int64_t i = 0; i < count; ++i) scratch.selected[i] = x[scratch.ids[i]];
  } else {
    std::copy_n(x, vocab, scratch.selected);
  }
  return KthOf(scratch.selected, count, k);
}

int64_t CollectCandidates(const float* x, int64_t vocab, float limit, RowScratch& scratch) {
  const int64_t count = HWY_DYNAMIC_DISPATCH(Collect)(x, vocab, limit, scratch.ids);
  for (int64_t i = 0; i < count; ++i) {
    scratch.candidates[i] = {x[scratch.ids[i]], scratch.ids[i]};
  }
  return count;
}

// Keeps the most likely candidates until their probability reaches top_p; sorts them. total: the
// sum of exp over all tokens that take part, relative to the largest.
int64_t CutAtTopP(Candidate* candidates, int64_t count, float largest, float factor, double total,
                  double top_p) {
  std::sort(candidates, candidates + count);
  double before = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0 && before >= top_p) return i;
    before += std::exp((candidates[i].score - largest) * factor) / total;
  }
  return count;
}

// Top-p over the whole vocabulary: looks at the tokens within `depth` of the largest, deeper and
// deeper until they hold top_p of the probability.
int64_t TopPOfAll(const float* x, int64_t vocab, float largest, float factor, double top_p,
                  RowScratch& scratch) {
  const double total = HWY_DYNAMIC_DISPATCH(SumExp)(x, vocab, largest, factor);
  for (float depth = 6;; depth *= 2) {
    const int64_t count = CollectCandidates(x, vocab, largest - depth / factor, scratch);
    double held = 0;
    for (int64_t i = 0; i < count; ++i) {
      held += std::exp((scratch.candidates[i].score - largest) * factor);
    }
    if (count == vocab || held >= top_p * total || depth > 100) {
      return CutAtTopP(scratch.candidates, count, largest, factor, total, top_p);
    }
  }
}

// The tokens that the row's filters keep, as scratch.candidates.
int64_t Filter(const float* x, int64_t vocab, float largest, const SamplingRow& row,
               RowScratch& scratch) {
  const float factor = 1.0f / row.temperature;
  const bool by_count = row.top_k > 0 && row.top_k < vocab;
  // exp((x - largest) * factor) >= min_p
  const float min_p_limit =
      row.min_p > 0 ? std::min(largest, largest + std::log(row.min_p) / factor) : kNever;
  int64_t count;
  if (by_count) {
    const float limit = KthLargest(x, vocab, row.top_k, scratch);
    count = CollectCandidates(x, vocab, limit, scratch);
    if (row.top_p < 1) {
      double total = 0;
      for (int64_t i = 0; i < count; ++i) {
        total += std::exp((scratch.candidates[i].score - largest) * factor);
      }
      count = CutAtTopP(scratch.candidates, count, largest, factor, total, row.top_p);
    }
  } else if (row.top_p < 1) {
    count = TopPOfAll(x, vocab, largest, factor, row.top_p, scratch);
  } else {
    return CollectCandidates(x, vocab, min_p_limit, scratch);
  }
  Candidate* end = std::remove_if(scratch.candidates, scratch.candidates + count,
                                  [&](const Candidate& c) { return c.score < min_p_limit; });
  return end - scratch.candidates;
}

int32_t Draw(const float* x, int64_t vocab, float largest, const SamplingRow& row,
             RowScratch& scratch) {
  if (row.temperature == 0) return HWY_DYNAMIC_DISPATCH(IndexOf)(x, vocab, largest);
  const uint64_t key = DrawKey(row.seed, row.counter);
  if ((row.top_k <= 0 || row.top_k >= vocab) && row.top_p >= 1 && row.min_p <= 0) {
    return HWY_DYNAMIC_DISPATCH(DrawFromAll)(x, vocab, 1.0f / row.temperature, key);
  }
  const int64_t count = Filter(x, vocab, largest, row, scratch);
  Drawn best{scratch.candidates[0].token, -std::numeric_limits<double>::infinity()};
  for (int64_t i = 0; i < count; ++i) {
    const Candidate& candidate = scratch.candidates[i];
    const double noisy = NoisyScore(double{candidate.score} / row.temperature,
                                    DrawUniform(DrawBits(key, candidate.token)));
    if (noisy > best.noisy) best = {candidate.token, noisy};
  }
  return best.token;
}

Sampled SampleRow(const float* logits, int64_t vocab, const SamplingRow& row,
                  const LogitEdit* edits, RowScratch scratch) {
  const Sampled none{kNonFiniteLogits, 0.0f};
  const float raw_largest = HWY_DYNAMIC_DISPATCH(LargestIfFinite)(logits, vocab);
  if (!std::isfinite(raw_largest)) return none;
  const float* x = logits;
  float largest = raw_largest;
  if (row.edit_begin < row.edit_end) {
    std::copy_n(logits, vocab, scratch.scores);
    for (int32_t i = row.edit_begin; i < row.edit_end; ++i) {
      float& score = scratch.scores[edits[i].token];
      score =
          (score > 0 ? score / edits[i].repetition : score * edits[i].repetition) + edits[i].bias;
    }
    x = scratch.scores;
    largest = HWY_DYNAMIC_DISPATCH(Largest)(x, vocab);
    if (!std::isfinite(largest)) return none;
  }
  const int32_t token = Draw(x, vocab, largest, row, scratch);
  const float sum = HWY_DYNAMIC_DISPATCH(SumExp)(logits, vocab, raw_largest, 1.0f);
  return {token, logits[token] - raw_largest - std::log(sum)};
}

void MostLikelyOfRow(const float* logits, int64_t vocab, int count, RowScratch scratch,
                     TopLogprobs& out) {
  const float largest = HWY_DYNAMIC_DISPATCH(LargestIfFinite)(logits, vocab);
  if (!std::isfinite(largest)) {  // nothing is likely; ids stay valid
    for (int rank = 0; rank < count; ++rank) {
      out.tokens[rank] = rank;
      out.logprobs[rank] = std::numeric_limits<float>::quiet_NaN();
    }
    return;
  }
  const float limit = KthLargest(logits, vocab, std::min<int64_t>(count, vocab), scratch);
  const int64_t found = CollectCandidates(logits, vocab, limit, scratch);
  const auto kept = std::min<int64_t>(count, found);
  std::partial_sort(scratch.candidates, scratch.candidates + kept, scratch.candidates + found);
  const float sum = HWY_DYNAMIC_DISPATCH(SumExp)(logits, vocab, largest, 1.0f);
  for (int64_t rank = 0; rank < kept; ++rank) {
    out.tokens[rank] = scratch.candidates[rank].token;
    out.logprobs[rank] = scratch.candidates[rank].score - largest - std::log(sum);
  }
}

}  // namespace

void Sample(ThreadPool& pool, Workspace& workspace, Tensor logits, const SamplingBatch& batch,
            Sampled* out) {
  workspace.ReservePerThread(RowScratch::Floats(logits.cols));
  pool.Run(batch.num_rows, [&](int i, int thread) {
    const SamplingRow& row = batch.rows[i];
    out[i] = SampleRow(logits.Row<float>(row.logits_row), logits.cols, row, batch.edits,
                       RowScratch(workspace.of_thread(thread), logits.cols));
  });
}

void TokenLogprobs(ThreadPool& pool, Tensor logits, const int32_t* ids, float* out) {
  pool.Run(static_cast<int>(logits.rows), [&](int i, int) {
    out[i] = 0;
    if (ids[i] < 0) return;
    const float* row = logits.Row<float>(i);
    const float largest = HWY_DYNAMIC_DISPATCH(Largest)(row, logits.cols);
    const float sum = HWY_DYNAMIC_DISPATCH(SumExp)(row, logits.cols, largest, 1.0f);
    out[i] = row[ids[i]] - largest - std::log(sum);
  });
}

void MostLikely(ThreadPool& pool, Workspace& workspace, Tensor logits, const int32_t* rows,
                int num_rows, int count, TopLogprobs* out) {
  workspace.ReservePerThread(RowScratch::Floats(logits.cols));
  pool.Run(num_rows, [&](int i, int thread) {
    MostLikelyOfRow(logits.Row<float>(rows[i]), logits.cols, count,
                    RowScratch(workspace.of_thread(thread), logits.cols), out[i]);
  });
}

}  // namespace mobi::cpu
#endif  // HWY_ONCE
