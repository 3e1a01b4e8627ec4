#include "calibrator/price_table.h"

#include <algorithm>
#include <cmath>

#include "calibrator/mixed_linear.h"
#include "calibrator/parallel.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

// Bits at which the routed model is measured.
constexpr double kProbes[] = {2.1, 2.5, 3.0, 3.5, 4.0, 4.75, 5.5, 6.5, 7.5};
constexpr double kLogPriceLow = -80, kLogPriceHigh = 20;

// The log price at which the forecast gives `bits`; falls as bits rise.
double ForecastLogPrice(const std::vector<RecordedLosses>& recorded, double bits, int batch) {
  double low = kLogPriceLow, high = kLogPriceHigh;
  for (int i = 0; i < 40; ++i) {
    const double middle = 0.5 * (low + high);
    (ForecastBits(recorded, std::exp(middle), batch) > bits ? low : high) = middle;
  }
  return 0.5 * (low + high);
}

struct Residual {
  double forecast;
  double excess;  // measured minus forecast
};

// Piecewise linear between the probes, fading to none at the ends, where the bits are certain.
double ExcessAt(const std::vector<Residual>& residuals, double forecast) {
  Residual below{kSliceBits, 0}, above{kSliceBits * kNumLevels, 0};
  for (const Residual& r : residuals) {
    if (r.forecast <= forecast) {
      below = r;
    } else {
      above = r;
      break;
    }
  }
  const double width = above.forecast - below.forecast;
  if (width <= 0) return below.excess;
  return std::lerp(below.excess, above.excess, (forecast - below.forecast) / width);
}

}  // namespace

double ForecastBits(const std::vector<RecordedLosses>& recorded, double price, int batch) {
  double bits = 0, weights = 0;
  for (const RecordedLosses& group : recorded) {
    const int64_t tokens = group.losses.rows();
    std::vector<uint8_t> levels(group.costs.size() * static_cast<size_t>(tokens));
    bits +=
        ChooseLevels(group.losses, group.costs, price, {batch > 1, tokens / batch}, levels.data());
    for (const SegmentCost& cost : group.costs) {
      weights += static_cast<double>(cost.weights) * static_cast<double>(tokens);
    }
  }
  return bits / weights;
}

absl::Status MeasureBits(const FloatModel& model, const std::vector<FittedBlock>& blocks,
                         const std::vector<BlockRouters>& routers, absl::Span<const int32_t> ids,
                         int64_t seq_len, int num_threads, std::vector<PriceJob>& jobs) {
  const auto tokens = static_cast<int64_t>(ids.size());
  const auto segments = SegmentRows(model.config());
  std::vector<Matrix> hidden(jobs.size(), Matrix(tokens, model.config().hidden_size));
  for (Matrix& h : hidden) model.Embed(ids, h);
  double weights = 0;
  for (PriceJob& job : jobs) job.bits = 0;
  for (int layer = 0; layer < model.num_layers(); ++layer) {
    MOBI_ASSIGN_OR_RETURN(const BlockWeights norms, model.LoadBlock(layer));
    const auto groups = RoutedGroupsOfLayer(model.config(), layer);
    std::vector<MixedLinear> mixed;
    std::vector<std::vector<SegmentCost>> costs;
    for (int g = 0; g < kNumLinearGroups; ++g) {
      mixed.emplace_back(blocks[layer].linear[g], segments[g], num_threads);
      costs.push_back(CostsOf(groups[g]));
      for (const SegmentCost& cost : costs[g]) weights += static_cast<double>(cost.weights);
    }
    ParallelFor(num_threads, static_cast<int64_t>(jobs.size()), [&](int64_t j) {
      PriceJob& job = jobs[j];
      const auto linear = [&](LinearGroup group, ConstMatrixView x, MatrixView out) {
        const int g = static_cast<int>(group);
        Matrix losses = RouterScores(routers[layer][g], x);
        for (int64_t i = 0; i < losses.size(); ++i) losses.data()[i] = std::exp(losses.data()[i]);
        std::vector<uint8_t> levels(costs[g].size() * static_cast<size_t>(x.rows));
        job.bits += ChooseLevels(losses, costs[g], job.price, job.mode, levels.data());
        mixed[g].Forward(x, levels.data(), out);
      };
      BlockTrace trace;
      TraceBlock({model.config(), model.rope(), seq_len}, norms, linear, hidden[j], trace);
    });
  }
  for (PriceJob& job : jobs) job.bits /= weights * static_cast<double>(tokens);
  return absl::OkStatus();
}

std::vector<double> ProbePrices(const std::vector<RecordedLosses>& recorded, int batch) {
  std::vector<double> prices;
  for (const double bits : kProbes) {
    prices.push_back(std::exp(ForecastLogPrice(recorded, bits, batch)));
  }
  return prices;
}

std::vector<PricePoint> BuildPriceTable(const std::vector<RecordedLosses>& recorded, int batch,
                                        const std::vector<PriceJob>& jobs) {
  std::vector<Residual> residuals;
  for (const PriceJob& job : jobs) {
    const double forecast = ForecastBits(recorded, job.price, batch);
    residuals.push_back({forecast, job.bits - forecast});
  }
  std::sort(residuals.begin(), residuals.end(),
            [](const Residual& a, const Residual& b) { return a.forecast < b.forecast; });
  std::vector<PricePoint> table;
  double last_log_price = kLogPriceHigh;
  for (int tenth = 0; tenth <= 60; ++tenth) {
    const double bits = 2 + 0.1 * tenth;
    // The corrected curve rises with the forecast bits: bisect for the forecast that gives `bits`.
    double low = kSliceBits, high = kSliceBits * kNumLevels;
    for (int i = 0; i < 40; ++i) {
      const double middle = 0.5 * (low + high);
      (middle + ExcessAt(residuals, middle) < bits ? low : high) = middle;
    }
    const double log_price =
        std::min(ForecastLogPrice(recorded, 0.5 * (low + high), batch), last_log_price - 1e-3);
    last_log_price = log_price;
    table.push_back({static_cast<float>(bits), static_cast<float>(std::exp(log_price))});
  }
  return table;
}

}  // namespace mobi
