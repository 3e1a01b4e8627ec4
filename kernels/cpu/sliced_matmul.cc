// One more SIMD target than other files have: AVX-512 with VNNI (group_dot-inl.h).
#define HWY_WANT_AVX3_DL
#include "kernels/cpu/sliced_matmul.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "hwy/cache_control.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sliced_matmul.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/group_dot-inl.h"
#include "kernels/cpu/slice_codes-inl.h"

#ifndef MOBI_KERNELS_CPU_SLICED_MATMUL_CC_ONCE_
#define MOBI_KERNELS_CPU_SLICED_MATMUL_CC_ONCE_
namespace mobi::cpu {

// Tokens worked on in one pass; a longer batch takes several. Their inputs stay in the second level
// cache, as far as they fit.
constexpr int kMaxTokens = 128;
// From so many tokens on, keeping the joined codes of a tile costs less than joining them again.
constexpr int kMinJoinedTokens = 3;
// Weights of a tile, a byte each once its slices are joined.
constexpr size_t kTileCodes = kTileRows * kGroupSize;

// The tokens of one pass, sorted by level for each segment.
struct LevelOrder {
  std::array<std::array<int16_t, kMaxTokens>, kMaxSegments> token;
  // Tokens of level k of segment s are token[s][begin[s][k - 1] .. begin[s][k]).
  std::array<std::array<int, kNumLevels + 1>, kMaxSegments> begin;
};

// The inputs of a pass, rounded: group by group, because a tile meets the same group of all tokens.
struct RoundedInputs {
  uint8_t* values;
  GroupScale* scales;
  int64_t num_tokens;

  size_t Index(int64_t group, int64_t token) const { return group * num_tokens + token; }
};

struct SlicedJob {
  const SlicedWeight* weight;
  const LevelOrder* order;
  Tensor x;  // the tokens of this pass
  RoundedInputs inputs;
  Tensor out;
};

}  // namespace mobi::cpu
#endif  // MOBI_KERNELS_CPU_SLICED_MATMUL_CC_ONCE_

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

// The 16 rows of a tile, as floats: of one group, what a token's product with the codes is
// multiplied with; and the sums of a token over groups.
struct TileScales {
  Floats range[kTileVectors];
  Floats centre[kTileVectors];  // the middle of the range

  HWY_INLINE explicit TileScales(const uint16_t* HWY_RESTRICT pairs) {
    const FloatTag d;
    const hn::Rebind<hwy::float16_t, FloatTag> half;
    const hn::Rebind<uint16_t, FloatTag> d16;
    for (size_t i = 0; i < kTileVectors; ++i) {
      hn::Vec<decltype(d16)> low, high;
      hn::LoadInterleaved2(d16, pairs + 2 * i * kLanes, low, high);
      range[i] = hn::PromoteTo(d, hn::BitCast(half, low));
      const Floats offset = hn::PromoteTo(d, hn::BitCast(half, high));
      centre[i] = hn::MulAdd(range[i], hn::Set(d, 0.5f), offset);
    }
  }
};

// Adds one group of a token to its sums. A code Q reads as
//   offset + range (Q + 1/2) / 4^k  =  centre + range (2 Q + 1 - 4^k) / (2 4^k):
// codes about the centre, which stay whole, so that next to nothing cancels in floats.
template <int Level, class Tile>
HWY_INLINE void AddGroup(const Tile& tile, const TileScales& scales, const RoundedInputs& inputs,
                         size_t index, Floats (&sums)[kTileVectors]) {
  constexpr int kCodes = 1 << BitsOfLevel(Level);
  const FloatTag d;
  const IntTag di;
  const GroupScale of_token = inputs.scales[index];
  Ints products[kTileVectors];
  MultiplyTile(tile, inputs.values + index * kGroupInputBytes, products);
  const Ints middle = hn::Set(di, (kCodes - 1) * of_token.sum);
  const Floats step = hn::Set(d, of_token.scale / (2 * kCodes));
  const Floats sum = hn::Set(d, of_token.scale * static_cast<float>(of_token.sum));
  for (size_t i = 0; i < kTileVectors; ++i) {
    const Ints about_centre = hn::Sub(hn::Add(products[i], products[i]), middle);
    sums[i] = hn::MulAdd(hn::ConvertTo(d, about_centre), hn::Mul(scales.range[i], step), sums[i]);
    sums[i] = hn::MulAdd(scales.centre[i], sum, sums[i]);
  }
}

// One token against a row of tiles: codes never leave the registers.
template <int Level>
HWY_NOINLINE void MultiplyOneToken(const SlicedWeight& weight, int64_t tile,
                                   const RoundedInputs& inputs, int64_t token,
                                   float* HWY_RESTRICT out) {
  const FloatTag d;
  const int64_t groups = weight.cols / kGroupSize;
  Floats sums[kTileVectors];
  for (Floats& sum : sums) sum = hn::Zero(d);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t index = tile * groups + group;
    hwy::Prefetch(weight.scales[Level - 1] + (index + TilesAhead(Level)) * kTileRows * 2);
    const TileScales scales(weight.scales[Level - 1] + index * kTileRows * 2);
    const SlicedTile<Level> codes{weight.slices, index * kTileBytes};
    AddGroup<Level>(codes, scales, inputs, inputs.Index(group, token), sums);
  }
  for (size_t i = 0; i < kTileVectors; ++i) hn::StoreU(sums[i], d, out + i * kLanes);
}

