// x of the decode path on compute capability 9.0, in shared memory as whole numbers
// (sliced_matmul_whole.cuh).
//
// Layout for mma: [group][tile of four tokens][words 0 and 1, 2 and 3][token][high, low][lane t] of
// 16 bytes: each word's two registers of the operand, so that a lane has four words in two loads.
// For wgmma: see WriteForWgmma. Where a router needs the halves first, a token has them in the same
// bytes, or in as many elsewhere: see HalvesAt.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_X_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_X_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_decode90_exchange.cuh"
#include "kernels/cuda/sliced_matmul_whole.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace mobi::cuda {

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

  using Terms = WholeTerms;

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

  // A token's group, by half a warp. All lanes come here.
  __device__ __forceinline__ void Encode(int group, int token, const uint4& v) const {
    const WholeBytes bytes = EncodeWhole<kBf16>(v);
    if (token >= num_tokens) return;
    uint8_t* const to = TokenAt(group, token);
    if constexpr (kByMma) {
      WriteForMma(bytes, to);
    } else {
      WriteForWgmma(bytes, token, lane, to);
    }
    if (lane % 16 == 0) {
      *reinterpret_cast<float2*>(TermsAt(group, token)) =
          make_float2(bytes.terms.step, bytes.terms.sum);
    }
  }

  __device__ __forceinline__ void WriteForMma(const WholeBytes& bytes, uint8_t* to) const {
    const int word = lane % 4, t = lane % 16 / 4;
    to += word / 2 * kPieceStride + t * 16 + word % 2 * 8;
    *reinterpret_cast<uint2*>(to) = make_uint2(bytes.high[0], bytes.high[1]);
    *reinterpret_cast<uint2*>(to + 64) = make_uint2(bytes.low[0], bytes.low[1]);
  }

  // ---- Halves, before they are encoded.

  // 16 bytes: the eight columns of a word of lane t. Lanes that read a quarter of 32 columns, or
  // one lane t of all quarters, meet different banks.
  __device__ __forceinline__ uint4* HalvesAt(int group, int token, int word, int t) const {
    const int of_tile = token % kTileTokens;
    return reinterpret_cast<uint4*>(TokenAt(group, token) + plan.halves + word / 2 * kPieceStride +
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
