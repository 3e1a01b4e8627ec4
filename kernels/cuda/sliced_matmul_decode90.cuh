// The decode path's kernel on compute capability 9.0 for up to 16 tokens.
//
// Work. A cluster of blocks takes a run of units of 64 rows; each block has one part of the columns
// or a few, whose x stays in shared memory. A block's warpgroups take units and parts by turns.
// Each warp streams its 16 rows through a ring of its own, unpacks them into bytes and multiplies
// them by N tokens in shared memory, by itself (mma) or with its warpgroup (wgmma). The parts' sums
// go straight into the memory of the block that adds them.
//
// Sum of one output: products of bytes over a group are whole numbers and exact; the groups of a
// part in order in fp32, each with its range and offset; the parts by SumOfParts. N does not
// matter, so a token's bits do not depend on the other tokens.
//
// Order. Before the previous kernel has ended, the block prepares. Weights do not depend on that
// kernel, but asked for then they are in the way of levels and x, which all wait for.
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

// N tokens, W warpgroups; kAhead as in Decode90Exchange.
template <int N, int W, bool kBf16, bool kAhead>
struct DecodeWarp90 : Decode90Ring<N, W, kBf16, kAhead> {
  using Base = Decode90Ring<N, W, kBf16, kAhead>;
  using Base::Await;
  using Base::begin;
  using Base::end;
  using Base::Finish;
  using Base::FinishAll;
  using Base::kByMma;
  using Base::lane;
  using Base::LevelsOf;
  using Base::NT;
  using Base::num_tokens;
  using Base::own;
  using Base::plan;
  using Base::present;
  using Base::SegmentOf;
  using Base::shared;
  using Base::StageData;
  using Base::stretch;
  using Base::StretchFrom;
  using Base::TileOf;
  using Base::UnitOf;
  using typename Base::Terms;

  int x_at;                // this lane's 16 bytes of a tile of x
  bool asked_for = false;  // the first weights of `stretch` are

  __device__ __forceinline__ DecodeWarp90(const SlicedProblem& problem, const Decode90Plan& choices,
                                          uint8_t* memory)
      : Base(problem, choices, memory) {
    // Of no token: the last one's again, which costs shared memory no time.
    const int token = NT == 1 ? min(lane / 8, num_tokens - 1) : lane / 8;
    x_at = (token * 8 + lane % 8) * 16;
  }

  // ---- Products.

  // Sums of a group's codes times all tokens, four for each tile. Elements: this lane's token,
  // lane % 4 of the tile: {high, low} of row lane / 4, then of row lane / 4 + 8. By mma from
  // kWholeBits on.
  using Sums = uint32_t[4 * NT];
  using Codes = uint32_t[16];  // four fragments

  // They are there after AwaitProducts.
  __device__ __forceinline__ void Multiply(int group, Codes& a, Sums& d) const {
    if constexpr (kByMma) {
      MultiplyByMma(group, a, d);
    } else {
      MultiplyByWgmma(group, a, d);
    }
  }

