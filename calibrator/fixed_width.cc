#include "calibrator/fixed_width.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "calibrator/joint_codes.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/parallel.h"
#include "calibrator/vector_math.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr int64_t kRowBlock = 64;

// Values base + step * q, q in 0..top.
struct Uniform {
  float base = 0;
  float step = 0;
  int top = 0;

  int Nearest(float value) const {
    const float q = step > 0 ? std::nearbyint((value - base) / step) : 0.0f;
    return static_cast<int>(std::clamp(q, 0.0f, static_cast<float>(top)));
  }
  float At(int q) const { return base + step * static_cast<float>(q); }
};

Uniform MinMax(const float* w, int bits) {
  const auto [min, max] = std::minmax_element(w, w + kGroupSize);
  const float low = std::min(*min, 0.0f), high = std::max(*max, 0.0f);
  Uniform u;
  u.top = (1 << bits) - 1;
  u.step = (high - low) / static_cast<float>(u.top);
  if (u.step > 0) u.base = -std::nearbyint(-low / u.step) * u.step;
  return u;
}

// A b-bit code sits in the top bits; levels that hold all of it read its value exactly.
void Store(const Uniform& u, int bits, int64_t row, int64_t group, NestedWeight& weight) {
  const float range = u.step * static_cast<float>(u.top + 1);
  for (int level = 1; level <= kNumLevels; ++level) {
    const int dropped = std::max(bits - BitsOfLevel(level), 0);
    const float base = u.base + 0.5f * u.step * static_cast<float>((1 << dropped) - 1);
    const float step = range / static_cast<float>(1 << BitsOfLevel(level));
    weight.Scale(level, row, group) = RoundedScale(range, base - 0.5f * step + 0.5f * range);
  }
}

// What the stored pair reads, so that codes are chosen for the values that will be served.
Uniform Stored(int bits, int64_t row, int64_t group, const NestedWeight& weight) {
  const LevelGrid grid = GridOf(weight.Scale(kNumLevels, row, group), kNumLevels);
  return {grid.base, grid.step * static_cast<float>(1 << (8 - bits)), (1 << bits) - 1};
}

uint8_t CodeOf(int q, int bits) { return static_cast<uint8_t>(q << (8 - bits)); }

void RoundGroup(const float* w, int bits, int64_t row, int64_t group, NestedWeight& weight) {
  const Uniform u = Stored(bits, row, group, weight);
  uint8_t* codes = weight.Codes(row) + group * kGroupSize;
  for (int j = 0; j < kGroupSize; ++j) codes[j] = CodeOf(u.Nearest(w[j]), bits);
}

// The shrunk range of least squared error weighted by importance.
Uniform SearchClip(const float* w, const float* importance, int bits) {
  const auto [min, max] = std::minmax_element(w, w + kGroupSize);
  Uniform best = MinMax(w, bits);
  float best_error = std::numeric_limits<float>::infinity();
  for (int lower = 20; lower >= 6; --lower) {
    for (int upper = 20; upper >= 6; --upper) {
      const float low = *min * 0.05f * static_cast<float>(lower);
      const float high = *max * 0.05f * static_cast<float>(upper);
      if (!(high > low)) continue;
      const Uniform u{low, (high - low) / static_cast<float>(best.top), best.top};
      float error = 0;
      for (int j = 0; j < kGroupSize; ++j) {
        const float d = u.At(u.Nearest(w[j])) - w[j];
        error += importance[j] * d * d;
      }
      if (error < best_error) best_error = error, best = u;
    }
  }
  return best;
}

// One row along the plan: each column's rounding error moves to the columns behind it.
void FeedBack(const FittingProblem& problem, const FeedbackPlan& plan, int bits, int64_t row,
              NestedWeight& weight) {
  const Matrix& factor = plan.factors.front();
  const int64_t cols = problem.cols();
  std::vector<float> target(static_cast<size_t>(cols));
  for (int64_t i = 0; i < cols; ++i) target[i] = problem.weight(row, plan.order[i]);
  for (int64_t i = 0; i < cols; ++i) {
    const int64_t column = plan.order[i];
    const Uniform u = Stored(bits, row, column / kGroupSize, weight);
    const int q = u.Nearest(target[i]);
    weight.Codes(row)[column] = CodeOf(q, bits);
    const float error = (target[i] - u.At(q)) / factor(i, i);
    AddScaled(target.data() + i + 1, factor.Row(i) + i + 1, -error, cols - i - 1);
  }
}

