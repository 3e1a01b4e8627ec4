// The decode path's kernel on compute capability 9.0 for more tokens than a block's registers and
// shared memory hold at once (17 to about 128): weights read once per 64 tokens.
//
// Work. A block has a tile of a segment, up to four units of 64 rows, and all parts of the columns
// or a run of them. Each of its warpgroups has a unit: a warp streams its 16 rows through a ring of
// its own and unpacks them into bytes, the warpgroup multiplies them (wgmma) by 32 tokens at a
// time. x comes from images made before (sliced_matmul_batch90_image.cuh), a group at a time for
// all warpgroups. Tokens are ordered by level, so that a unit's lower levels, which are its bytes
// cut off, meet those of 32 tokens that read them.
//
// Sum of one output: as in sliced_matmul_decode90.cuh, so a token has the same bits here and there.
// Parts of one block are added in shared memory; those of several meet in the workspace, and each
// block adds some of the outputs when all blocks' are there. Then all blocks are resident at once.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_CUH_

#include <cstdint>
#include <cuda/atomic>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_batch90_block.cuh"
#include "kernels/cuda/sliced_matmul_exchange.cuh"
#include "kernels/cuda/sliced_matmul_unpack.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_registers.cuh"

namespace mobi::cuda {

template <int N>
struct BatchWarp90 : BatchBlock90<N> {
  using Base = BatchBlock90<N>;
  using Shared = Batch90Shared<N>;
  using Base::first_token;
  using Base::FirstGroup;
  using Base::FirstPart;
  using Base::Full;
  using Base::group;
  using Base::kHalves;
  using Base::lane;
  using Base::last_tile;
  using Base::num_tokens;
  using Base::order;
  using Base::own;
  using Base::p;
  using Base::Parts;
  using Base::plan;
  using Base::row_tile;
  using Base::segment;
  using Base::shared;
  using Base::split;
  using Base::Thread;
  using Base::TokensAt;
  using Base::unit;
  using Base::units;
  using Base::warp;
  using Base::warpgroup;
  using Base::x_parity;
  using Base::x_stage;
  static constexpr int kVectors = N / 8;  // of four of a lane's sums

  uint32_t ring;  // this lane's 16 bytes of its warp's, a shared address

  __device__ __forceinline__ BatchWarp90(const SlicedProblem& p, const Batch90Plan& plan,
                                         uint8_t* shared)
      : Base(p, plan, shared) {
    ring =
        ptx::SharedAddress(shared) + this->RingAt() + warp * kStages * kWarpStageBytes + lane * 16;
  }

  // ---- Weights, through the warp's ring. A lane reads what it has copied itself, but for ranges.
  // No stage goes beyond a part.

  int stage = 0;      // an offset in the warp's ring
  uint32_t next_at;   // the group of a tile that is asked for next
  int next_part = 0;  // and its part
  int next_left = 0;  // groups of that part, from there on

  // level 0: mixed, a group at a time up to the highest.
  template <int level>
  static constexpr int kStageGroups = level == 0 ? 1 : GroupsPerStage(level);

  template <int level>
  __device__ __forceinline__ void Fill() {
    constexpr int kGroups = kStageGroups<level>;
    if (next_left > 0) {
      const int count = min(kGroups, next_left);
      ptx::KeepBefore(next_at);  // so that no address of each slice stays in registers
      Ask<level>(count);
      next_at += count;
      next_left -= count;
      if (next_left == 0 && ++next_part < FirstPart() + Parts()) {
        next_left = FirstGroup(next_part + 1) - FirstGroup(next_part);
      }
    }
    ptx::CommitCopies();
  }

  template <int level>
  __device__ __forceinline__ void Ask(int count) const {
    constexpr int kGroups = kStageGroups<level>;
    const uint32_t to = ring + stage;
    if constexpr (level > 0) {
#pragma unroll
      for (int s = 0; s < level; ++s) {
        const uint4* const from = p.slices[s] + size_t{next_at} * 32 + lane;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          if (i < count) {
            ptx::CopyAsync16(to + (s * kGroups + i) * kTileBytes, from + i * 32);
          }
        }
      }
      AskRanges(level, to + kWarpStageScales, count);
      return;
    }
    const int highest = order.HighestLevel();
#pragma unroll
    for (int s = 0; s < kNumSlices; ++s) {
      if (s >= highest) break;
      ptx::CopyAsync16(to + s * kTileBytes, p.slices[s] + size_t{next_at} * 32 + lane);
      AskRanges(s + 1, to + kWarpStageScales + s * kTileScaleBytes, 1);
    }
  }