// Several tokens against a row of tiles, the same sums in the same order: a tile's codes are joined
// once. sums: [num_tokens, kTileRows].
template <int Level>
HWY_NOINLINE void MultiplyTokens(const SlicedWeight& weight, int64_t tile,
                                 const RoundedInputs& inputs, const int16_t* tokens, int num_tokens,
                                 uint8_t* HWY_RESTRICT joined, float* HWY_RESTRICT all_sums) {
  const FloatTag d;
  const int64_t groups = weight.cols / kGroupSize;
  std::fill_n(all_sums, num_tokens * kTileRows, 0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t index = tile * groups + group;
    hwy::Prefetch(weight.scales[Level - 1] + (index + TilesAhead(Level)) * kTileRows * 2);
    const TileScales scales(weight.scales[Level - 1] + index * kTileRows * 2);
    const JoinedTile<Level> codes(joined, SlicedTile<Level>{weight.slices, index * kTileBytes});
    for (int t = 0; t < num_tokens; ++t) {
      float* at = all_sums + t * kTileRows;
      Floats sums[kTileVectors];
      for (size_t i = 0; i < kTileVectors; ++i) sums[i] = hn::Load(d, at + i * kLanes);
      AddGroup<Level>(codes, scales, inputs, inputs.Index(group, tokens[t]), sums);
      for (size_t i = 0; i < kTileVectors; ++i) hn::Store(sums[i], d, at + i * kLanes);
    }
  }
}

void RoundTokens(const SlicedJob& job, int64_t begin, int64_t end) {
  const RoundedInputs& inputs = job.inputs;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t group = 0; group < job.weight->cols / kGroupSize; ++group) {
      const size_t index = inputs.Index(group, t);
      inputs.scales[index] = RoundGroup(job.x.Row<float>(t) + group * kGroupSize,
                                        inputs.values + index * kGroupInputBytes);
    }
  }
}

// The tokens of one level of a segment against a row of tiles. scratch: a tile's joined codes, then
// the tokens' sums.
template <int Level>
void MultiplyLevel(const SlicedJob& job, int64_t tile, const int16_t* tokens, int num_tokens,
                   float* scratch) {
  const int64_t first_row = tile * kTileRows;
  if (num_tokens < kMinJoinedTokens) {
    for (int t = 0; t < num_tokens; ++t) {
      MultiplyOneToken<Level>(*job.weight, tile, job.inputs, tokens[t],
                              job.out.Row<float>(tokens[t]) + first_row);
    }
    return;
  }
  float* sums = scratch + kTileCodes / sizeof(float);
  MultiplyTokens<Level>(*job.weight, tile, job.inputs, tokens, num_tokens,
                        reinterpret_cast<uint8_t*>(scratch), sums);
  for (int t = 0; t < num_tokens; ++t) {
    std::copy_n(sums + t * kTileRows, kTileRows, job.out.Row<float>(tokens[t]) + first_row);
  }
}

void MultiplyTiles(const SlicedJob& job, int64_t begin, int64_t end, float* scratch) {
  int segment = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    while (tile * kTileRows >= job.weight->segment_end[segment]) ++segment;
    const int* first = job.order->begin[segment].data();
    const auto run = [&]<int Level>() HWY_ATTR {
      const int count = first[Level] - first[Level - 1];
      if (count == 0) return;
      const int16_t* tokens = job.order->token[segment].data() + first[Level - 1];
      MultiplyLevel<Level>(job, tile, tokens, count, scratch);
    };
    run.template operator()<1>();
    run.template operator()<2>();
    run.template operator()<3>();
    run.template operator()<4>();
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mobi::cpu {
namespace {

HWY_EXPORT(RoundTokens);
HWY_EXPORT(MultiplyTiles);

void SortByLevel(const uint8_t* levels, int64_t levels_stride, int num_segments, int num_tokens,
                 LevelOrder& order) {
  for (int s = 0; s < num_segments; ++s) {
    int count = 0;
    order.begin[s][0] = 0;
    for (int level = 1; level <= kNumLevels; ++level) {
      for (int t = 0; t < num_tokens; ++t) {
        if (levels[s * levels_stride + t] == level) {
          order.token[s][count++] = static_cast<int16_t>(t);
        }
      }
      order.begin[s][level] = count;
    }
  }
}

}  // namespace

void SlicedMatmul(ThreadPool& pool, Workspace& workspace, Tensor x, const SlicedWeight& weight,
                  const uint8_t* levels, int64_t levels_stride, Tensor out) {
  const int64_t most = std::min<int64_t>(x.rows, kMaxTokens);
  const int64_t groups = weight.cols / kGroupSize;
  const size_t value_floats = most * groups * kGroupInputBytes / sizeof(float);
  float* values =
      workspace.inputs(value_floats + most * groups * sizeof(GroupScale) / sizeof(float));
  workspace.ReservePerThread(kTileCodes / sizeof(float) + most * kTileRows);
  LevelOrder order;
  for (int64_t first = 0; first < x.rows; first += kMaxTokens) {
    const int64_t count = std::min<int64_t>(kMaxTokens, x.rows - first);
    SortByLevel(levels + first, levels_stride, weight.num_segments, static_cast<int>(count), order);
    const SlicedJob job{&weight,
                        &order,
                        x.Rows(first, count),
                        {reinterpret_cast<uint8_t*>(values),
                         reinterpret_cast<GroupScale*>(values + value_floats), count},
                        out.Rows(first, count)};
    pool.RunRanges(count, 1 + 32768 / weight.cols, [&](int64_t begin, int64_t end, int) {
      HWY_DYNAMIC_DISPATCH(RoundTokens)(job, begin, end);
    });
    const int64_t tiles = weight.rows / kTileRows;
    pool.RunRanges(tiles, 1, [&](int64_t begin, int64_t end, int thread) {
      HWY_DYNAMIC_DISPATCH(MultiplyTiles)(job, begin, end, workspace.of_thread(thread));
    });
  }
}

}  // namespace mobi::cpu
#endif  // HWY_ONCE
