// The decode path's kernel where that of compute capability 9.0 (sliced_matmul_decode90.cuh) cannot
// run: other devices, and weights of fewer columns than kParts groups. Few tokens, so the time is
// that of reading weights once.
//
// Work. Columns are cut into kParts parts, one for each warp that works on a panel of two row
// tiles; see DecodePlan for who has which. A warp streams its tiles through a ring of its own in
// shared memory, so that no barrier stands in the stream. Tokens are the 8-wide operand of
// mma.m16n8k16, weights the 16-row one (sliced_matmul_unpack.cuh).
//
// Sum of one output, the same for every launch shape: per group of 128 columns one chain of eight
// mma from zero; the groups of a part in order in fp32, each with its range and offset; the parts
// by SumOfParts. So a token's bits do not depend on the other tokens.
//
// Order. With a dependent launch the block takes its place while the previous kernel still runs;
// whatever it reads it asks for after that has ended: levels and x first, then what the levels say.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_exchange.cuh"
#include "kernels/cuda/sliced_matmul_plan.cuh"
#include "kernels/cuda/sliced_matmul_stage.cuh"
#include "kernels/cuda/sliced_matmul_unpack.cuh"

namespace mobi::cuda {

// One stage of a warp's ring: for each tile of a panel 4 slices of one group, 2 slices of two, or
// one slice of four, and the pairs of range and offset. So a stage is worth its cost at every
// level.
inline constexpr int kStageScales = kPanelTiles * 4 * kTileBytes;
inline constexpr int kStageBytes = kStageScales + kPanelTiles * 4 * kTileScaleBytes;
template <int NT>
inline constexpr int kStages = NT == 1 ? 2 : 3;

// `level` as a template argument: 1..4, or kAnyLevel where tiles or tokens of the block differ. A
// panel at any level is taken tile by tile.
inline constexpr int kAnyLevel = 0;
__host__ __device__ constexpr int TilesAtOnce(int level) {
  return level == kAnyLevel ? 1 : kPanelTiles;
}

template <int NT, bool kBf16>
struct DecodeWarp {
  const SlicedProblem& p;
  const DecodePlan& plan;
  const DecodePlace& place;
  const XPart<NT, kBf16>& x;
  uint8_t* ring;
  uint32_t present;  // 4 bits per segment: levels that occur among the tokens

  // Byte offsets in the ring: of the stage to be read, to be filled next.
  int stage, fill;
  // The walk of the loads: panel by panel, stage by stage, through one chunk of x.
  int groups;   // of a tile in this chunk
  int tile;     // in the run
  int left;     // groups of the tile that are still to be asked for
  uint32_t at;  // index of the next one in a slice stream

  __device__ __forceinline__ int SegmentOf(int run_tile) const {
    const int row_tile = place.first_tile + run_tile;
    return (row_tile >= p.segment_tiles[0]) + (row_tile >= p.segment_tiles[1]);
  }
  __device__ __forceinline__ uint32_t LevelsOf(int run_tile) const {
    return (present >> (4 * SegmentOf(run_tile))) & 15;
  }
  // The level of all tokens in all tiles of the run, or kAnyLevel; that also where x is cut.
  __device__ __forceinline__ int CommonLevel() const {
    const uint32_t levels = LevelsOf(0);
    bool same = (levels & (levels - 1)) == 0 && LevelsOf(place.num_tiles - 1) == levels;
    if (SegmentOf(place.num_tiles - 1) - SegmentOf(0) == 2) same &= ((present >> 4) & 15) == levels;
    return same && plan.chunks == 1 ? 32 - __clz(levels) : kAnyLevel;
  }

  // ---- Loads.

  template <int level>
  __device__ __forceinline__ void Start(int chunk) {
    groups = x.ChunkGroups(chunk);
    tile = groups == 0 ? place.num_tiles : place.team * kPanelTiles;
    left = groups;
    stage = fill = 0;
    at = static_cast<uint32_t>((place.first_tile + tile) * p.groups + place.first_group +
                               chunk * plan.chunk_groups);
    for (int i = 0; i < kStages<NT> - 1; ++i) Fill<level>();
  }

