// The weights' way into shared memory in the decode path on compute capability 9.0: which level a
// unit is read at, a warp's walk over its groups, and the ring of stages that it fills ahead. By
// copies of 16 bytes, all lanes at once: fewer instructions than one thread needs to ask for bulk
// copies while the others wait.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_RING_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_RING_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_decode90_plan.cuh"
#include "kernels/cuda/sliced_matmul_decode90_x.cuh"

namespace mobi::cuda {

// `level` as a template argument: 1..4, or kMixed where tiles or tokens of the block differ.
inline constexpr int kMixed = 0;

template <int level>
inline constexpr int kStageGroups = level == kMixed ? 1 : GroupsPerStage(level);

// Levels, and where a warp is in its walk through its units' groups.
template <int N, int W, bool kBf16, bool kAhead>
struct Decode90Ring : Decode90X<N, W, kBf16, kAhead> {
  using Base = Decode90X<N, W, kBf16, kAhead>;
  using Base::begin;
  using Base::end;
  using Base::first_token;
  using Base::first_unit;
  using Base::FirstOf;
  using Base::lane;
  using Base::MyRounds;
  using Base::num_tokens;
  using Base::num_units;
  using Base::own;
  using Base::p;
  using Base::plan;
  using Base::SegmentOf;
  using Base::shared;
  using Base::TileOf;
  using Base::UnitOf;
  using Base::warp;

  // Rounds begin..end - 1, whose units have one level, or kMixed.
  struct Stretch {
    int begin, end, level;
  };
  // A stage's place in the warp's walk.
  struct OfWalk {
    int round, left;  // groups of the round, from there on
    uint32_t at;
  };

  uint32_t present = 0;  // 4 bits per segment: levels that occur among the tokens
  Stretch stretch;
  OfWalk fill;  // what is asked for next
  // For mixed levels: the highest that is read in the unit that is asked for, and this lane's 16
  // bytes of the ranges of group 0, four lanes for each level.
  int highest;
  const uint4* ranges_of_lane;
  int stage = 0;  // an offset in the warp's ring, of either one
  uint32_t ring;  // this lane's 16 bytes of it, a shared address

  __device__ __forceinline__ Decode90Ring(const SlicedProblem& problem, const Decode90Plan& choices,
                                          uint8_t* memory)
      : Base(problem, choices, memory) {
    ring = ptx::SharedAddress(shared) + plan.ring + warp * kStages * kWarpStageBytes + lane * 16;
  }

  __device__ __forceinline__ uint32_t LevelsOf(int tile) const {
    return (present >> (4 * SegmentOf(tile))) & 15;
  }
  // The level of all tokens in all tiles of these units, or kMixed.
  __device__ __forceinline__ int LevelOf(int unit, int units) const {
    const int first = TileOf(unit, 0), last = TileOf(unit + units, -1);
    const uint32_t levels = LevelsOf(first);
    bool same = (levels & (levels - 1)) == 0 && LevelsOf(last) == levels;
    if (SegmentOf(last) - SegmentOf(first) == 2) same &= ((present >> 4) & 15) == levels;
    return same ? 32 - __clz(levels) : kMixed;
  }

  // The next rounds whose units have one level: mostly all, but segments may differ. (Not for
  // wgmma: in a loop over stretches the compiler lets it wait for itself.)
  __device__ __forceinline__ Stretch StretchFrom(int round) const {
    Stretch next = {round, MyRounds(), LevelOf(first_unit, num_units)};
    if (!kUsesMma<N> || next.level != kMixed || round == MyRounds()) return next;
    next.level = LevelOf(UnitOf(round), 1);
    next.end = round + 1;
    while (next.end < MyRounds() && LevelOf(UnitOf(next.end), 1) == next.level) ++next.end;
    return next;
  }

