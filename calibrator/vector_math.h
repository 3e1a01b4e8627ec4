// Elementwise loops and row reductions of a forward pass, written so that they vectorize.
#ifndef MOBI_CALIBRATOR_VECTOR_MATH_H_
#define MOBI_CALIBRATOR_VECTOR_MATH_H_

#include <cstdint>

namespace mobi {

// x = exp(x - max(x)) over [0, count); returns the sum. Relative error about 1e-7.
float ExpMinusMax(float* x, int64_t count, float* max_out = nullptr);
void Scale(float* x, float scale, int64_t count);
// y += scale * x.
void AddScaled(float* y, const float* x, float scale, int64_t count);
float DotProduct(const float* a, const float* b, int64_t count);
// out = gate / (1 + exp(-gate)) * up.
void SiluTimes(const float* gate, const float* up, float* out, int64_t count);
void SiluTimesBackward(const float* gate, const float* up, const float* d_out, float* d_gate,
                       float* d_up, int64_t count);

// KL(softmax(target) || softmax(logits)); logits become scale * (softmax(logits) -
// softmax(target)), target its softmax.
double DistributionGap(float* target, float* logits, float scale, int64_t count);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_VECTOR_MATH_H_