  // Asks for the next stage.
  template <int level>
  __device__ __forceinline__ void Fill() {
    constexpr int kTiles = TilesAtOnce(level);
    if (tile < place.num_tiles) {
      const uint32_t to = ptx::SharedAddress(ring) + fill + place.lane * 16;
      if constexpr (level != kAnyLevel) {
        Copy<level, kTiles>(to);
      } else {
        CopyAny(LevelsOf(tile), to);
      }
      if (left <= 0) {
        // Back from beyond the tile, on to the next ones; teams take panels by turns.
        const int skip =
            (tile + kTiles) % kPanelTiles == 0 ? kPanelTiles * ((1 << plan.cluster_log) - 1) : 0;
        tile += kTiles + skip;
        at += (kTiles + skip) * p.groups + left - groups;
        left = groups;
      }
    }
    ptx::CommitCopies();
    fill = fill == (kStages<NT> - 1) * kStageBytes ? 0 : fill + kStageBytes;
  }

  template <int level, int kTiles>
  __device__ __forceinline__ void Copy(uint32_t to) {
    constexpr int kGroups = GroupsPerStage(level);
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      if (r > 0 && tile + r >= place.num_tiles) break;
      const uint32_t index = at + r * p.groups;
      const size_t from = static_cast<size_t>(index) * 32 + place.lane;
#pragma unroll
      for (int s = 0; s < level; ++s) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          if (i == 0 || i < left) {
            ptx::CopyAsync16(to + ((i * level + s) * kPanelTiles + r) * kTileBytes,
                             p.slices[s] + from + i * 32);
          }
        }
      }
      // The pairs of a tile's groups lie one after another.
      if (place.lane < 4 * min(left, kGroups)) {
        ptx::CopyAsync16(to + kStageScales + r * 4 * kTileScaleBytes,
                         p.scales[level - 1] + static_cast<size_t>(index) * 4 + place.lane);
      }
    }
    at += kGroups;
    left -= kGroups;
  }

  __device__ __forceinline__ void CopyAny(uint32_t levels, uint32_t to) {
    switch (levels) {
      case 1:
        return Copy<1, 1>(to);
      case 2:
        return Copy<2, 1>(to);
      case 4:
        return Copy<3, 1>(to);
      case 8:
        return Copy<4, 1>(to);
    }
    const size_t from = static_cast<size_t>(at) * 32 + place.lane;
#pragma unroll
    for (int s = 0; s < kNumSlices; ++s) {
      if (levels >> s != 0) {
        ptx::CopyAsync16(to + s * kPanelTiles * kTileBytes, p.slices[s] + from);
      }
    }
    const int level = place.lane / 4;
    if (levels >> level & 1 && place.lane < 4 * kNumLevels) {
      ptx::CopyAsync16(to + kStageScales,
                       p.scales[level] + static_cast<size_t>(at) * 4 + place.lane % 4);
    }
    ++at;
    --left;
  }

  // The stage to read now; asks for another one in the place of the one read before.
  template <int level>
  __device__ __forceinline__ const uint8_t* NextStage() {
    ptx::WaitCopies<kStages<NT> - 2>();
    __syncwarp();  // pairs were copied by other lanes; and no lane still reads the stage before
    const uint8_t* const from = ring + stage;
    stage = stage == (kStages<NT> - 1) * kStageBytes ? 0 : stage + kStageBytes;
    Fill<level>();
    return from;
  }

  // ---- Products of R tiles.

  // {range, offset} of row lane / 4 + 8 h of tile r for the i-th group, or level, of a stage.
  __device__ __forceinline__ float2 LoadPair(const uint8_t* from, int i, int r, int h) const {
    return __half22float2(*reinterpret_cast<const half2*>(from + kStageScales +
                                                          (r * 4 + i) * kTileScaleBytes +
                                                          (place.lane / 4 + 8 * h) * kPairBytes));
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

  // d += codes at `level` of one group, times group g of x. kMasked: of the tokens at that level.
  template <int level, int R, bool kMasked>
  __device__ __forceinline__ void Multiply(const uint8_t* from, int g, const uint32_t (&mask)[NT],
                                           float (&d)[R][NT][4]) const {
    uint4 words[R][level];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int s = 0; s < level; ++s) {
        words[r][s] = *reinterpret_cast<const uint4*>(from + (s * kPanelTiles + r) * kTileBytes +
                                                      place.lane * 16);
      }
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t a[R][8];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        uint32_t slices[level];
#pragma unroll
        for (int s = 0; s < level; ++s) slices[s] = (&words[r][s].x)[w];
        Unpack<level>(slices, a[r]);
      }
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        uint4 b = x.Load(g, j, w);
        if constexpr (kMasked) {
          b = make_uint4(b.x & mask[j], b.y & mask[j], b.z & mask[j], b.w & mask[j]);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (w == 0 && !kMasked) {
            ptx::MmaFromZero(d[r][j], a[r], b.x, b.y);
          } else {
            ptx::Mma(d[r][j], a[r], b.x, b.y);
          }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) ptx::Mma(d[r][j], a[r] + 4, b.z, b.w);
      }
    }
  }

  // The tiles' groups in this chunk of x, all tokens at one level. kStream: what the loads are at.
  template <int level, int R, int kStream>
  __device__ __forceinline__ void Accumulate(float (&y)[R][NT][4]) {
    constexpr int kGroups = GroupsPerStage(level);
    for (int begin = 0; begin < groups; begin += kGroups) {
      const uint8_t* const from = NextStage<kStream>();
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (i > 0 && begin + i >= groups) break;
        const int g = begin + i;
        float d[R][NT][4];
        Multiply<level, R, false>(from + i * level * kPanelTiles * kTileBytes, g, {}, d);
        float2 pair[R][2];
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            pair[r][h] = LoadPair(from, i, r, h);
            if constexpr (level > 1) {
              pair[r][h].y = fmaf(pair[r][h].x, CodeOffset(level), pair[r][h].y);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const float2 sum = x.LoadSums(g, j), unit = x.LoadUnit(g, j);
          float4 bias = make_float4(0, 0, 0, 0);
          if constexpr (level == 1) bias = x.LoadBias(g, j);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            float(&to)[4] = y[r][j];
            const float(&add)[4] = d[r][j];
            const float2 low = pair[r][0], high = pair[r][1];
            to[0] = Promote<level == 1>(to[0], add[0], bias.x, unit.x, sum.x, low);
            to[1] = Promote<level == 1>(to[1], add[1], bias.z, unit.y, sum.y, low);
            to[2] = Promote<level == 1>(to[2], add[2], bias.y, unit.x, sum.x, high);
            to[3] = Promote<level == 1>(to[3], add[3], bias.w, unit.y, sum.y, high);
          }
        }
      }
    }
  }

  // One level's tokens among mixed ones.
  template <int level>
  __device__ __forceinline__ void MultiplyMasked(const uint8_t* from, int g,
                                                 const uint32_t (&token_level)[NT],
                                                 float (&d)[1][NT][4]) const {
    uint32_t mask[NT];
#pragma unroll
    for (int j = 0; j < NT; ++j) mask[j] = token_level[j] == level ? ~0u : 0u;
    Multiply<level, 1, true>(from, g, mask, d);
  }

  // The same with a level of its own for every token: the codes are unpacked once per level that
  // occurs and meet x with the other levels' tokens masked out.
  __device__ __forceinline__ void AccumulateMixed(int run_tile, float (&y)[1][NT][4]) {
    const uint8_t* const own = x.shared + LevelsAt(SegmentOf(run_tile));
    const uint32_t occur = LevelsOf(run_tile);
    uint32_t token_level[NT];  // of token lane / 4 of each tile
#pragma unroll
    for (int j = 0; j < NT; ++j) token_level[j] = own[8 * j + place.lane / 4];
    for (int g = 0; g < groups; ++g) {
      const uint8_t* const from = NextStage<kAnyLevel>();
      float d[1][NT][4] = {};
      if (occur & 1) MultiplyMasked<1>(from, g, token_level, d);
      if (occur & 2) MultiplyMasked<2>(from, g, token_level, d);
      if (occur & 4) MultiplyMasked<3>(from, g, token_level, d);
      if (occur & 8) MultiplyMasked<4>(from, g, token_level, d);
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float2 sum = x.LoadSums(g, j), unit = x.LoadUnit(g, j);
        const float4 bias = x.LoadBias(g, j);
        const uint8_t* const two = own + 8 * j + place.lane % 4 * 2;
        PromoteMixed(from, two[0], unit.x, sum.x, bias.x, bias.y, d[0][j][0], d[0][j][2],
                     y[0][j][0], y[0][j][2]);
        PromoteMixed(from, two[1], unit.y, sum.y, bias.z, bias.w, d[0][j][1], d[0][j][3],
                     y[0][j][1], y[0][j][3]);
      }
    }
  }

  // Both rows of a token that has a level of its own (0: no token; nothing is stored).
  __device__ __forceinline__ void PromoteMixed(const uint8_t* from, int level, float unit,
                                               float sum, float bias_low, float bias_high,
                                               float d_low, float d_high, float& y_low,
                                               float& y_high) const {
    level = max(level, 1);
    // 0.5 / 4^level - 4, exactly as CodeOffset gives it.
    const float code_offset = __int_as_float((126 - 2 * level) << 23) - 4.0f;
    float2 low = LoadPair(from, level - 1, 0, 0), high = LoadPair(from, level - 1, 0, 1);
    low.y = level == 1 ? low.y : fmaf(low.x, code_offset, low.y);
    high.y = level == 1 ? high.y : fmaf(high.x, code_offset, high.y);
    y_low = Promote<true>(y_low, d_low, level == 1 ? bias_low : 0.0f, unit, sum, low);
    y_high = Promote<true>(y_high, d_high, level == 1 ? bias_high : 0.0f, unit, sum, high);
  }

  __device__ __forceinline__ void AccumulateAny(int run_tile, float (&y)[1][NT][4]) {
    switch (LevelsOf(run_tile)) {
      case 1:
        return Accumulate<1, 1, kAnyLevel>(y);
      case 2:
        return Accumulate<2, 1, kAnyLevel>(y);
      case 4:
        return Accumulate<3, 1, kAnyLevel>(y);
      case 8:
        return Accumulate<4, 1, kAnyLevel>(y);
      default:
        return AccumulateMixed(run_tile, y);
    }
  }

  // One panel; its sums go to `sums`. `resume`: and start from what is there.
  template <int level>
  __device__ __forceinline__ void AccumulatePanel(const Exchange<NT>& exchange, int run_tile,
                                                  bool resume, float* sums) {
    constexpr int kTiles = TilesAtOnce(level);
    for (int first = 0; first < kPanelTiles; first += kTiles) {
      if (run_tile + first >= place.num_tiles) break;
      float y[kTiles][NT][4] = {};
      if constexpr (level == kAnyLevel) {
        if (resume) exchange.Read(sums + first * kTileRows, y[0]);
        AccumulateAny(run_tile + first, y);
      } else {
        Accumulate<level, kTiles, level>(y);
      }
#pragma unroll
      for (int r = 0; r < kTiles; ++r) exchange.Write(sums + (first + r) * kTileRows, y[r]);
    }
  }

  // When x passes through shared memory in several chunks: all but the last. There is one round
  // then, so the sums wait in the exchange buffer meanwhile.
  __device__ __forceinline__ void FirstChunks(const Exchange<NT>& exchange) {
    for (int chunk = 0; chunk + 1 < plan.chunks; ++chunk) {
      float* sums = exchange.At(0, place.warp);
      for (int i = 0; i < plan.round_panels; ++i) {
        const int run_tile = ((i << plan.cluster_log) + place.team) * kPanelTiles;
        AccumulatePanel<kAnyLevel>(exchange, run_tile, chunk > 0, sums);
        sums += exchange.PanelFloats();
      }
      x.SyncTeams();  // all have left the chunk that is overwritten
      uint4 v[XPart<NT, kBf16>::kBatch];
      x.Begin(chunk + 1, v);
      Start<kAnyLevel>(chunk + 1);
      x.Finish(chunk + 1, v);
    }
  }

  // All of the block's work, once its first loads are under way. A round's sums are added when the
  // next one begins, its loads being under way too.
  template <int level>
  __device__ __forceinline__ void Run(const Exchange<NT>& exchange) {
    if constexpr (level == kAnyLevel) FirstChunks(exchange);
    const int step = kPanelTiles << plan.cluster_log;    // from a team's panel to its next
    int run_tile = place.team * kPanelTiles, begun = 0;  // begun: tiles that rounds have begun
    for (int round = 0;; ++round) {
      float* sums = exchange.At(round, place.warp);
      const bool done = begun >= place.num_tiles;
      for (int i = 0; i < plan.round_panels; ++i) {
        if (i == 0 && round > 0) {
          exchange.Wait();
          exchange.Add(round - 1);
        }
        if (done) break;
        AccumulatePanel<level>(exchange, run_tile, plan.chunks > 1, sums);
        run_tile += step;
        sums += exchange.PanelFloats();
      }
      if (done) break;
      begun += plan.round_panels * step;
      exchange.Arrive();
    }
    if (plan.cluster_log > 0) {  // no block may leave while another reads its buffer
      ptx::ClusterArrive();
      ptx::ClusterWait();
    }
  }

  // Where this warp's copy of a segment's levels lies in shared memory.
  __device__ __forceinline__ int LevelsAt(int segment) const {
    return plan.levels + (place.warp * kMaxSegments + segment) * 8 * NT;
  }

  // Which levels occur among the block's tokens, per segment of the run; for mixed levels, also a
  // copy of them in shared memory (0 where there is no token).
  __device__ __forceinline__ void ReadLevels() {
    constexpr int kTokens = 8 * NT;
    present = 0;
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s) {
      if (s < SegmentOf(0) || s > SegmentOf(place.num_tiles - 1)) continue;
      int level = 0;
      if (place.lane < place.num_tokens) {
        level = __ldcg(p.levels + s * p.levels_stride + place.first_token + place.lane);
        level = min(max(level, 1), kNumLevels);
        present |= 1u << (4 * s + level - 1);
      }
      if (place.lane < kTokens) {
        x.shared[LevelsAt(s) + place.lane] = static_cast<uint8_t>(level);
      }
    }
    present = __reduce_or_sync(~0u, present);
  }
};

