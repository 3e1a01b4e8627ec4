// The price of every average-bit target: the routed model is run over calibration tokens at several
// prices, each job with its own activations, and the bits it used are inverted into a table. A
// forecast from recorded losses chooses the prices and shapes the curve between the measured
// points.
#ifndef MOBI_CALIBRATOR_PRICE_TABLE_H_
#define MOBI_CALIBRATOR_PRICE_TABLE_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "calibrator/block_calibration.h"
#include "calibrator/float_model.h"
#include "calibrator/router_training.h"
#include "calibrator/routing.h"
#include "engine/checkpoint.h"

namespace mobi {

using BlockRouters = std::array<RouterWeights, kNumLinearGroups>;

// Predicted losses of one linear group over some tokens.
struct RecordedLosses {
  Matrix losses;  // [tokens, segments * kNumLevels]
  std::vector<SegmentCost> costs;
};

// Average bits that `price` would give if activations did not depend on it. `batch` tokens choose
// together; 1: token mode.
double ForecastBits(const std::vector<RecordedLosses>& recorded, double price, int batch);

struct PriceJob {
  double price = 0;
  RoutingMode mode;
  double bits = 0;  // measured
};

// Runs sequences `ids` through the routed model once per job and fills in their bits.
absl::Status MeasureBits(const FloatModel& model, const std::vector<FittedBlock>& blocks,
                         const std::vector<BlockRouters>& routers, absl::Span<const int32_t> ids,
                         int64_t seq_len, int num_threads, std::vector<PriceJob>& jobs);

// Prices to measure at: where the forecast says 2 to 8 bits lie.
std::vector<double> ProbePrices(const std::vector<RecordedLosses>& recorded, int batch);

// Bits 2.0, 2.1, ... 8.0, prices strictly falling.
std::vector<PricePoint> BuildPriceTable(const std::vector<RecordedLosses>& recorded, int batch,
                                        const std::vector<PriceJob>& jobs);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_PRICE_TABLE_H_
