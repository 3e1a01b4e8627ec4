// Random numbers of a draw as a pure function of (seed, counter, token): no state, so that what a
// request draws depends on the request alone. Compiles for the CPU and for CUDA; both read the same
// bits. Source: SplitMix64 (Steele, Lea, Flood 2014), started at a hash of seed and counter.
#ifndef MOBI_KERNELS_RANDOM_H_
#define MOBI_KERNELS_RANDOM_H_

#include <cstdint>

#ifdef __CUDACC__
#define MOBI_HOST_DEVICE __host__ __device__
#else
#define MOBI_HOST_DEVICE
#endif

namespace mobi {

inline constexpr uint64_t kSplitMixStep = 0x9E3779B97F4A7C15u;

MOBI_HOST_DEVICE constexpr uint64_t SplitMixHash(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Once per draw; the tokens of the draw read the stream that starts here.
MOBI_HOST_DEVICE constexpr uint64_t DrawKey(uint64_t seed, uint64_t counter) {
  return SplitMixHash(SplitMixHash(seed + kSplitMixStep) ^ (counter * kSplitMixStep));
}

// 32 uniform bits of one token.
MOBI_HOST_DEVICE constexpr uint32_t DrawBits(uint64_t key, int32_t token) {
  return static_cast<uint32_t>(
      SplitMixHash(key + (static_cast<uint64_t>(token) + 1) * kSplitMixStep) >> 32);
}

// Uniform in (0, 1), exact in fp32 near 0, at most 1 - 2^-24. With E = -log1p(-DrawUniform) an
// exponential variable, the token's Gumbel noise is -log(E); small E, which decides an argmax,
// keeps full relative precision.
MOBI_HOST_DEVICE constexpr float DrawUniform(uint32_t bits) {
  constexpr float kLargest = 1.0f - 0x1p-24f;
  const float v = static_cast<float>(bits) * 0x1p-32f + 0x1p-33f;
  return v < kLargest ? v : kLargest;
}

}  // namespace mobi

#endif  // MOBI_KERNELS_RANDOM_H_