  // A lane has four of a group's 16 rows.
  __device__ __forceinline__ void AskRanges(int level, uint32_t to, int count) const {
    if (lane >= 4 * count) return;
    ptx::CopyAsync16(to, p.scales[level - 1] + size_t{next_at} * 4 + lane);
  }

  template <int level>
  __device__ __forceinline__ void Start() {
    next_part = FirstPart();
    next_left = FirstGroup(next_part + 1) - FirstGroup(next_part);
    next_at = static_cast<uint32_t>(min(row_tile, last_tile) * p.groups + group);
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) {
      Fill<level>();
      stage ^= kWarpStageBytes;
    }
  }

  __device__ __forceinline__ const uint8_t* StageData() const {
    return shared + this->RingAt() + warp * kStages * kWarpStageBytes + stage;
  }

  __device__ __forceinline__ void AwaitStage() const {
    ptx::WaitCopies<1>();
    __syncwarp();
  }

  template <int level>
  __device__ __forceinline__ void ReleaseStage() {
    __syncwarp();
    Fill<level>();
    stage ^= kWarpStageBytes;
  }

  // ---- Products.

  using Codes = uint32_t[16];             // four fragments
  using Sums = uint32_t[4 * kHalfTiles];  // {high, low} of row lane / 4, then of lane / 4 + 8
  using Outputs = float[kHalves * kHalfTiles][2];

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

  __device__ __forceinline__ void Multiply(int half, Codes& a, Sums& d) const {
#pragma unroll
    for (uint32_t& fragment : a) ptx::KeepBefore(fragment);
    ptx::WgmmaFence();
    const uint64_t b = ptx::WgmmaOperand(ptx::SharedAddress(shared) + x_stage * kGroupBytes<N> +
                                         half * kHalfTokens * 2 * kGroupSize);
    ptx::WgmmaBytesFromZero<2 * kHalfTokens>(d, a, b);
#pragma unroll
    for (int w = 1; w < 4; ++w) {
      ptx::WgmmaBytes<2 * kHalfTokens>(d, a + 4 * w, b + w * ptx::kWgmmaStep);
    }
    ptx::WgmmaCommit();
    ptx::WgmmaWait<0>();
  }

  // Ranges and offsets of rows lane / 4 and lane / 4 + 8 as they meet products and sums of x; the
  // i-th of a stage.
  struct Pairs {
    float range[2], offset[2];
  };
  __device__ __forceinline__ Pairs LoadPairs(const uint8_t* from, int i, float half_step) const {
    Pairs pairs;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const half2 pair = *reinterpret_cast<const half2*>(
          from + kWarpStageScales + i * kTileScaleBytes + (lane / 4 + 8 * h) * kPairBytes);
      const float2 wide = __half22float2(pair);
      pairs.range[h] = wide.x;
      pairs.offset[h] = fmaf(wide.x, half_step, wide.y);
    }
    return pairs;
  }

  // Of tiles 2 i and 2 i + 1 of a half: {step, sum} of each.
  __device__ __forceinline__ float4 LoadTerms(int half, int i) const {
    return *reinterpret_cast<const float4*>(
        shared + this->TermsAt() + x_stage * Shared::kTermBytes +
        (half * kHalfTokens + i * 8 + lane % 4 * 2) * sizeof(WholeTerms));
  }

  static __device__ __forceinline__ void Promote(const uint32_t* d, float step, float sum,
                                                 const Pairs& pairs, float (&y)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float product = WholeProduct(d[2 * h], d[2 * h + 1], step);
      y[h] = fmaf(pairs.range[h], product, fmaf(pairs.offset[h], sum, y[h]));
    }
  }

  template <int level>
  __device__ __forceinline__ void MultiplyGroup(const uint8_t* from, int i, Outputs& y) const {
    Codes a;
    Unpack<level>(from, i, kStageGroups<level>, a);
    const Pairs pairs = LoadPairs(from, i, HalfStep(level));
    ptx::BarrierWait(Full(x_stage), x_parity);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      Sums d;
      Multiply(half, a, d);
#pragma unroll
      for (int t = 0; t < kHalfTiles / 2; ++t) {
        const float4 terms = LoadTerms(half, t);
        const int tile = half * kHalfTiles + 2 * t;
        Promote(d + 8 * t, terms.x, terms.y, pairs, y[tile]);
        Promote(d + 8 * t + 4, terms.z, terms.w, pairs, y[tile + 1]);
      }
    }
  }

  // ---- Mixed levels: columns are ordered by them, the highest first.

  // The level of a column that is there.
  __device__ __forceinline__ int LevelAt(int column) const {
    return 1 + (column < order.End(2)) + (column < order.End(3)) + (column < order.End(4));
  }

  __device__ __forceinline__ void MultiplyMixed(const uint8_t* from, Outputs& y) const {
    Codes a;
    Unpack<kNumLevels>(from, 0, 1, a);
    ptx::BarrierWait(Full(x_stage), x_parity);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int begin = half * kHalfTokens, stop = min(begin + kHalfTokens, num_tokens);
#pragma unroll 1
      for (int column = begin; column < stop;) {
        const int level = LevelAt(column);
        MultiplyLevel(half, level, from, a,
                      reinterpret_cast<float(&)[kHalfTiles][2]>(y[half * kHalfTiles]));
        column = order.End(level);
      }
    }
  }

  // A lower level's bytes are a higher one's, cut off.
  __device__ __forceinline__ void MultiplyLevel(int half, int level, const uint8_t* from, Codes& a,
                                                float (&y)[kHalfTiles][2]) const {
    Sums d;
#pragma unroll
    for (uint32_t& fragment : a) fragment &= BytesOfLevel(level);
    Multiply(half, a, d);
    const float half_step = __uint_as_float((126u - 2 * level) << 23);  // HalfStep(level)
    const Pairs pairs = LoadPairs(from, level - 1, half_step);
    const int begin = order.Begin(level) - half * kHalfTokens;
    const int stop = order.End(level) - half * kHalfTokens;
#pragma unroll
    for (int i = 0; i < kHalfTiles / 2; ++i) {
      if (8 * i >= stop || 8 * i + 8 <= begin) continue;
      const float4 terms = LoadTerms(half, i);
      float to[2][2] = {{y[2 * i][0], y[2 * i][1]}, {y[2 * i + 1][0], y[2 * i + 1][1]}};
      Promote(d + 8 * i, terms.x, terms.y, pairs, to[0]);
      Promote(d + 8 * i + 4, terms.z, terms.w, pairs, to[1]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 8 * i + 4 * j + lane % 4;
        const bool take = column >= begin && column < stop;
        for (int h = 0; h < 2; ++h) y[2 * i + j][h] = take ? to[j][h] : y[2 * i + j][h];
      }
    }
  }

  // ---- Parts.

  // A unit's sums: [vector][thread] of the two rows of two tiles of columns.
  static __device__ __forceinline__ float4 VectorOf(const Outputs& y, int v) {
    return make_float4(y[2 * v][0], y[2 * v][1], y[2 * v + 1][0], y[2 * v + 1][1]);
  }
  static __device__ __forceinline__ void Add(const float4& more, float4& to) {
    to = make_float4(to.x + more.x, to.y + more.y, to.z + more.z, to.w + more.w);
  }
  __device__ __forceinline__ float4* SumsOf(int part) const {
    return plan.sums + (unit * kParts + part) * kVectors * 128;
  }

  // Four outputs, as a thread of a warpgroup has them.
  template <typename T>
  __device__ __forceinline__ void Store(const float4& sums, int vector, int thread) const {
    const int row = (row_tile - own + thread / 32) * kTileRows + thread % 32 / 4;
    if (row >= (last_tile + 1) * kTileRows) return;
    T* const out = static_cast<T*>(p.out) + first_token * p.out_stride + row;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = vector * 8 + j * 4 + thread % 4;
      if (column >= num_tokens) return;
      T* const to = out + static_cast<int64_t>(TokensAt()[column]) * p.out_stride;
      to[0] = Rounded<T>(j == 0 ? sums.x : sums.z);
      to[8] = Rounded<T>(j == 0 ? sums.y : sums.w);
    }
  }

  // Calls with out's type as a template argument.
  template <typename Call>
  __device__ __forceinline__ void WithOutType(const Call& call) const {
    if (p.out_type == DType::kF16) return call.template operator()<half>();
    if (p.out_type == DType::kBF16) return call.template operator()<__nv_bfloat16>();
    call.template operator()<float>();
  }

  // Leaves a part's sums where they meet the others; after the last of all parts y has their sum.
  __device__ __forceinline__ void FinishPart(int part, Outputs& y) const {
    const bool splits = plan.splits_log > 0;
    float4* const sums =
        splits
            ? SumsOf(part) + Thread()
            : reinterpret_cast<float4*>(shared + this->SumsAt() + warpgroup * Shared::kSumBytes) +
                  Thread();
    if (splits) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) __stcg(sums + v * 128, VectorOf(y, v));
      return;
    }
    if (part > 0) {
      float4 before[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) before[v] = sums[v * 128];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        y[2 * v][0] += before[v].x, y[2 * v][1] += before[v].y;
        y[2 * v + 1][0] += before[v].z, y[2 * v + 1][1] += before[v].w;
      }
    }
    if (part + 1 == kParts) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) sums[v * 128] = VectorOf(y, v);
  }

  // Of several blocks: waits for all parts of the unit, and adds this block's share of the outputs.
  __device__ __forceinline__ void AddParts() const {
    const int barrier = 1 + warpgroup;
    ptx::NamedBarrier(barrier, 128);
    if (Thread() == 0) {  // whose fence covers what the others have stored before the barrier
      __threadfence();
      ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device> arrived(plan.x.arrivals[unit]);
      arrived.fetch_add(1, ::cuda::memory_order_relaxed);
      while (arrived.load(::cuda::memory_order_relaxed) < 1u << plan.splits_log) {
      }
      __threadfence();
    }
    ptx::NamedBarrier(barrier, 128);
    const int count = kVectors * 128 >> plan.splits_log;
#pragma unroll 1
    for (int i = Thread(); i < count; i += 128) {
      const int at = split * count + i;
      float4 values[kParts];
#pragma unroll
      for (int k = 0; k < kParts; ++k) values[k] = __ldcg(SumsOf(k) + at);
#pragma unroll
      for (int k = 1; k < kParts; ++k) Add(values[k], values[0]);
      WithOutType([&]<typename T>() { Store<T>(values[0], at / 128, at % 128); });
    }
  }

  // level 0: mixed.
  template <int level>
  __device__ __forceinline__ void RunAtLevel(Outputs& y) {
    constexpr int kGroups = kStageGroups<level>;
    Start<level>();
    ptx::WaitForPrevious();  // if levels were known before
    for (int part = FirstPart(); part < FirstPart() + Parts(); ++part) {
#pragma unroll
      for (auto& rows : y) rows[0] = rows[1] = 0;
      for (const int stop = FirstGroup(part + 1); group < stop;) {
        // Unknown to the compiler also where it is one: in a loop of its own the product keeps all
        // of its registers.
        uint32_t count = min(kGroups, stop - group);
        ptx::KeepBefore(count);
        AwaitStage();
        const uint8_t* const from = StageData();
#pragma unroll 1
        for (int i = 0; i < static_cast<int>(count); ++i) {
          if constexpr (level == 0) {
            MultiplyMixed(from, y);
          } else {
            MultiplyGroup<level>(from, i, y);
          }
          this->ReleaseX();
        }
        ReleaseStage<level>();
      }
      FinishPart(part, y);
    }
  }

  __device__ __forceinline__ void Run(const RouteParams& route) {
    if (warp == 4 * kBatchWarpgroups) {
      this->OrderTokens(route);
    } else if (!this->AreKnown()) {
      ptx::WaitForPrevious();
    }
    __syncthreads();
    order.ends =
        __shfl_sync(~0u, *this->OrderAt(), 0);  // the same for all lanes, as the compiler sees
    if (warpgroup == kBatchWarpgroups) {
      ptx::GiveRegisters<kBatchFeederRegisters>();
      ptx::WaitForPrevious();
      this->FeedX();
      return;
    }
    ptx::TakeRegisters<kBatchRegisters>();
    if (warpgroup >= units) return;
    Outputs y;
    RunAtLevels(y);
    if (plan.splits_log > 0) return AddParts();
    WithOutType([&]<typename T>() {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) Store<T>(VectorOf(y, v), v, Thread());
    });
  }

  __device__ __forceinline__ void RunAtLevels(Outputs& y) {
    if (order.IsMixed(num_tokens)) return RunAtLevel<0>(y);
    switch (order.HighestLevel()) {
      case 1:
        return RunAtLevel<1>(y);
      case 2:
        return RunAtLevel<2>(y);
      case 3:
        return RunAtLevel<3>(y);
      default:
        return RunAtLevel<4>(y);
    }
  }
};

// Grid: the blocks of each tile, one beside the other; y blocks of N tokens. route: of the linear,
// if its levels are still to be chosen; else without losses.
template <int N>
__global__ void __launch_bounds__(kBatchThreads, 1)
    BatchKernel90(const __grid_constant__ SlicedProblem p, const __grid_constant__ Batch90Plan plan,
                  const __grid_constant__ RouteParams route) {
#if MOBI_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  ptx::LaunchDependents();
  BatchWarp90<N> self(p, plan, shared);
  self.Run(route);
#endif
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_CUH_