  // Tiles side by side: a chain of mma waits for itself.
  __device__ __forceinline__ void MultiplyByMma(int group, const Codes& a, Sums& d) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint4 x[NT];
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        x[j] = *reinterpret_cast<const uint4*>(Base::TileAt(group, j) + x_at +
                                               pair * Base::kPieceStride);
      }
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        auto& of_tile = reinterpret_cast<uint32_t(&)[4]>(d[4 * j]);
        if (pair == 0) {
          ptx::MmaBytesFrom(kWholeBits, of_tile, a, x[j].x, x[j].y);
        } else {
          ptx::MmaBytes(of_tile, a + 8, x[j].x, x[j].y);
        }
      }
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        ptx::MmaBytes(reinterpret_cast<uint32_t(&)[4]>(d[4 * j]), a + 8 * pair + 4, x[j].z, x[j].w);
      }
    }
  }

  __device__ __forceinline__ void MultiplyByWgmma(int group, Codes& a, Sums& d) const {
#pragma unroll
    for (uint32_t& fragment : a) ptx::KeepBefore(fragment);
    ptx::WgmmaFence();
    const uint64_t b = Base::XOperand(group);
    ptx::WgmmaBytesFromZero<2 * N>(d, a, b);
#pragma unroll
    for (int w = 1; w < 4; ++w) ptx::WgmmaBytes<2 * N>(d, a + 4 * w, b + w * ptx::kWgmmaStep);
    ptx::WgmmaCommit();
  }

  static __device__ __forceinline__ void AwaitProducts() {
    if constexpr (!kByMma) ptx::WgmmaWait<0>();
  }

  // A row's range and offset as they meet the products and the sum of x.
  static __device__ __forceinline__ float2 Widen(half2 pair, float half_step) {
    float2 wide = __half22float2(pair);
    wide.y = fmaf(wide.x, half_step, wide.y);
    return wide;
  }

  // 256 high + low, in steps: a whole number that is rounded once, either way.
  static __device__ __forceinline__ float Product(uint32_t high, uint32_t low, float step) {
    if constexpr (!kByMma) return WholeProduct(high, low, step);
    const float of_high = fmaf(__uint_as_float(high), 256 * step, -257 * kWhole * step);
    return fmaf(__uint_as_float(low), step, of_high);
  }

  // y += a group's products with a tile; the one order of all variants.
  __device__ __forceinline__ void Promote(const uint32_t* d, const Terms& x,
                                          const float2 (&pairs)[2], float (&y)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float product = Product(d[2 * h], d[2 * h + 1], x.step);
      y[h] = fmaf(pairs[h].x, product, fmaf(pairs[h].y, x.sum, y[h]));
    }
  }

  // {range, offset} of row lane / 4 + 8 h, the i-th group or level of a stage.
  __device__ __forceinline__ half2 LoadPair(const uint8_t* from, int i, int h) const {
    return *reinterpret_cast<const half2*>(from + kWarpStageScales + i * kTileScaleBytes +
                                           (lane / 4 + 8 * h) * kPairBytes);
  }

  __device__ __forceinline__ Terms LoadTerms(int group, int tile) const {
    const float2 v = *reinterpret_cast<const float2*>(
        Base::TermsAt(group, tile * kTileTokens + lane % kTileTokens));
    return {v.x, v.y};
  }

  // The codes of the i-th group of a stage whose slices have `stride` groups each.
  template <int level>
  __device__ __forceinline__ void Unpack(const uint8_t* from, int i, int stride, Codes& a) const {
    uint4 slices[level];
#pragma unroll
    for (int s = 0; s < level; ++s) {
      slices[s] = *reinterpret_cast<const uint4*>(from + (s * stride + i) * kTileBytes + lane * 16);
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t words[level];
#pragma unroll
      for (int s = 0; s < level; ++s) words[s] = (&slices[s].x)[w];
      UnpackBytes<level>(words, reinterpret_cast<uint32_t(&)[4]>(a[4 * w]));
    }
  }

  template <int level>
  __device__ __forceinline__ void Run() {
    if (kByMma && !asked_for) this->template Start<level>();
    asked_for = false;
    if constexpr (level == kMixed) {
      RunMixed();
    } else {
      RunAtLevel<level>();
    }
  }

  // What costs is instructions: a stage's groups are unrolled, so that addresses are constants. Not
  // of two tiles of tokens, whose operands by mma leave no registers for it: that was slower.
  template <int level>
  __device__ __forceinline__ void RunAtLevel() {
    constexpr int kGroups = GroupsPerStage(level);
    float y[NT][2] = {};
    for (int round = stretch.begin; round < stretch.end; ++round) {
      for (int first_of_stage = begin; first_of_stage < end; first_of_stage += kGroups) {
        const int count = min(kGroups, end - first_of_stage);
        Await();
        const uint8_t* const from = StageData();
#pragma unroll(NT == 2 ? 1 : kGroups)
        for (int i = 0; i < kGroups; ++i) {
          if (i >= count) break;
          const int g = first_of_stage + i;
          Codes a;
          Sums d;
          Unpack<level>(from, i, kGroups, a);
          Multiply(g, a, d);
          const float2 pairs[2] = {Widen(LoadPair(from, i, 0), HalfStep(level)),
                                   Widen(LoadPair(from, i, 1), HalfStep(level))};
          AwaitProducts();
#pragma unroll
          for (int j = 0; j < NT; ++j) Promote(d + 4 * j, LoadTerms(g, j), pairs, y[j]);
        }
        this->template Release<level>();
      }
      if (kAhead && round == 0 && !Confirm()) return;
      Finish(round, y);
    }
  }

  // ---- Ahead of a router (kAhead): the levels of the first rounds are a guess.

  bool sure = !kAhead;     // the levels are known
  uint32_t chosen;         // the barrier that waits for them
  const uint32_t* choice;  // `present`, then

  __device__ __forceinline__ void Learn() {
    ptx::BarrierWait(chosen, 0);
    present = *choice;
    sure = true;
  }

  // False: the first stretch is another than was guessed, and nothing of it counts.
  __device__ __forceinline__ bool Confirm() {
    if (sure) return true;
    Learn();
    const auto is = StretchFrom(0);
    if (is.level == stretch.level && is.end == stretch.end) return true;
    stretch.end = 0;
    ptx::WaitCopies<0>();
    __syncwarp();
    return false;
  }

  // ---- A level of its own for every token.

  // Two bits for each tile: the level, less one, of this lane's token.
  __device__ __forceinline__ uint32_t OwnLevels(const uint8_t* levels) const {
    uint32_t own_levels = 0;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const int level = max(int{levels[j * kTileTokens + lane % kTileTokens]}, 1);
      own_levels |= (level - 1) << (2 * j);
    }
    return own_levels;
  }

  // Slices are merged once: a lower level's codes are a higher one's, cut off. All tokens meet the
  // levels that occur in the unit, and each takes what is of its own.
  __device__ __forceinline__ void RunMixed() {
    float y[NT][2] = {};
    for (int round = stretch.begin; round < stretch.end; ++round) {
      const int unit = UnitOf(round);
      uint32_t occur = 0;
#pragma unroll
      for (int i = 0; i < kUnitTiles; ++i) occur |= LevelsOf(TileOf(unit, i));
      // So that the compiler sees no divergence, in which wgmma would wait for itself.
      if (!kByMma) occur = __shfl_sync(~0u, occur, 0);
      const uint32_t own_levels =
          OwnLevels(shared + plan.levels + SegmentOf(TileOf(unit, own)) * N);
      for (int g = begin; g < end; ++g) {
        Await();
        MultiplyMixed(StageData(), g, occur, own_levels, y);
        this->template Release<kMixed>();
      }
      Finish(round, y);
    }
  }

  __device__ __forceinline__ void MultiplyMixed(const uint8_t* from, int g, uint32_t occur,
                                                uint32_t own_levels, float (&y)[NT][2]) const {
    Codes a;
    Sums of_own;
    Unpack<kNumLevels>(from, 0, 1, a);
    if (occur & 8) MultiplyLevel<4>(g, a, own_levels, of_own);
    if (occur & 4) MultiplyLevel<3>(g, a, own_levels, of_own);
    if (occur & 2) MultiplyLevel<2>(g, a, own_levels, of_own);
    if (occur & 1) MultiplyLevel<1>(g, a, own_levels, of_own);
    PromoteOwn(from, g, own_levels, of_own, y);
  }

  __device__ __forceinline__ void PromoteOwn(const uint8_t* from, int g, uint32_t own_levels,
                                             const Sums& of_own, float (&y)[NT][2]) const {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const int level = own_levels >> (2 * j) & 3;  // less one
      const float half_step = __uint_as_float((124u - 2 * level) << 23);
      const float2 pairs[2] = {Widen(LoadPair(from, level, 0), half_step),
                               Widen(LoadPair(from, level, 1), half_step)};
      Promote(of_own + 4 * j, LoadTerms(g, j), pairs, y[j]);
    }
  }

  template <int level>
  __device__ __forceinline__ void MultiplyLevel(int g, Codes& a, uint32_t own_levels,
                                                Sums& of_own) const {
    Sums d;
#pragma unroll
    for (uint32_t& fragment : a) fragment &= BytesOfLevel(level);
    Multiply(g, a, d);
    AwaitProducts();
    const uint32_t differ = own_levels ^ (level - 1) * 0x55;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const bool take = (differ & 3u << (2 * j)) == 0;
#pragma unroll
      for (int e = 4 * j; e < 4 * j + 4; ++e) of_own[e] = take ? d[e] : of_own[e];
    }
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

  // Asks for the first weights: x need not be known, nor levels for certain.
  __device__ __forceinline__ void Begin() {
    stretch = StretchFrom(0);
    if (kAhead && stretch.level == kMixed) return;
    AtLevel([&]<int level>() { this->template Start<level>(); });
    asked_for = true;
  }

  __device__ __forceinline__ void RunAll() {
    if (!sure && stretch.level == kMixed) {  // which needs each token's level
      Learn();
      stretch = StretchFrom(0);
    }
    while (stretch.begin < stretch.end) {
      AtLevel([&]<int level>() { Run<level>(); });
      if (!kByMma) break;
      stretch = StretchFrom(stretch.end);
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
  self.MakeBarriers();
  ptx::ClusterArriveRelaxed();  // this block's barriers are ready: Finish waits for all
  ptx::WaitForPrevious();
  uint4 v[self.kBatch];
  self.ReadX(self.warp, v);
  self.ReadLevels();
  self.Begin();
  self.StageX(v);
  __syncthreads();
  self.RunAll();
#endif
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_CUH_