// Both ends of every range of some rows, trained with Adam against the rows' output error.
class ClipTrainer {
 public:
  ClipTrainer(const FittingProblem& problem, const FixedWidthOptions& options, int64_t begin,
              int64_t count)
      : problem_(problem),
        options_(options),
        begin_(begin),
        count_(count),
        groups_(problem.cols() / kGroupSize),
        top_(static_cast<float>((1 << options.bits) - 1)),
        ends_(static_cast<size_t>(count * groups_)) {
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t g = 0; g < groups_; ++g) {
        const float* w = problem_.weight.Row(begin_ + r) + g * kGroupSize;
        const auto [min, max] = std::minmax_element(w, w + kGroupSize);
        Ends& ends = At(r, g);
        ends.full = std::max(*max - *min, 1e-6f);
        ends.value = {*min, std::max(*max, *min + ends.full)};
      }
    }
  }

  void Run() {
    for (int step = 1; step <= options_.lwc_steps; ++step) {
      const float progress = static_cast<float>(step - 1) / static_cast<float>(options_.lwc_steps);
      Step(step, options_.lwc_learning_rate * 0.5f * (1 + std::cos(3.14159265f * progress)));
    }
  }

  Uniform Result(int64_t r, int64_t g) const {
    const Ends& ends = ends_[r * groups_ + g];
    return {ends.value[0], (ends.value[1] - ends.value[0]) / top_, static_cast<int>(top_)};
  }

 private:
  struct Ends {
    float full = 0;
    std::array<float, 2> value{}, first{}, second{};  // low, high; Adam's moments
  };
  Ends& At(int64_t r, int64_t g) { return ends_[r * groups_ + g]; }

  // Rounding passes gradients as if it were not there; a clipped weight follows its end.
  void Step(int step, float rate) {
    Matrix error(count_, problem_.cols()), gradient(count_, problem_.cols());
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t j = 0; j < problem_.cols(); ++j) {
        const float w = problem_.weight(begin_ + r, j);
        const Uniform u = Result(r, j / kGroupSize);
        error(r, j) = u.At(u.Nearest(w)) - w;
      }
    }
    Multiply(error, problem_.streams.front().hessian, gradient);
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t g = 0; g < groups_; ++g) Move(step, rate, r, g, gradient.Row(r));
    }
  }

  void Move(int step, float rate, int64_t r, int64_t g, const float* gradient) {
    const Uniform u = Result(r, g);
    std::array<float, 2> slope{};
    for (int64_t j = g * kGroupSize; j < (g + 1) * kGroupSize; ++j) {
      const float at = (problem_.weight(begin_ + r, j) - u.base) / u.step;
      const float by_high = at < 0 ? 0.0f : at > top_ ? 1.0f : (std::nearbyint(at) - at) / top_;
      slope[1] += gradient[j] * by_high;
      slope[0] += gradient[j] * (at < 0 ? 1.0f : -by_high + (at > top_ ? 1.0f : 0.0f));
    }
    Ends& ends = At(r, g);
    const float c1 = 1 - std::pow(0.9f, static_cast<float>(step));
    const float c2 = 1 - std::pow(0.99f, static_cast<float>(step));
    for (int p = 0; p < 2; ++p) {
      ends.first[p] = 0.9f * ends.first[p] + 0.1f * slope[p];
      ends.second[p] = 0.99f * ends.second[p] + 0.01f * slope[p] * slope[p];
      ends.value[p] -=
          rate * ends.full * (ends.first[p] / c1) / (std::sqrt(ends.second[p] / c2) + 1e-20f);
    }
    // A range keeps a hundredth of its width.
    ends.value[1] = std::max(ends.value[1], ends.value[0] + 0.01f * ends.full);
  }

  const FittingProblem& problem_;
  const FixedWidthOptions& options_;
  const int64_t begin_, count_, groups_;
  const float top_;
  std::vector<Ends> ends_;
};

void FitRows(const FittingProblem& problem, const FixedWidthOptions& options,
             const FeedbackPlan& plan, int64_t begin, int64_t count, NestedWeight& weight) {
  ClipTrainer trainer(problem, options, begin, count);
  if (options.method == FixedMethod::kLwc) trainer.Run();
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = begin + r;
    for (int64_t g = 0; g < weight.groups(); ++g) {
      const float* w = problem.weight.Row(row) + g * kGroupSize;
      Uniform u;
      switch (options.method) {
        case FixedMethod::kLwc:
          u = trainer.Result(r, g);
          break;
        case FixedMethod::kGptq:
          u = SearchClip(w, problem.importance.data() + g * kGroupSize, options.bits);
          break;
        default:
          u = MinMax(w, options.bits);
      }
      Store(u, options.bits, row, g, weight);
      RoundGroup(w, options.bits, row, g, weight);
    }
    if (options.method == FixedMethod::kGptq) FeedBack(problem, plan, options.bits, row, weight);
  }
}

}  // namespace

absl::StatusOr<NestedWeight> FitFixedWidth(const FittingProblem& problem,
                                           const FixedWidthOptions& options, int num_threads) {
  FeedbackPlan plan;
  if (options.method == FixedMethod::kGptq) {
    MOBI_ASSIGN_OR_RETURN(plan, PlanFeedback(problem));
  }
  NestedWeight weight(problem.rows(), problem.cols());
  ParallelFor(num_threads, (problem.rows() + kRowBlock - 1) / kRowBlock, [&](int64_t block) {
    const int64_t begin = block * kRowBlock;
    FitRows(problem, options, plan, begin, std::min(kRowBlock, problem.rows() - begin), weight);
  });
  return weight;
}

}  // namespace mobi
