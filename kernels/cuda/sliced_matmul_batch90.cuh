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
#include "kernels/cuda/sliced_matmul_batch90_choice.cuh"
#include "kernels/cuda/sliced_matmul_batch90_image.cuh"
#include "kernels/cuda/sliced_matmul_batch90_order.cuh"
#include "kernels/cuda/sliced_matmul_decode90_plan.cuh"
#include "kernels/cuda/sliced_matmul_exchange.cuh"
#include "kernels/cuda/sliced_matmul_unpack.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_registers.cuh"

namespace mobi::cuda {

inline constexpr int kBatchWarpgroups = 4;
// One more asks for x, and gives registers to those that multiply: together they are what 96 for
// each would be.
inline constexpr int kBatchThreads = 128 * (kBatchWarpgroups + 1);
inline constexpr int kBatchRegisters = 112, kBatchFeederRegisters = 32;
static_assert(kBatchWarpgroups * kBatchRegisters + kBatchFeederRegisters <= 5 * 96);
inline constexpr int kHalfTokens = kImageTokens;  // that are multiplied at a time
inline constexpr int kHalfTiles = kHalfTokens / 4;
inline constexpr int kFeedBarrier = kBatchWarpgroups + 1;  // after those of AddParts

// Shared memory: stages of x, of terms, rings, sums, then what is small.
template <int N>
struct Batch90Shared {
  static constexpr int kTermBytes = N * sizeof(WholeTerms);
  static constexpr int kSumBytes = N * kUnitRows * 4;  // of a unit
  static constexpr int kMostStages = 8;
  static constexpr int kSmall = N + 2 * kMostStages * 8 + 4;
  static constexpr int kRings = 4 * kBatchWarpgroups * kStages * kWarpStageBytes;

  static constexpr int Bytes(int x_stages, bool splits) {
    return x_stages * (kGroupBytes<N> + kTermBytes) + kRings +
           (splits ? 0 : kBatchWarpgroups * kSumBytes) + kSmall;
  }
};

template <int N>
struct BatchWarp90 {
  using Shared = Batch90Shared<N>;
  static constexpr int kHalves = N / kHalfTokens;
  static constexpr int kVectors = N / 8;  // of four of a lane's sums

  const SlicedProblem& p;
  const Batch90Plan& plan;
  uint8_t* shared;
  int lane, warp, own, warpgroup;  // own: the warp's place in its warpgroup, its tile of a unit
  int split, first_token, num_tokens;
  int segment, units;       // the block's segment, and its units
  int row_tile, last_tile;  // this warp's; the segment's last
  int64_t unit;             // of this warpgroup among all, of all blocks of tokens
  uint32_t ring;            // this lane's 16 bytes of its warp's, a shared address
  int group, end;           // the group that comes next, and where the block's columns end
  ColumnOrder order;

  // Offsets in shared memory.
  __device__ __forceinline__ int TermsAt() const { return plan.x_stages * kGroupBytes<N>; }
  __device__ __forceinline__ int RingAt() const {
    return TermsAt() + plan.x_stages * Shared::kTermBytes;
  }
  __device__ __forceinline__ int SumsAt() const { return RingAt() + Shared::kRings; }
  __device__ __forceinline__ int SmallAt() const {
    return SumsAt() + (plan.splits_log > 0 ? 0 : kBatchWarpgroups * Shared::kSumBytes);
  }
  __device__ __forceinline__ uint8_t* TokensAt() const {  // of the columns
    return shared + SmallAt() + 2 * Shared::kMostStages * 8;
  }
  __device__ __forceinline__ uint32_t* OrderAt() const {
    return reinterpret_cast<uint32_t*>(TokensAt() + N);
  }
  __device__ __forceinline__ uint32_t Full(int stage) const {
    return ptx::SharedAddress(shared) + SmallAt() + stage * 8;
  }
  __device__ __forceinline__ uint32_t Empty(int stage) const {
    return Full(stage + Shared::kMostStages);
  }

