#include "calibrator/bits_aim.h"

#include <algorithm>

#include "engine/precision.h"

namespace mobi {

float BitsAim::Next() const {
  if (seen_ == 0 || wanted_ <= kMinBits || wanted_ >= kMaxBits) return wanted_;
  const double ask = wanted_ + missed_ / seen_ + owed_ / repaid_over_;
  return std::clamp(static_cast<float>(ask), kMinBits, kMaxBits);
}

void BitsAim::Saw(double asked, double used) {
  ++seen_;
  missed_ += asked - used;
  owed_ += wanted_ - used;
}

}  // namespace mobi
