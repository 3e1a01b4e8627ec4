// x of the decode path on compute capability 9.0, in shared memory: fp16 in the order of the
// fragments' columns, with the sums over each group that biases and offsets meet.
// Layout: [group][half of 64 columns][token] of 128 bytes, swizzled for wgmma; for mma (N <= 16)
// [group][eight tokens][quarter of 32 columns][token][lane of the token] of 16 bytes, so that a
// lane has its words of a quarter in one load. Half a warp carries one group of one token, 16 bytes
// a lane.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_X_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_X_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_decode90_exchange.cuh"
#include "kernels/cuda/sliced_matmul_stage.cuh"
#include "kernels/cuda/sliced_matmul_unpack.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace mobi::cuda {

template <int N, int W, bool kBf16, bool kEach>
struct Decode90X : Decode90Exchange<N, W, kEach> {
  using Base = Decode90Exchange<N, W, kEach>;
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

  __device__ __forceinline__ void WriteX(int first, uint4 (&v)[kBatch]) const {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int item = first + u * kWarps, group = GroupOf(item), token = TokenOf(item);
      if (item >= Items()) break;
      float unit = 1;
      if constexpr (kBf16) v[u] = ScaledHalves(v[u], unit);
      if (token >= num_tokens) continue;
      WriteChunk(group, token, v[u]);
      if (kBf16 && lane % 16 == 0) {
        reinterpret_cast<float*>(shared + plan.unit)[group * N + token] = unit;
      }
    }
  }

  static constexpr bool kByMma = kUsesMma<N>;

  // In the layout for mma: eight tokens of a group.
  __device__ __forceinline__ uint8_t* TileAt(int group, int tile) const {
    return shared + (group * NT + tile) * 2048;
  }
  // Therein four words of a token's quarter: the lanes of a warp that read one quarter meet
  // different banks, and so do those that read four.
  static __device__ __forceinline__ int OfQuarter(int token, int t, int quarter) {
    return quarter * 512 + token * 64 + ((t ^ quarter) << 4);
  }

  // Eight halves: columns 8 (lane % 16) .. of the group.
  __device__ __forceinline__ void WriteChunk(int group, int token, const uint4& v) const {
    const int column = lane % 16, word = lane % 4, t = column / 4;
    if constexpr (kByMma) {
      *reinterpret_cast<uint4*>(TileAt(group, token / 8) + OfQuarter(token % 8, t, word)) = v;
      return;
    }
    uint8_t* const row = shared + (2 * group + word / 2) * (N * 128) + token * 128 + t * 4;
    const int chunk = word % 2 * 4, swizzle = token % 8;
    *reinterpret_cast<uint32_t*>(row + ((chunk ^ swizzle) << 4)) = v.x;
    *reinterpret_cast<uint32_t*>(row + (((chunk + 1) ^ swizzle) << 4)) = v.y;
    *reinterpret_cast<uint32_t*>(row + (((chunk + 2) ^ swizzle) << 4)) = v.z;
    *reinterpret_cast<uint32_t*>(row + (((chunk + 3) ^ swizzle) << 4)) = v.w;
  }

  // v: the first batch, asked for already.
  __device__ __forceinline__ void StageX(uint4 (&v)[kBatch]) const {
    for (int first = warp; first < Items(); first += kBatch * kWarps) {
      if (first != warp) ReadX(first, v);
      WriteX(first, v);
    }
    if constexpr (!kByMma) ptx::FenceAsyncProxy();
  }

  // The four words, of a quarter of a group, of tile `tile`'s token `token` and its lane `t`: low
  // and high words of two steps of 16 columns.
  __device__ __forceinline__ uint4 LoadQuarter(int group, int quarter, int tile, int token,
                                               int t) const {
    if constexpr (kByMma) {
      return *reinterpret_cast<const uint4*>(TileAt(group, tile) + OfQuarter(token, t, quarter));
    }
    const uint8_t* const row =
        shared + (2 * group + quarter / 2) * (N * 128) + tile * 1024 + token * 128 + t * 4;
    const auto at = [&](int i) {
      return *reinterpret_cast<const uint32_t*>(row + ((quarter % 2 * 4 + i ^ token) << 4));
    };
    return make_uint4(at(0), at(1), at(2), at(3));
  }

  __device__ __forceinline__ uint64_t XOperand(int group, int half) const {
    return ptx::WgmmaOperand(ptx::SharedAddress(shared) + (2 * group + half) * (N * 128));
  }

  // By mma: rows 0 and 1 of the weight operand are level 1's half step less its biases (rows g and
  // g + 8), row 2 is ones. A warp takes one group of eight tokens at a time.
  __device__ __forceinline__ void SumX() const {
    const int row = lane / 4;
    uint32_t a[2][4] = {};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      float value = row == 2 ? 1.0f : 0.0f;
      if (row == 0) value = 0.125f - LevelOneBias(pair, 0);
      if (row == 1) value = 0.125f - LevelOneBias(pair, 1);
      const half2 both = __float2half2_rn(value);
      a[pair / 2][pair % 2 * 2] = *reinterpret_cast<const uint32_t*>(&both);
    }
    const int tiles = (num_tokens + 7) / 8;
    for (int item = warp; item < block_groups * NT; item += kWarps) {
      const int g = item / NT, j = item % NT;
      if (j >= tiles) continue;
      float d[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint4 x = LoadQuarter(g, q, j, row, lane % 4);
        if (q == 0) {
          ptx::MmaFromZero(d, a[0], x.x, x.y);
        } else {
          ptx::Mma(d, a[0], x.x, x.y);
        }
        ptx::Mma(d, a[1], x.z, x.w);
      }
      ptx::KeepBefore(d[0], d[1]);  // an mma must not move into the branch of some lanes
      if (row <= 2) {
        const int at = g * N + 8 * j + lane % 4 * 2;
        const float2 unit = LoadUnit(g, j);
        float* const to = reinterpret_cast<float*>(shared + (row < 2 ? plan.bias : plan.sums)) +
                          (row < 2 ? 2 * at + row : at);
        to[0] = d[0] * unit.x;
        to[row < 2 ? 2 : 1] = d[1] * unit.y;
      }
      __syncwarp();
    }
  }

  // Of tokens 2t, 2t + 1 of tile j.
  __device__ __forceinline__ float2 LoadSums(int g, int j) const {
    return *reinterpret_cast<const float2*>(shared + plan.sums +
                                            (g * N + 8 * j + lane % 4 * 2) * 4);
  }
  // {row g, row g + 8} of the first, then of the second.
  __device__ __forceinline__ float4 LoadBias(int g, int j) const {
    return *reinterpret_cast<const float4*>(shared + plan.bias +
                                            (g * N + 8 * j + lane % 4 * 2) * 8);
  }
  __device__ __forceinline__ float2 LoadUnit(int g, int j) const {
    if constexpr (!kBf16) return make_float2(1, 1);
    return *reinterpret_cast<const float2*>(shared + plan.unit +
                                            (g * N + 8 * j + lane % 4 * 2) * 4);
  }

  // What promotion needs of x for one group. Few tokens' are loaded before the products are
  // awaited; many would take too many registers, so they are loaded one by one.
  static constexpr bool kLoadAhead = N <= 16;
  struct OfX {
    float2 sum[kLoadAhead ? NT : 1], unit[kLoadAhead ? NT : 1];
    float4 bias[kLoadAhead ? NT : 1];
  };

  template <bool kBias>
  __device__ __forceinline__ void LoadOfX(int g, int j, int to, OfX& x) const {
    x.sum[to] = LoadSums(g, j);
    x.unit[to] = LoadUnit(g, j);
    if constexpr (kBias) x.bias[to] = LoadBias(g, j);
  }

  template <bool kBias>
  __device__ __forceinline__ void LoadAhead(int g, OfX& x) const {
    if constexpr (kLoadAhead) {
#pragma unroll
      for (int j = 0; j < NT; ++j) LoadOfX<kBias>(g, j, j, x);
    }
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_X_CUH_
