// A block of the batch path's kernel (sliced_matmul_batch90.cuh): what it has of the work, how its
// shared memory is laid out, and what the warpgroup does that does not multiply: the levels and the
// order of the tokens, and x, a group at a time for all the others.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_BLOCK_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_BLOCK_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_batch90_choice.cuh"
#include "kernels/cuda/sliced_matmul_batch90_image.cuh"
#include "kernels/cuda/sliced_matmul_batch90_order.cuh"
#include "kernels/cuda/sliced_matmul_decode90_plan.cuh"

namespace mobi::cuda {

inline constexpr int kBatchWarpgroups = 4;
// One more asks for x, and gives registers to those that multiply: together they are what 96 for
// each would be.
inline constexpr int kBatchThreads = 128 * (kBatchWarpgroups + 1);
inline constexpr int kBatchRegisters = 112, kBatchFeederRegisters = 32;
static_assert(kBatchWarpgroups * kBatchRegisters + kBatchFeederRegisters <= 5 * 96);
inline constexpr int kHalfTokens = kImageTokens;  // that are multiplied at a time
inline constexpr int kHalfTiles = kHalfTokens / 4;

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
struct BatchBlock90 {
  using Shared = Batch90Shared<N>;
  static constexpr int kHalves = N / kHalfTokens;

  const SlicedProblem& p;
  const Batch90Plan& plan;
  uint8_t* shared;
  int lane, warp, own, warpgroup;  // own: the warp's place in its warpgroup, its tile of a unit
  int split, first_token, num_tokens;
  int segment, units;       // the block's segment, and its units
  int row_tile, last_tile;  // this warp's; the segment's last
  int64_t unit;             // of this warpgroup among all, of all blocks of tokens
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

  __device__ __forceinline__ BatchBlock90(const SlicedProblem& p, const Batch90Plan& plan,
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
    first_token = blockIdx.y * N;
    num_tokens = min(p.num_tokens - first_token, N);
  }

  __device__ __forceinline__ int Thread() const { return own * 32 + lane; }  // of a warpgroup
  __device__ __forceinline__ int Parts() const { return kParts >> plan.splits_log; }
  __device__ __forceinline__ int FirstPart() const { return split * Parts(); }
  __device__ __forceinline__ int FirstGroup(int part) const { return p.groups * part >> kPartsLog; }

  // ---- x, a group at a time for all warpgroups.

  // By one thread. Each thread says for itself what it has read, and, of mixed levels, written.
  __device__ __forceinline__ void MakeBarriers(bool mixed) const {
    for (int i = 0; i < plan.x_stages; ++i) {
      ptx::BarrierInit(Full(i), mixed ? 128 : 1);
      ptx::BarrierInit(Empty(i), 128 * units);
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
      ptx::BarrierArrive(Full(last));
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

  // This thread has read the group, and goes on to the next.
  __device__ __forceinline__ void ReleaseX() {
    ptx::BarrierArrive(Empty(x_stage));
    ++group;
    if (++x_stage == plan.x_stages) {
      x_stage = 0;
      x_parity ^= 1;
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

  // Levels are known before the previous kernel has ended.
  __device__ __forceinline__ bool AreKnown() const { return p.levels_stride == 0; }

  // Where levels are not known, the previous kernel has ended when they are asked for.
  __device__ __forceinline__ void OrderTokens(const RouteParams& route) const {
    int levels[kBlockLevels];
    if (route.losses != nullptr) {
      const BatchChoice choice(route, lane);
      ptx::WaitForPrevious();
      ChooseLevels(choice, levels);
    } else {
      if (!AreKnown()) ptx::WaitForPrevious();
      ReadLevels(levels);
    }
    const ColumnOrder of_tokens = OrderColumns<N>(levels, lane, TokensAt());
    if (lane > 0) return;
    *OrderAt() = of_tokens.ends;
    MakeBarriers(of_tokens.IsMixed(num_tokens));
  }

  // Of the warpgroup that feeds.
  __device__ __forceinline__ void FeedX() {
    if (order.IsMixed(num_tokens)) {
      FeedColumns();
    } else if (Thread() == 0) {
      FeedImages();
    }
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_BLOCK_CUH_