  // Which levels occur among the block's tokens, per segment; for mixed levels, also a copy of
  // them in shared memory (0 where there is no token).
  __device__ __forceinline__ void ReadLevels() {
    static_assert(N <= 32);
    int levels[kMaxSegments] = {};
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s) {
      if (s < p.num_segments && lane < num_tokens) {
        levels[s] = __ldcg(p.levels + (s * static_cast<int>(p.levels_stride) + first_token + lane));
      }
    }
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s) {
      if (s >= p.num_segments || lane >= N) continue;
      int level = 0;
      if (lane < num_tokens) {
        level = min(max(levels[s], 1), kNumLevels);
        present |= 1u << (4 * s + level - 1);
      }
      if (warp == 0) shared[plan.levels + s * N + lane] = static_cast<uint8_t>(level);
    }
    present = __reduce_or_sync(~0u, present);
  }

  // What `present` may turn out to be: the levels that the array still holds.
  struct Guess {
    int levels[kMaxSegments];
  };
  __device__ __forceinline__ Guess LoadGuess() const {
    Guess guess{};
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s) {
      if (s < p.num_segments && lane < num_tokens) {
        guess.levels[s] = __ldcg(p.levels + (s * static_cast<int>(p.levels_stride) + lane));
      }
    }
    return guess;
  }
  __device__ __forceinline__ void TakeGuess(const Guess& guess) {
    uint32_t levels = 0;
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s) {
      if (s >= p.num_segments || lane >= num_tokens) continue;
      levels |= 1u << (4 * s + min(max(guess.levels[s], 1), kNumLevels) - 1);
    }
    present = __reduce_or_sync(~0u, levels);
  }

  // Asks the first slice of the first rows into L2, where a router comes first; a lane asks for
  // those of one round.
  __device__ __forceinline__ void Prefetch() const {
    const int of_round = (end - begin) * kTileBytes, bytes = kPrefetchBytes - lane * of_round;
    if (lane < MyRounds() && bytes > 0) {
      ptx::BulkPrefetch(p.slices[0] + size_t{FirstOf(lane)} * 32, min(of_round, bytes));
    }
    __syncwarp();
  }

  // ---- The ring.

  static_assert(kStages == 2);  // `stage` changes to the other

  // The stage whose groups are multiplied next. A lane reads what it has copied itself, but for the
  // ranges.
  __device__ __forceinline__ const uint8_t* StageData() const {
    return shared + plan.ring + warp * kStages * kWarpStageBytes + stage;
  }

  // Asks for the first stages of the stretch. All of the ring is free.
  template <int level>
  __device__ __forceinline__ void Start() {
    fill = {stretch.begin, end - begin, FirstOf(stretch.begin)};
    if constexpr (level == kMixed) {
      highest = HighestOf(stretch.begin);
      ranges_of_lane = p.scales[min(lane / 4, kNumLevels - 1)] + lane % 4;
    }
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) {
      Fill<level>();
      stage ^= kWarpStageBytes;
    }
  }

  // Asks for what follows, in place of `stage`. Await counts the calls.
  template <int level>
  __device__ __forceinline__ void Fill() {
    if (fill.round < stretch.end) {
      const int count = min(kStageGroups<level>, fill.left);
      Ask<level>(count);
      fill.at += count;
      fill.left -= count;
      if (fill.left == 0) {
        fill = {fill.round + 1, end - begin, FirstOf(fill.round + 1)};
        if constexpr (level == kMixed) highest = HighestOf(fill.round);
      }
    }
    ptx::CommitCopies();
  }

  template <int level>
  __device__ __forceinline__ void Ask(int count) const {
    const uint32_t to = ring + stage;
    if constexpr (level == kMixed) {
      AskMixed(to);
    } else {
      constexpr int kGroups = kStageGroups<level>;
#pragma unroll
      for (int s = 0; s < level; ++s) AskSlice<kGroups>(s, to + s * kGroups * kTileBytes, count);
      AskRanges(level, to + kWarpStageScales, count);
    }
  }

  // One group, with the ranges of all levels that are read, one after another.
  __device__ __forceinline__ void AskMixed(uint32_t to) const {
#pragma unroll
    for (int s = 0; s < kNumSlices; ++s) {
      if (s < highest) AskSlice<1>(s, to + s * kTileBytes, 1);
    }
    static_assert(kTileScaleBytes == 4 * 16);  // so that `to` fits, which counts lanes
    if (lane < 4 * highest) {
      ptx::CopyAsync16(to + kWarpStageScales, ranges_of_lane + size_t{fill.at} * 4);
    }
  }

  __device__ __forceinline__ int HighestOf(int round) const {
    return 32 - __clz(LevelsOf(TileOf(UnitOf(round), own)));
  }

  // Mostly a stage is full: one address then serves all of its groups.
  template <int kGroups>
  __device__ __forceinline__ void AskSlice(int s, uint32_t to, int count) const {
    const uint4* const from = p.slices[s] + size_t{fill.at} * 32 + lane;
    if (count == kGroups) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) ptx::CopyAsync16(to + i * kTileBytes, from + i * 32);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i) ptx::CopyAsync16(to + i * kTileBytes, from + i * 32);
    }
  }

  // A lane has four of a group's 16 rows.
  __device__ __forceinline__ void AskRanges(int level, uint32_t to, int count) const {
    if (lane >= 4 * count) return;
    ptx::CopyAsync16(to, p.scales[level - 1] + size_t{fill.at} * 4 + lane);
  }

  // The stage is here: the other may be under way.
  __device__ __forceinline__ void Await() const {
    ptx::WaitCopies<kStages - 1>();
    __syncwarp();
  }

  // The stage has been read: it is filled again.
  template <int level>
  __device__ __forceinline__ void Release() {
    __syncwarp();
    Fill<level>();
    stage ^= kWarpStageBytes;
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_RING_CUH_
