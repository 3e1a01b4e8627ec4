// From average bits to what the kernels compare: a price per byte and bounds on the level. Pure
// functions of the checkpoint's price table; safe from any thread.
// Source: the routing rule of MoBiQuant (arXiv 2602.20191), with one price over all linears.
#ifndef MOBI_ENGINE_PRECISION_H_
#define MOBI_ENGINE_PRECISION_H_

#include <cstdint>
#include <vector>

#include "engine/engine.h"
#include "engine/weight_source.h"

namespace mobi {

inline constexpr float kMinBits = 2.0f;
inline constexpr float kMaxBits = 8.0f;
inline constexpr float kFloatBits = 16.0f;  // what a float folder is reported at

// How one token is routed: see RoutingBatch.
struct TokenPrecision {
  float price = 1.0f;  // loss per byte
  uint8_t min_level = kNumLevels;
  uint8_t max_level = kNumLevels;
};

// Average bits that each price buys, as measured at calibration.
class PriceTable {
 public:
  // `points` ascend in bits and fall in price; empty for a float model.
  explicit PriceTable(std::vector<PricePoint> points) : points_(std::move(points)) {}

  // Interpolated in log(price); clamped to the table's ends.
  float PriceOf(float bits) const;

  // At 2 bits and below every linear reads level 1, at 8 bits and above level 4, whatever the
  // scores say; between them the price decides. Levels above max_level are not to be read: bits
  // that only they could give read that level everywhere.
  TokenPrecision Resolve(float bits, float log_price_trim, int max_level = kNumLevels) const;

  // A request's precision under a target: pinned requests ignore target and trim.
  TokenPrecision Resolve(const PrecisionBand& band, float target_bits, float log_price_trim,
                         int max_level = kNumLevels) const;
  // The average bits asked for such a request's tokens.
  static float BitsOf(const PrecisionBand& band, const PrecisionTarget& target);

 private:
  std::vector<PricePoint> points_;
};

// The two regimes of a checkpoint: tokens that choose for themselves, and decodes that share
// levels.
struct Prices {
  PriceTable token;
  PriceTable coherent;
  int coherent_batch = 1;  // tokens that shared a level when `coherent` was measured

  // num_coherent: the tokens that share levels, in that regime. Their losses are summed, so the
  // same bits need a price that grows with their number.
  TokenPrecision Resolve(const PrecisionBand& band, const PrecisionTarget& target, Regime regime,
                         int num_coherent = 1, int max_level = kNumLevels) const;
};

// The one level at which all linears read tokens that need not choose one by one: the lowest with
// the bits asked for, or max_level. 0: the request is pinned, or its band ends below.
int WholeLevel(const PrecisionBand& band, const PrecisionTarget& target,
               int max_level = kNumLevels);

// Levels that must be in memory so that at least `floor_bits` can be had on average: routing wants
// a bit more than the average.
int NeededLevels(float floor_bits);
// The same for a request. Pinned to average bits, it may read any level.
int NeededLevels(const PrecisionBand& band);

}  // namespace mobi

#endif  // MOBI_ENGINE_PRECISION_H_
