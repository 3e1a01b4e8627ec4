// x of the decode path on compute capability 9.0, in shared memory as whole numbers, much as the
// CPU backend has it: of each token and group x = step (256 high + low), high and low signed bytes,
// step the least power of two that lets its largest element fit, so that x is rounded by about
// 2^-15 of that element at most. Products with codes are exact sums of whole numbers, in any order.
// A token is two columns of an mma, one of high and one of low bytes.
//
// Layout for mma: [group][tile of four tokens][words 0 and 1, 2 and 3][token][high, low][lane t] of
// 16 bytes: each word's two registers of the operand, so that a lane has four words in two loads.
// For wgmma: [group][token][high, low] of 128 bytes, [word][register][lane t], swizzled. Where a
// router needs the halves first, a token has them in the same bytes: see HalvesAt. Half a warp
// carries one group of one token, 16 bytes a lane.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_X_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_X_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_decode90_exchange.cuh"
#include "kernels/cuda/sliced_matmul_unpack.cuh"
#include "kernels/cuda/wgmma.cuh"

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

template <int N, int W, bool kBf16, bool kAhead>
struct Decode90X : Decode90Exchange<N, W, kAhead> {
  using Base = Decode90Exchange<N, W, kAhead>;
  using Base::Base;
  using Base::block_groups;
  using Base::first_group;
  using Base::first_token;
  using Base::kWarps;
  using Base::lane;
  using Base::NT;
  using Base::num_tokens;
  using Base::p;
  using Base::plan;
  using Base::shared;
  using Base::warp;

  // ---- From memory.

  // A batch of half a warp's loads: item = group and pair of tokens, first, first + kWarps, ...
  static constexpr int kBatch = 4;

  __device__ __forceinline__ int Items() const { return block_groups << plan.pairs_log; }
  __device__ __forceinline__ int GroupOf(int item) const { return item >> plan.pairs_log; }
  __device__ __forceinline__ int TokenOf(int item) const {
    return (item & ((1 << plan.pairs_log) - 1)) * 2 + lane / 16;
  }