  __device__ __forceinline__ BatchWarp90(const SlicedProblem& p, const Batch90Plan& plan,
                                         uint8_t* shared)
      : p(p), plan(plan), shared(shared) {
    lane = ptx::LaneId();
    warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same for all lanes, as the compiler sees
    own = warp % 4;
    warpgroup = warp / 4;
    split = blockIdx.x & ((1 << plan.splits_log) - 1);
    const int tile = blockIdx.x >> plan.splits_log;
    segment = (tile >= plan.segment_tiles[0]) + (tile >= plan.segment_tiles[1]);
    const int first_of_segment = segment == 0 ? 0 : p.segment_tiles[segment - 1];
    const int of_segment = tile - (segment == 0 ? 0 : plan.segment_tiles[segment - 1]);
    const int first = first_of_segment + of_segment * plan.tile_units * kUnitTiles;
    last_tile = p.segment_tiles[segment] - 1;
    units = min(plan.tile_units, (last_tile - first) / kUnitTiles + 1);
    row_tile = first + warp;
    const int tiles = gridDim.x >> plan.splits_log;
    unit = (int64_t{blockIdx.y} * tiles + tile) * plan.tile_units + warpgroup;
    group = FirstGroup(FirstPart());
    end = FirstGroup(FirstPart() + Parts());
    ring = ptx::SharedAddress(shared) + RingAt() + warp * kStages * kWarpStageBytes + lane * 16;
    first_token = blockIdx.y * N;
    num_tokens = min(p.num_tokens - first_token, N);
  }

  __device__ __forceinline__ int Parts() const { return kParts >> plan.splits_log; }
  __device__ __forceinline__ int FirstPart() const { return split * Parts(); }
  __device__ __forceinline__ int FirstGroup(int part) const { return p.groups * part >> kPartsLog; }

  // ---- x, a group at a time for all warpgroups.

  __device__ __forceinline__ void MakeBarriers() const {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < plan.x_stages; ++i) {
      ptx::BarrierInit(Full(i), 1);
      ptx::BarrierInit(Empty(i), 4 * units);
    }
    ptx::FenceBarrierInit();
  }

  // The first token of a half's group in the images.
  __device__ __forceinline__ int64_t ImageOf(int half, int g) const {
    return (int64_t{blockIdx.y * kHalves + half} * p.groups + g) * kHalfTokens;
  }

  // Calls ask(group) for one after another, each when its stage is free.
  template <typename Ask>
  __device__ __forceinline__ void Feed(const Ask& ask) {
    uint32_t full_before = 1;  // the parity of a phase that no stage waits for
    for (int g = group; g < end; ++g) {
      ptx::BarrierWait(Empty(x_stage), full_before);
      ask(g);
      if (++x_stage == plan.x_stages) {
        x_stage = 0;
        full_before ^= 1;
      }
    }
  }

