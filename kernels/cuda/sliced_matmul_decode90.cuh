// The decode path's kernel on compute capability 9.0: 1 to about 128 tokens, weights read once per
// 64 of them.
//
// Work. A cluster of blocks takes a run of units of 64 rows; each block has one part of the columns
// or a few, whose x stays in shared memory. A block's warpgroups take units and parts by turns.
// Each warp streams its 16 rows through a ring of its own, unpacks them into fragments and
// multiplies them by N tokens in shared memory: with its warpgroup (wgmma), or, for N <= 16, by
// itself (mma). The parts' sums go straight into the memory of the block that adds them.
//
// Sum of one output: that of sliced_matmul_decode.cuh. A chain of eight wgmma gives the bits of a
// chain of eight mma (sliced-bench and the op tests check it), and N does not matter, so a token's
// bits do not depend on the other tokens.
//
// Order. Before the previous kernel has ended, the block prepares and asks the first slice of its
// first rows into L2: weights do not depend on that kernel. Levels and x come after.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_decode90_plan.cuh"
#include "kernels/cuda/sliced_matmul_decode90_ring.cuh"
#include "kernels/cuda/sliced_matmul_unpack.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_registers.cuh"

namespace mobi::cuda {

// N tokens, W warpgroups; kEach as in Decode90Exchange.
template <int N, int W, bool kBf16, bool kEach>
struct DecodeWarp90 : Decode90Ring<N, W, kBf16, kEach> {
  using Base = Decode90Ring<N, W, kBf16, kEach>;
  using Base::Await;
  using Base::begin;
  using Base::end;
  using Base::Finish;
  using Base::FinishAll;
  using Base::kByMma;
  using Base::kLoadAhead;
  using Base::lane;
  using Base::LevelsOf;
  using Base::NextStretch;
  using Base::NT;
  using Base::num_tokens;
  using Base::own;
  using Base::plan;
  using Base::SegmentOf;
  using Base::shared;
  using Base::StageData;
  using Base::stretch;
  using Base::TileOf;
  using Base::UnitOf;
  using Base::XOperand;
  using typename Base::OfX;

  int x_at[4];  // for mma: this lane's words of each quarter of a group

  __device__ __forceinline__ DecodeWarp90(const SlicedProblem& problem, const Decode90Plan& choices,
                                          uint8_t* memory)
      : Base(problem, choices, memory) {
    // Of no token: the last one's again, which costs shared memory no time.
    const int token = NT == 1 ? min(lane / 4, num_tokens - 1) : lane / 4;
#pragma unroll
    for (int q = 0; q < 4; ++q) x_at[q] = Base::OfQuarter(token, lane % 4, q);
  }

  // ---- Products.

  // At most `pending` halves are still being multiplied. An mma's result is waited for by its use.
  template <int pending>
  static __device__ __forceinline__ void AwaitProducts() {
    if constexpr (!kByMma) ptx::WgmmaWait<pending>();
  }

