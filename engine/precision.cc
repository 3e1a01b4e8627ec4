#include "engine/precision.h"

#include <algorithm>
#include <cmath>

namespace mobi {
namespace {

// Or max_level, if none has so many.
int LowestLevelWith(float bits, int max_level) {
  int level = 1;
  while (level < max_level && static_cast<float>(BitsOfLevel(level)) < bits) ++level;
  return level;
}

}  // namespace

float PriceTable::PriceOf(float bits) const {
  if (points_.empty()) return 1.0f;
  const auto above = std::lower_bound(points_.begin(), points_.end(), bits,
                                      [](const PricePoint& p, float b) { return p.bits < b; });
  if (above == points_.begin()) return points_.front().price;
  if (above == points_.end()) return points_.back().price;
  const auto below = above - 1;
  const float t = (bits - below->bits) / (above->bits - below->bits);
  return std::exp(std::lerp(std::log(below->price), std::log(above->price), t));
}

TokenPrecision PriceTable::Resolve(float bits, float log_price_trim, int max_level) const {
  const auto highest = static_cast<uint8_t>(max_level);
  if (points_.empty() || bits >= static_cast<float>(BitsOfLevel(max_level))) {
    return {1.0f, highest, highest};
  }
  if (bits <= kMinBits) return {1.0f, 1, 1};
  return {PriceOf(bits) * std::exp(log_price_trim), 1, highest};
}

float PriceTable::BitsOf(const PrecisionBand& band, const PrecisionTarget& target) {
  if (band.level != 0) return static_cast<float>(BitsOfLevel(band.level));
  return std::clamp(target.target_bits, band.min_bits, band.max_bits);
}

TokenPrecision PriceTable::Resolve(const PrecisionBand& band, float target_bits,
                                   float log_price_trim, int max_level) const {
  if (band.level != 0) {
    const auto level = static_cast<uint8_t>(std::min(band.level, max_level));
    return {1.0f, level, level};
  }
  if (band.pinned()) return Resolve(band.min_bits, 0.0f, max_level);
  return Resolve(std::clamp(target_bits, band.min_bits, band.max_bits), log_price_trim, max_level);
}

TokenPrecision Prices::Resolve(const PrecisionBand& band, const PrecisionTarget& target,
                               Regime regime, int num_coherent, int max_level) const {
  const float trim = target.log_price_trim[regime];
  if (regime != Regime::kCoherent) {
    return token.Resolve(band, target.target_bits, trim, max_level);
  }
  const auto crowd = static_cast<float>(num_coherent) / static_cast<float>(coherent_batch);
  return coherent.Resolve(band, target.target_bits, trim + std::log(crowd), max_level);
}

int WholeLevel(const PrecisionBand& band, const PrecisionTarget& target, int max_level) {
  if (band.pinned()) return 0;
  const int level = LowestLevelWith(PriceTable::BitsOf(band, target), max_level);
  return static_cast<float>(BitsOfLevel(level)) <= band.max_bits ? level : 0;
}

int NeededLevels(float floor_bits) {
  return floor_bits <= kMinBits ? 1 : LowestLevelWith(floor_bits + 1, kNumLevels);
}

int NeededLevels(const PrecisionBand& band) {
  if (band.level != 0) return band.level;
  if (band.pinned() && band.min_bits > kMinBits) return kNumLevels;
  return NeededLevels(band.min_bits);
}

}  // namespace mobi