// Grid: the blocks of the clusters; y blocks of 8 NT tokens.
template <int NT, bool kBf16>
__global__ void __launch_bounds__(kDecodeThreads, NT == 1 ? 2 : 1)
    SlicedDecodeKernel(const __grid_constant__ SlicedProblem p,
                       const __grid_constant__ DecodePlan plan) {
  static_assert(8 * NT <= 32, "ReadLevels has a token per lane");
  extern __shared__ __align__(128) uint8_t shared[];
  ptx::LaunchDependents();
  const DecodePlace place(p, plan, 8 * NT);
  ptx::WaitForPrevious();

  // x and levels travel together; the levels say what to ask for.
  const XPart<NT, kBf16> x(p, plan, place, shared);
  const Exchange<NT> exchange{p, plan, place, shared};
  DecodeWarp<NT, kBf16> self{p, plan, place, x, shared + place.warp * kStages<NT> * kStageBytes};
  uint4 v[XPart<NT, kBf16>::kBatch];
  x.Begin(0, v);
  self.ReadLevels();
  const int level = self.CommonLevel();
  switch (level) {
    case 1:
      self.template Start<1>(0);
      break;
    case 2:
      self.template Start<2>(0);
      break;
    case 3:
      self.template Start<3>(0);
      break;
    case 4:
      self.template Start<4>(0);
      break;
    default:
      self.template Start<kAnyLevel>(0);
  }
  x.Finish(0, v);
  switch (level) {
    case 1:
      return self.template Run<1>(exchange);
    case 2:
      return self.template Run<2>(exchange);
    case 3:
      return self.template Run<3>(exchange);
    case 4:
      return self.template Run<4>(exchange);
    default:
      return self.template Run<kAnyLevel>(exchange);
  }
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE_CUH_
