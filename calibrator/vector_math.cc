#include "calibrator/vector_math.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "calibrator/simd.h"

namespace mobi {
namespace {

// exp by 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients); branch-free.
inline float Exp(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float n = std::round(x * 1.44269504f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

}  // namespace

MOBI_VECTORIZED float ExpMinusMax(float* x, int64_t count, float* max_out) {
  float max = x[0];
  for (int64_t i = 0; i < count; ++i) max = x[i] > max ? x[i] : max;
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    x[i] = Exp(x[i] - max);
    sum += x[i];
  }
  if (max_out != nullptr) *max_out = max;
  return sum;
}

MOBI_VECTORIZED void Scale(float* x, float scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= scale;
}

MOBI_VECTORIZED void AddScaled(float* y, const float* x, float scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += scale * x[i];
}

MOBI_VECTORIZED float DotProduct(const float* a, const float* b, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

MOBI_VECTORIZED void SiluTimes(const float* gate, const float* up, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = gate[i] / (1.0f + Exp(-gate[i])) * up[i];
}

MOBI_VECTORIZED void SiluTimesBackward(const float* gate, const float* up, const float* d_out,
                                       float* d_gate, float* d_up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float sigmoid = 1.0f / (1.0f + Exp(-gate[i]));
    d_up[i] = d_out[i] * gate[i] * sigmoid;
    d_gate[i] = d_out[i] * up[i] * sigmoid * (1.0f + gate[i] * (1.0f - sigmoid));
  }
}

double DistributionGap(float* target, float* logits, float scale, int64_t count) {
  float target_max = 0, max = 0;
  std::vector<float> gap(logits, logits + count);
  AddScaled(gap.data(), target, -1, count);  // log q - log p, up to both normalisers
  const float target_sum = ExpMinusMax(target, count, &target_max);
  const float sum = ExpMinusMax(logits, count, &max);
  Scale(target, 1.0f / target_sum, count);
  Scale(logits, scale / sum, count);
  const double normaliser = (std::log(sum) + max) - (std::log(target_sum) + target_max);
  const double kl = normaliser - DotProduct(target, gap.data(), count);
  AddScaled(logits, target, -scale, count);
  return kl;
}

}  // namespace mobi
