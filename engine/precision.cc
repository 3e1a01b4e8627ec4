#include "engine/precision.h"

#include <algorithm>
#include <cmath>

namespace mobi {

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

TokenPrecision PriceTable::Resolve(float bits, float log_price_trim) const {
  if (points_.empty() || bits >= kMaxBits) return {1.0f, kNumLevels, kNumLevels};
  if (bits <= kMinBits) return {1.0f, 1, 1};
  return {PriceOf(bits) * std::exp(log_price_trim), 1, kNumLevels};
}

float PriceTable::BitsOf(const PrecisionBand& band, const PrecisionTarget& target) {
  if (band.level != 0) return static_cast<float>(BitsOfLevel(band.level));
  return std::clamp(target.target_bits, band.min_bits, band.max_bits);
}

TokenPrecision PriceTable::Resolve(const PrecisionBand& band, float target_bits,
                                   float log_price_trim) const {
  if (band.level != 0) {
    const auto level = static_cast<uint8_t>(band.level);
    return {1.0f, level, level};
  }
  if (band.pinned()) return Resolve(band.min_bits, 0.0f);
  return Resolve(std::clamp(target_bits, band.min_bits, band.max_bits), log_price_trim);
}

TokenPrecision Prices::Resolve(const PrecisionBand& band, const PrecisionTarget& target,
                               int num_coherent) const {
  if (num_coherent == 0) return token.Resolve(band, target.target_bits, target.log_price_trim);
  const auto crowd = static_cast<float>(num_coherent) / static_cast<float>(coherent_batch);
  return coherent.Resolve(band, target.target_bits,
                          target.coherent_log_price_trim + std::log(crowd));
}

}  // namespace mobi
