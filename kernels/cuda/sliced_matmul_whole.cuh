// x as whole numbers, for products with bytes (sliced_matmul_unpack.cuh), much as the CPU backend
// has it: of each token and group x = step (256 high + low), high and low signed bytes, step the
// least power of two that lets its largest element fit, so that x is rounded by about 2^-15 of that
// element at most. Products with codes are exact sums of whole numbers, in any order. A token is
// two columns of a matrix product, one of high and one of low bytes.
//
// Half a warp carries one group of one token, 16 bytes a lane.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_WHOLE_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_WHOLE_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/sliced_matmul_unpack.cuh"

namespace mobi::cuda {

// A whole number s, |s| < 2^22, added to these bits makes a float of 1.5 * 2^23 + s: sums of
// products start from it and need no conversion.
inline constexpr uint32_t kWholeBits = 0x4B400000u;
inline constexpr float kWhole = 12582912.0f;
static_assert(255 * 128 * kGroupSize < 1 << 22);

// Larger elements than 2^110 (bf16) count as not finite: sums times their step would not be.
inline constexpr int kMostExponent = 127 + 109;
// The least whose step / 256 is a normal float.
inline constexpr int kLeastExponent = 23;

// Of a token's group: what one of its products with a code of 256 levels counts, and the sum of x.
struct WholeTerms {
  float step, sum;
};

template <bool kBf16>
__device__ __forceinline__ float2 Floats(uint32_t pair) {
  if constexpr (kBf16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  }
  return __half22float2(*reinterpret_cast<const half2*>(&pair));
}

// The exponent (biased) of the largest magnitude among half a warp's, such that 32639 steps of
// 2^-14 of it hold that magnitude. 255: not all are finite.
template <bool kBf16>
__device__ __forceinline__ int LargestExponent(const uint32_t (&words)[4]) {
  constexpr float kRoom = 1.004f;  // more than 2^15 / 32639
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = __vmaxu2(largest, words[i] & 0x7FFF7FFFu);
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, offset));
  }
  const float2 both = Floats<kBf16>(largest);
  const uint32_t bits = max(__float_as_uint(both.x * kRoom), __float_as_uint(both.y * kRoom));
  return max(static_cast<int>(bits >> 23), kLeastExponent);
}

// A lane's eight elements, columns 8 (lane % 16) .. of the group, in the order of ByteColumn.
struct WholeBytes {
  uint32_t high[2], low[2];
  WholeTerms terms;  // of the group, in every lane
};

// All lanes come here.
template <bool kBf16>
__device__ __forceinline__ WholeBytes EncodeWhole(const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  const int exponent = LargestExponent<kBf16>(words);
  const float inverse = __uint_as_float(static_cast<uint32_t>(268 - exponent) << 23);
  // 256 high + low + 128, in the low 16 bits of each.
  constexpr float kCentre = kWhole + 128;
  uint32_t value[8];
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Floats<kBf16>(words[i]);
    value[2 * i] = __float_as_uint(fmaf(pair.x, inverse, kCentre));
    value[2 * i + 1] = __float_as_uint(fmaf(pair.y, inverse, kCentre));
    sum += static_cast<int>(value[2 * i] + value[2 * i + 1] - 2 * (kWholeBits + 128));
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);

  WholeBytes bytes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto of_byte = [&](int k) { return value[ByteColumn(4 * i + k)]; };
    const uint32_t first = __byte_perm(of_byte(0), of_byte(1), 0x5140);
    const uint32_t second = __byte_perm(of_byte(2), of_byte(3), 0x5140);
    bytes.low[i] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
    bytes.high[i] = __byte_perm(first, second, 0x7632);
  }
  const float step = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
  bytes.terms.step = exponent > kMostExponent ? __uint_as_float(0x7FFFFFFFu) : step / 256;
  bytes.terms.sum = step * static_cast<float>(sum);
  return bytes;
}

// Of a token in the layout for wgmma: [token][high, low] of 128 bytes, [word][register][lane t],
// swizzled. to: the token's 256 bytes.
__device__ __forceinline__ void WriteForWgmma(const WholeBytes& bytes, int token, int lane,
                                              uint8_t* to) {
  const int word = lane % 4, t = lane % 16 / 4;
  to += t * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int chunk = 2 * word + i, swizzle = token % 4 * 2;
    *reinterpret_cast<uint32_t*>(to + ((chunk ^ swizzle) << 4)) = bytes.high[i];
    *reinterpret_cast<uint32_t*>(to + 128 + ((chunk ^ (swizzle + 1)) << 4)) = bytes.low[i];
  }
}

// A group's products with one token: 256 high + low, in steps; a whole number that is rounded once.
__device__ __forceinline__ float WholeProduct(uint32_t high, uint32_t low, float step) {
  return static_cast<float>(static_cast<int>(high * 256 + low)) * step;
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_WHOLE_CUH_