  // All tokens at one level are in the images' order. By one thread, which no product waits for, as
  // it would in one of the warps that multiply.
  __device__ __forceinline__ void FeedImages() {
    const uint32_t base = ptx::SharedAddress(shared);
    Feed([&](int g) {
      const uint32_t full = Full(x_stage);
      ptx::BarrierArriveExpecting(full, kGroupBytes<N> + Shared::kTermBytes);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        constexpr int kBytes = kGroupBytes<kHalfTokens>, kTerms = Shared::kTermBytes / kHalves;
        const int64_t from = ImageOf(half, g);
        ptx::BulkCopy(base + x_stage * kGroupBytes<N> + half * kBytes,
                      plan.x.bytes + from * kImageTokenBytes, kBytes, full);
        ptx::BulkCopy(base + TermsAt() + x_stage * Shared::kTermBytes + half * kTerms,
                      plan.x.terms + from, kTerms, full);
      }
    });
  }

  // Mixed levels: a warpgroup brings tokens to their columns.
  __device__ __forceinline__ void FeedColumns() {
    int last = -1;  // the stage that is under way
    const auto hand_over = [&] {
      ptx::FenceAsyncProxy();
      ptx::NamedBarrier(kFeedBarrier, 128);
      if (Thread() == 0) ptx::BarrierArrive(Full(last));
    };
    Feed([&](int g) {
      AskColumns(g);
      ptx::CommitCopies();
      if (last >= 0) {
        ptx::WaitCopies<1>();
        hand_over();
      }
      last = x_stage;
    });
    ptx::WaitCopies<0>();
    hand_over();
  }

  // Sixteen threads have a token's bytes. A chunk's place depends on its column (WriteForWgmma).
  __device__ __forceinline__ void AskColumns(int g) const {
    const uint32_t to = ptx::SharedAddress(shared) + x_stage * kGroupBytes<N>;
    const int chunk = Thread() % 16;
    for (int column = Thread() / 16; column < N; column += 8) {
      const int token = TokensAt()[column];
      const int from = chunk ^ ((token ^ column) % 4 * 2);
      const int64_t at = ImageOf(token / kHalfTokens, g) + token % kHalfTokens;
      ptx::CopyAsync16(to + column * kImageTokenBytes + chunk * 16,
                       plan.x.bytes + at * kImageTokenBytes + from * 16);
    }
    if (Thread() >= N) return;
    const int column = Thread(), token = TokensAt()[column];
    const auto place = [](int c) {
      return c / kHalfTokens * kHalfTokens + TermsPlace(c % kHalfTokens);
    };
    ptx::CopyAsync8(
        ptx::SharedAddress(shared) + TermsAt() + x_stage * Shared::kTermBytes +
            place(column) * static_cast<int>(sizeof(WholeTerms)),
        plan.x.terms + ImageOf(token / kHalfTokens, g) + TermsPlace(token % kHalfTokens));
  }

  // Of the group that is multiplied.
  int x_stage = 0;
  uint32_t x_parity = 0;

  // This warp has read the group, and goes on to the next.
  __device__ __forceinline__ void ReleaseX() {
    __syncwarp();
    if (lane == 0) ptx::BarrierArrive(Empty(x_stage));
    ++group;
    if (++x_stage == plan.x_stages) {
      x_stage = 0;
      x_parity ^= 1;
    }
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
    const int highest = HighestLevel();
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
    return shared + RingAt() + warp * kStages * kWarpStageBytes + stage;
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
    return *reinterpret_cast<const float4*>(shared + TermsAt() + x_stage * Shared::kTermBytes +
                                            (half * kHalfTokens + i * 8 + lane % 4 * 2) *
                                                sizeof(WholeTerms));
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

  __device__ __forceinline__ int HighestLevel() const {
    return 1 + (order.End(2) > 0) + (order.End(3) > 0) + (order.End(4) > 0);
  }

  __device__ __forceinline__ bool IsMixed() const { return order.End(HighestLevel()) < num_tokens; }

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
  __device__ __forceinline__ int Thread() const { return own * 32 + lane; }
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
        splits ? SumsOf(part) + Thread()
               : reinterpret_cast<float4*>(shared + SumsAt() + warpgroup * Shared::kSumBytes) +
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
          ReleaseX();
        }
        ReleaseStage<level>();
      }
      FinishPart(part, y);
    }
  }

  // ---- Levels, by a warp of those that do not multiply.

  static constexpr int kBlockLevels = N / 32;  // of a lane

  __device__ __forceinline__ void ReadLevels(int (&levels)[kBlockLevels]) const {
#pragma unroll
    for (int i = 0; i < kBlockLevels; ++i) {
      const int token = lane + 32 * i;
      levels[i] = 0;
      if (token >= num_tokens) continue;
      const int level = __ldcg(p.levels + segment * p.levels_stride + first_token + token);
      levels[i] = min(max(level, 1), kNumLevels);
    }
  }

  // Those of all tokens, of which the block has some.
  __device__ __forceinline__ void ChooseLevels(const BatchChoice& choice,
                                               int (&levels)[kBlockLevels]) const {
    int of_all[BatchChoice::kPerLane];
    choice.Choose(segment, of_all);
#pragma unroll
    for (int i = 0; i < kBlockLevels; ++i) {
#pragma unroll
      for (int k = i; k < BatchChoice::kPerLane; k += kBlockLevels) {
        if (first_token + 32 * i == 32 * k) levels[i] = of_all[k];
      }
    }
    const bool first_of_segment =
        static_cast<int>(blockIdx.x) ==
        (segment == 0 ? 0 : plan.segment_tiles[segment - 1] << plan.splits_log);
    if (first_of_segment && blockIdx.y == 0) choice.Publish(segment, of_all);
  }

  // The previous kernel has ended when they are asked for.
  __device__ __forceinline__ void OrderTokens(const RouteParams& route) const {
    int levels[kBlockLevels];
    if (route.losses != nullptr) {
      const BatchChoice choice(route, lane);
      ptx::WaitForPrevious();
      ChooseLevels(choice, levels);
    } else {
      ptx::WaitForPrevious();
      ReadLevels(levels);
    }
    const ColumnOrder of_tokens = OrderColumns<N>(levels, lane, TokensAt());
    if (lane == 0) *OrderAt() = of_tokens.ends;
  }

  __device__ __forceinline__ void Run(const RouteParams& route) {
    MakeBarriers();
    if (warp == 4 * kBatchWarpgroups) {
      OrderTokens(route);
    } else {
      ptx::WaitForPrevious();
    }
    __syncthreads();
    order.ends = __shfl_sync(~0u, *OrderAt(), 0);  // the same for all lanes, as the compiler sees
    if (warpgroup == kBatchWarpgroups) {
      ptx::GiveRegisters<kBatchFeederRegisters>();
      if (IsMixed()) {
        FeedColumns();
      } else if (Thread() == 0) {
        FeedImages();
      }
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
    if (IsMixed()) return RunAtLevel<0>(y);
    switch (HighestLevel()) {
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