  // d = the first or second half of a group's columns, added.
  template <int half>
  __device__ __forceinline__ void MultiplyHalf(float (&d)[4 * NT], const uint32_t (&a)[16],
                                               int group) const {
    if constexpr (kByMma) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          auto& of_tile = reinterpret_cast<float(&)[4]>(d[4 * j]);
          const uint4 x =
              *reinterpret_cast<const uint4*>(Base::TileAt(group, j) + x_at[2 * half + i]);
          if (half == 0 && i == 0) {
            ptx::MmaFromZero(of_tile, a, x.x, x.y);
          } else {
            ptx::Mma(of_tile, a + 8 * i, x.x, x.y);
          }
          ptx::Mma(of_tile, a + 8 * i + 4, x.z, x.w);
        }
      }
      return;
    }
    const uint64_t b = XOperand(group, half);
    ptx::WgmmaFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (half == 0 && k == 0) {
        ptx::WgmmaRegistersFromZero<N>(d, a, b);
      } else {
        ptx::WgmmaRegisters<N>(d, a + 4 * k, b + k * ptx::kWgmmaStep);
      }
    }
    ptx::WgmmaCommit();
  }

  // y += range * (d + bias) + offset * sum for one output; the one order of all variants. At levels
  // 2..4 pair.y has CodeOffset folded in, and there is no bias.
  template <bool kBias>
  static __device__ __forceinline__ float Promote(float y, float d, float bias, float unit,
                                                  float sum, float2 pair) {
    if constexpr (kBf16) d *= unit;
    if constexpr (kBias) d += bias;
    return fmaf(pair.x, d, fmaf(pair.y, sum, y));
  }

  // {range, offset} of row lane / 4 + 8 h, the i-th group or level of a stage.
  __device__ __forceinline__ half2 LoadPair(const uint8_t* from, int i, int h) const {
    return *reinterpret_cast<const half2*>(from + kWarpStageScales + i * kTileScaleBytes +
                                           (lane / 4 + 8 * h) * kPairBytes);
  }

  // y += the group's products, of the tokens that `own_levels` says read this level (null: all).
  // x has been loaded ahead.
  template <int level>
  __device__ __forceinline__ void PromoteAll(int g, const float (&d)[4 * NT],
                                             const half2 (&pairs)[2], const uint8_t* own_levels,
                                             OfX& x, float (&y)[NT][4]) const {
    constexpr bool kBias = level == 1;
    float2 pair[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      pair[h] = __half22float2(pairs[h]);
      if constexpr (level > 1) pair[h].y = fmaf(pair[h].x, CodeOffset(level), pair[h].y);
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const int at = kLoadAhead ? j : 0;
      if constexpr (!kLoadAhead) this->template LoadOfX<kBias>(g, j, 0, x);
      const float2 sum = x.sum[at], unit = x.unit[at];
      float4 bias = make_float4(0, 0, 0, 0);
      if constexpr (kBias) bias = x.bias[at];
      const float to[4] = {Promote<kBias>(y[j][0], d[4 * j], bias.x, unit.x, sum.x, pair[0]),
                           Promote<kBias>(y[j][1], d[4 * j + 1], bias.z, unit.y, sum.y, pair[0]),
                           Promote<kBias>(y[j][2], d[4 * j + 2], bias.y, unit.x, sum.x, pair[1]),
                           Promote<kBias>(y[j][3], d[4 * j + 3], bias.w, unit.y, sum.y, pair[1])};
      bool own[2] = {true, true};
      if (own_levels != nullptr) {
        const uchar2 two = *reinterpret_cast<const uchar2*>(own_levels + 8 * j + lane % 4 * 2);
        own[0] = two.x == level;
        own[1] = two.y == level;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) y[j][e] = own[e % 2] ? to[e] : y[j][e];
    }
  }

  // A group in registers.
  template <int level>
  struct Words {
    uint4 slices[level];
    half2 pairs[2];
  };

  // The i-th group of a stage.
  template <int level>
  __device__ __forceinline__ void Take(const uint8_t* from, int i, Words<level>& words) const {
#pragma unroll
    for (int s = 0; s < level; ++s) {
      words.slices[s] = *reinterpret_cast<const uint4*>(
          from + (s * GroupsPerStage(level) + i) * kTileBytes + lane * 16);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) words.pairs[h] = LoadPair(from, i, h);
  }

  // The fragments of words 2 half and 2 half + 1.
  template <int level, int half>
  static __device__ __forceinline__ void UnpackHalf(const uint4 (&words)[level],
                                                    uint32_t (&a)[16]) {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      uint32_t slices[level];
#pragma unroll
      for (int s = 0; s < level; ++s) slices[s] = (&words[s].x)[2 * half + w];
      Unpack<level>(slices, a + 8 * w);
    }
  }

  // A stretch. The first has been started.
  template <int level>
  __device__ __forceinline__ void Run() {
    if (kByMma && stretch.begin > 0) this->template Start<level>();
    if constexpr (level == kMixed) {
      RunMixed();
    } else if constexpr (kByMma) {
      RunByMma<level>();
    } else {
      RunByWgmma<level>();
    }
  }

  // What costs is instructions: a stage's groups are unrolled, so that addresses are constants.
  template <int level>
  __device__ __forceinline__ void RunByMma() {
    constexpr int kGroups = GroupsPerStage(level);
    float y[NT][4] = {};
    for (int round = stretch.begin; round < stretch.end; ++round) {
      for (int first_of_stage = begin; first_of_stage < end; first_of_stage += kGroups) {
        const int count = min(kGroups, end - first_of_stage);
        Await();
        const uint8_t* const from = StageData();
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          if (i >= count) break;
          const int g = first_of_stage + i;
          Words<level> words;
          Take<level>(from, i, words);
          OfX x;
          this->template LoadAhead<level == 1>(g, x);
          float d[4 * NT];
          uint32_t a[16], b[16];
          UnpackHalf<level, 0>(words.slices, a);
          MultiplyHalf<0>(d, a, g);
          UnpackHalf<level, 1>(words.slices, b);
          MultiplyHalf<1>(d, b, g);
          PromoteAll<level>(g, d, words.pairs, nullptr, x, y);
        }
        this->template Release<level>();
      }
      Finish(round, y);
    }
  }

  // A group's second half is unpacked while the first is multiplied, and the next group's first
  // half while the second is.
  template <int level>
  __device__ __forceinline__ void RunByWgmma() {
    constexpr int kGroups = GroupsPerStage(level);
    float y[NT][4] = {}, d[4 * NT];
    half2 pairs[2];  // of the group that is being multiplied
    for (int round = stretch.begin; round < stretch.end; ++round) {
      int i = 0;  // of the stage
      const uint8_t* from = nullptr;
      int before = end - 1;
      for (int g = begin; g < end; ++g) {
        if (i == 0) {
          Await();
          from = StageData();
        }
        Words<level> words;
        Take<level>(from, i, words);
        uint32_t a[16], b[16];
        AwaitProducts<1>();  // the first half before this one has read its fragments
        UnpackHalf<level, 0>(words.slices, a);
        OfX x;
        this->template LoadAhead<level == 1>(before, x);
        AwaitProducts<0>();
        const bool later = round > stretch.begin;
        if (g > begin || later) PromoteAll<level>(before, d, pairs, nullptr, x, y);
        if (g == begin && later) Finish(round - 1, y);
        MultiplyHalf<0>(d, a, g);
        UnpackHalf<level, 1>(words.slices, b);
        MultiplyHalf<1>(d, b, g);
        pairs[0] = words.pairs[0], pairs[1] = words.pairs[1];
        before = g;
        if (++i == kGroups || g + 1 == end) {
          this->template Release<level>();
          i = 0;
        }
      }
    }
    AwaitProducts<0>();
    OfX x;
    this->template LoadAhead<level == 1>(end - 1, x);
    PromoteAll<level>(end - 1, d, pairs, nullptr, x, y);
    Finish(stretch.end - 1, y);
  }

  // A level of its own for every token: the codes of each level that occurs in the unit are
  // multiplied by all tokens, and each token takes what is of its level.
  __device__ __forceinline__ void RunMixed() {
    float y[NT][4] = {};
    for (int round = stretch.begin; round < stretch.end; ++round) {
      const int unit = UnitOf(round);
      uint32_t occur = 0;
#pragma unroll
      for (int i = 0; i < kUnitTiles; ++i) occur |= LevelsOf(TileOf(unit, i));
      const uint8_t* const own_levels = shared + plan.levels + SegmentOf(TileOf(unit, own)) * N;
      for (int g = begin; g < end; ++g) {
        Await();
        const uint8_t* const from = StageData();
        if (occur & 1) MultiplyLevel<1>(from, g, own_levels, y);
        if (occur & 2) MultiplyLevel<2>(from, g, own_levels, y);
        if (occur & 4) MultiplyLevel<3>(from, g, own_levels, y);
        if (occur & 8) MultiplyLevel<4>(from, g, own_levels, y);
        this->template Release<kMixed>();
      }
      Finish(round, y);
    }
  }

  template <int level>
  __device__ __forceinline__ void MultiplyLevel(const uint8_t* from, int g,
                                                const uint8_t* own_levels,
                                                float (&y)[NT][4]) const {
    uint4 words[level];
#pragma unroll
    for (int s = 0; s < level; ++s) {
      words[s] = *reinterpret_cast<const uint4*>(from + s * kTileBytes + lane * 16);
    }
    uint32_t a[16], b[16];
    float d[4 * NT];
    UnpackHalf<level, 0>(words, a);
    MultiplyHalf<0>(d, a, g);
    UnpackHalf<level, 1>(words, b);
    MultiplyHalf<1>(d, b, g);
    const half2 pairs[2] = {LoadPair(from, level - 1, 0), LoadPair(from, level - 1, 1)};
    OfX x;
    this->template LoadAhead<level == 1>(g, x);
    AwaitProducts<0>();
    PromoteAll<level>(g, d, pairs, own_levels, x, y);
  }

  // ---- All units.

  // Calls with the stretch's level as a template argument.
  template <typename Call>
  __device__ __forceinline__ void AtLevel(const Call& call) {
    switch (stretch.level) {
      case 1:
        return call.template operator()<1>();
      case 2:
        return call.template operator()<2>();
      case 3:
        return call.template operator()<3>();
      case 4:
        return call.template operator()<4>();
      default:
        return call.template operator()<kMixed>();
    }
  }

  // Asks for the first weights: levels are known, x need not be.
  __device__ __forceinline__ void Begin() {
    NextStretch(0);
    AtLevel([&]<int level>() { this->template Start<level>(); });
  }

  __device__ __forceinline__ void RunAll() {
    while (stretch.begin < stretch.end) {
      AtLevel([&]<int level>() { Run<level>(); });
      if (!kByMma) break;
      NextStretch(stretch.end);
    }
    FinishAll();
  }
};

// Grid: the blocks of the clusters; y blocks of N tokens.
template <int N, int W, bool kBf16>
__global__ void __launch_bounds__(128 * W, 1)
    SlicedDecode90Kernel(const __grid_constant__ SlicedProblem p,
                         const __grid_constant__ Decode90Plan plan) {
#if MOBI_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  ptx::LaunchDependents();
  DecodeWarp90<N, W, kBf16, false> self(p, plan, shared);
  self.InitBarriers();
  self.Prefetch();
  __syncthreads();
  self.ExpectFirst();
  ptx::ClusterArriveRelaxed();  // this block's barriers are ready: Finish waits for all
  ptx::WaitForPrevious();
  uint4 v[self.kBatch];
  self.ReadX(self.warp, v);
  self.ReadLevels();
  self.Begin();
  self.StageX(v);
  __syncthreads();
  self.SumX();
  __syncthreads();
  self.RunAll();
#endif
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_CUH_