  __device__ __forceinline__ void ReadX(int first, uint4 (&v)[kBatch]) const {
    const uint16_t* const from = p.x + first_token * p.x_stride + first_group * kGroupSize;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int item = first + u * kWarps, token = TokenOf(item);
      v[u] = make_uint4(0, 0, 0, 0);
      if (item < Items() && token < num_tokens) {
        // Past L1, which may hold what this memory held under an earlier kernel.
        v[u] = __ldcg(reinterpret_cast<const uint4*>(from +
                                                     int64_t{token} * static_cast<int>(p.x_stride) +
                                                     GroupOf(item) * kGroupSize) +
                      lane % 16);
      }
    }
  }

  // v: the first batch, asked for already.
  __device__ __forceinline__ void StageX(uint4 (&v)[kBatch]) const {
    for (int first = warp; first < Items(); first += kBatch * kWarps) {
      if (first != warp) ReadX(first, v);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = first + u * kWarps;
        if (item >= Items()) break;
        Encode(GroupOf(item), TokenOf(item), v[u]);
      }
    }
    if constexpr (!kByMma) ptx::FenceAsyncProxy();
  }

  // ---- Whole numbers.

  // Of a token's group: what one of its products with a code of 256 levels counts, and the sum of
  // x.
  struct Terms {
    float step, sum;
  };

  static constexpr bool kByMma = kUsesMma<N>;

  __device__ __forceinline__ uint8_t* TileAt(int group, int tile) const {
    return shared + (group * NT + tile) * kTileXBytes;
  }
  // A token's two pieces of 128 bytes.
  static constexpr int kPieceStride = kByMma ? 512 : 128;
  __device__ __forceinline__ uint8_t* TokenAt(int group, int token) const {
    return TileAt(group, token / kTileTokens) + token % kTileTokens * (kByMma ? 128 : 256);
  }
  __device__ __forceinline__ uint64_t XOperand(int group) const {
    return ptx::WgmmaOperand(ptx::SharedAddress(TileAt(group, 0)));
  }
  __device__ __forceinline__ Terms* TermsAt(int group, int token) const {
    return reinterpret_cast<Terms*>(shared + plan.terms) + group * N + token;
  }

  static __device__ __forceinline__ float2 Floats(uint32_t pair) {
    if constexpr (kBf16) {
      return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
    }
    return __half22float2(*reinterpret_cast<const half2*>(&pair));
  }

  // The exponent (biased) of the largest magnitude among half a warp's, such that 32639 steps of
  // 2^-14 of it hold that magnitude. 255: not all are finite.
  static __device__ __forceinline__ int LargestExponent(const uint32_t (&words)[4]) {
    constexpr float kRoom = 1.004f;  // more than 2^15 / 32639
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = __vmaxu2(largest, words[i] & 0x7FFF7FFFu);
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) {
      largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, offset));
    }
    const float2 both = Floats(largest);
    const uint32_t bits = max(__float_as_uint(both.x * kRoom), __float_as_uint(both.y * kRoom));
    return max(static_cast<int>(bits >> 23), kLeastExponent);
  }

  // Eight elements, columns 8 (lane % 16) .. of the group. All lanes come here.
  __device__ __forceinline__ void Encode(int group, int token, const uint4& v) const {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    const int exponent = LargestExponent(words);
    const float inverse = __uint_as_float(static_cast<uint32_t>(268 - exponent) << 23);
    // 256 high + low + 128, in the low 16 bits of each.
    constexpr float kCentre = kWhole + 128;
    uint32_t value[8];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Floats(words[i]);
      value[2 * i] = __float_as_uint(fmaf(pair.x, inverse, kCentre));
      value[2 * i + 1] = __float_as_uint(fmaf(pair.y, inverse, kCentre));
      sum += static_cast<int>(value[2 * i] + value[2 * i + 1] - 2 * (kWholeBits + 128));
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (token >= num_tokens) return;

    uint32_t high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto of_byte = [&](int k) { return value[ByteColumn(4 * i + k)]; };
      const uint32_t first = __byte_perm(of_byte(0), of_byte(1), 0x5140);
      const uint32_t second = __byte_perm(of_byte(2), of_byte(3), 0x5140);
      low[i] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
      high[i] = __byte_perm(first, second, 0x7632);
    }
    WriteBytes(TokenAt(group, token), token, high, low);
    if (lane % 16 != 0) return;
    const float step = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
    const float of_product = exponent > kMostExponent ? __uint_as_float(0x7FFFFFFFu) : step / 256;
    *reinterpret_cast<float2*>(TermsAt(group, token)) =
        make_float2(of_product, step * static_cast<float>(sum));
  }

  __device__ __forceinline__ void WriteBytes(uint8_t* to, int token, const uint32_t (&high)[2],
                                             const uint32_t (&low)[2]) const {
    const int word = lane % 4, t = lane % 16 / 4;
    if constexpr (kByMma) {
      to += word / 2 * kPieceStride + t * 16 + word % 2 * 8;
      *reinterpret_cast<uint2*>(to) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(to + 64) = make_uint2(low[0], low[1]);
      return;
    }
    to += t * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int chunk = 2 * word + i, swizzle = token % 4 * 2;
      *reinterpret_cast<uint32_t*>(to + ((chunk ^ swizzle) << 4)) = high[i];
      *reinterpret_cast<uint32_t*>(to + 128 + ((chunk ^ (swizzle + 1)) << 4)) = low[i];
    }
  }

  // ---- Halves, before they are encoded.

  // 16 bytes: the eight columns of a word of lane t. Lanes that read a quarter of 32 columns, or
  // one lane t of all quarters, meet different banks.
  __device__ __forceinline__ uint4* HalvesAt(int group, int token, int word, int t) const {
    const int of_tile = token % kTileTokens;
    return reinterpret_cast<uint4*>(TokenAt(group, token) + word / 2 * kPieceStride +
                                    ((word ^ of_tile) % 2 << 6) +
                                    ((t ^ (word >> 1) ^ (of_tile & 2)) << 4));
  }
  __device__ __forceinline__ uint4* OwnHalves(int group, int token) const {
    return HalvesAt(group, token, lane % 4, lane % 16 / 4);
  }

  // Each token's group in place, by the half warp that reads it.
  __device__ __forceinline__ void EncodeHalves() const {
    for (int item = warp; item < Items(); item += kWarps) {
      const int group = GroupOf(item), token = TokenOf(item);
      const uint4 v = *OwnHalves(group, token);
      __syncwarp();
      Encode(group, token, v);
    }
    if constexpr (!kByMma) ptx::FenceAsyncProxy();
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_X_CUH_
