#include "kernels/cpu/sliced_matmul.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sliced_matmul.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/dot-inl.h"

#ifndef MOBI_KERNELS_CPU_SLICED_MATMUL_CC_ONCE_
#define MOBI_KERNELS_CPU_SLICED_MATMUL_CC_ONCE_
namespace mobi::cpu {

// Tokens worked on in one pass; a longer batch takes several.
constexpr int kMaxTokens = 256;
// Columns dequantized at a time: 16 rows of them and the inputs of four tokens stay in the first
// level cache.
constexpr int64_t kChunkGroups = 4;
constexpr int64_t kChunk = kChunkGroups * kGroupSize;

// The tokens of one pass, sorted by level for each segment.
struct LevelOrder {
  int num_tokens = 0;
  std::array<std::array<int16_t, kMaxTokens>, kMaxSegments> token;
  // Tokens of level k of segment s are token[s][begin[s][k - 1] .. begin[s][k]).
  std::array<std::array<int, kNumLevels + 1>, kMaxSegments> begin;
};

struct SlicedJob {
  const SlicedWeight* weight;
  const LevelOrder* order;
  Tensor x;         // the tokens of this pass
  float* permuted;  // [num_tokens, cols] x in the order of the lanes
  Tensor out;
};

}  // namespace mobi::cpu
#endif  // MOBI_KERNELS_CPU_SLICED_MATMUL_CC_ONCE_

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

using WordTag = hn::Rebind<uint32_t, FloatTag>;
using Words = hn::Vec<WordTag>;
using Floats = hn::Vec<FloatTag>;

// A line is 64 bytes of a tile: 16 words with all columns of rows g and g + 8; word i has columns
// 8 i .. 8 i + 7. A part of a line is as many words as a vector has lanes; with its 8 fields per
// row it covers the columns of kLanes words, 8 vectors.
constexpr size_t kLineWords = 16;
constexpr size_t kPartsOfLine = kLineWords / kLanes;
constexpr size_t kFieldsOfWord = 8;  // per row

// Column order of the lanes: [group][part][field][lane] holds column 8 (part kLanes + lane) +
// field.
HWY_INLINE void PermuteGroup(const float* HWY_RESTRICT x, float* HWY_RESTRICT permuted) {
  for (size_t part = 0; part < kPartsOfLine; ++part) {
    for (size_t field = 0; field < kFieldsOfWord; ++field) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        *permuted++ = x[kFieldsOfWord * (part * kLanes + lane) + field];
      }
    }
  }
}

// The codes of a level, joined from the slices. A 2-bit field of a slice has number n at bit 2 n;
// its code is in container n % count, at bit (n / count) * 2 count, in the low `BitsOfLevel` bits
// of as many as 2 count; the bits above a 6-bit code are not cleared.
template <int Level>
struct Codes;

template <>
struct Codes<1> {
  static constexpr int kCount = 1;
  Words container[kCount];
  HWY_INLINE explicit Codes(const Words (&w)[1]) : container{w[0]} {}
};

// Pairs of 2-bit fields a, b as 4-bit codes: even fields first, then odd ones.
HWY_INLINE Words JoinEven(Words a, Words b) {
  return hn::IfVecThenElse(hn::Set(WordTag(), 0xCCCCCCCCu), hn::ShiftLeft<2>(a), b);
}
HWY_INLINE Words JoinOdd(Words a, Words b) {
  return hn::IfVecThenElse(hn::Set(WordTag(), 0xCCCCCCCCu), a, hn::ShiftRight<2>(b));
}

template <>
struct Codes<2> {
  static constexpr int kCount = 2;
  Words container[kCount];
  HWY_INLINE explicit Codes(const Words (&w)[2])
      : container{JoinEven(w[0], w[1]), JoinOdd(w[0], w[1])} {}
};

template <>
struct Codes<3> {
  static constexpr int kCount = 4;
  Words container[kCount];
  HWY_INLINE explicit Codes(const Words (&w)[3]) {
    const Words mask = hn::Set(WordTag(), 0xFCFCFCFCu);
    const Words even = JoinEven(w[0], w[1]), odd = JoinOdd(w[0], w[1]);
    container[0] = hn::IfVecThenElse(mask, hn::ShiftLeft<2>(even), w[2]);
    container[1] = hn::IfVecThenElse(mask, hn::ShiftLeft<2>(odd), hn::ShiftRight<2>(w[2]));
    container[2] = hn::IfVecThenElse(mask, hn::ShiftRight<2>(even), hn::ShiftRight<4>(w[2]));
    container[3] = hn::IfVecThenElse(mask, hn::ShiftRight<2>(odd), hn::ShiftRight<6>(w[2]));
  }
};

template <>
struct Codes<4> {
  static constexpr int kCount = 4;
  Words container[kCount];
  HWY_INLINE explicit Codes(const Words (&w)[4]) {
    const Words mask = hn::Set(WordTag(), 0xF0F0F0F0u);
    const Words even = JoinEven(w[0], w[1]), odd = JoinOdd(w[0], w[1]);
    const Words even_low = JoinEven(w[2], w[3]), odd_low = JoinOdd(w[2], w[3]);
    container[0] = hn::IfVecThenElse(mask, hn::ShiftLeft<4>(even), even_low);
    container[1] = hn::IfVecThenElse(mask, hn::ShiftLeft<4>(odd), odd_low);
    container[2] = hn::IfVecThenElse(mask, even, hn::ShiftRight<4>(even_low));
    container[3] = hn::IfVecThenElse(mask, odd, hn::ShiftRight<4>(odd_low));
  }
};

// The code of column 2 Pair + Odd (of each word's eight) of row g + 8 Half as 1 + (Q + 1/2) / 4^k,
// exactly: the code is moved to the top of a mantissa with exponent 0, the half bit follows it.
template <int Level, int Pair, int Half, int Odd>
HWY_INLINE Floats Fraction(const Codes<Level>& codes) {
  constexpr int kCount = Codes<Level>::kCount, kBits = BitsOfLevel(Level);
  constexpr int kField = kPairShift[Pair][Half] / 2 + 8 * Odd;
  constexpr int kLeft = 23 - kBits - kField / kCount * 2 * kCount;
  constexpr uint32_t kMask = ((1u << kBits) - 1) << (23 - kBits);
  constexpr uint32_t kOneAndHalf = 0x3F800000u | 1u << (22 - kBits);
  const WordTag d;
  Words moved = codes.container[kField % kCount];
  if constexpr (kLeft > 0) moved = hn::ShiftLeft<kLeft>(moved);
  if constexpr (kLeft < 0) moved = hn::ShiftRight<-kLeft>(moved);
  return hn::BitCast(FloatTag(), hn::OrAnd(hn::Set(d, kOneAndHalf), moved, hn::Set(d, kMask)));
}

template <int Level>
HWY_INLINE Codes<Level> LoadCodes(const std::array<const uint8_t*, kNumSlices>& slices,
                                  size_t byte) {
  const WordTag d;
  const auto load = [&](int s) HWY_ATTR {
    return hn::LoadU(d, reinterpret_cast<const uint32_t*>(slices[s] + byte));
  };
  if constexpr (Level == 1) {
    return Codes<1>({load(0)});
  } else if constexpr (Level == 2) {
    return Codes<2>({load(0), load(1)});
  } else if constexpr (Level == 3) {
    return Codes<3>({load(0), load(1), load(2)});
  } else {
    return Codes<4>({load(0), load(1), load(2), load(3)});
  }
}

// Calls visit(field, weights of row g, weights of row g + 8) for the 8 fields of a part of a line.
// W = range * fraction + base, see TileScales.
template <int Level, class Visit>
HWY_INLINE void VisitFields(const Codes<Level>& codes, const float* range, const float* base,
                            const Visit& visit) {
  const FloatTag d;
  const Floats range0 = hn::Set(d, range[0]), base0 = hn::Set(d, base[0]);
  const Floats range1 = hn::Set(d, range[8]), base1 = hn::Set(d, base[8]);
  const auto field = [&]<int Pair, int Odd>() HWY_ATTR {
    visit(2 * Pair + Odd, hn::MulAdd(Fraction<Level, Pair, 0, Odd>(codes), range0, base0),
          hn::MulAdd(Fraction<Level, Pair, 1, Odd>(codes), range1, base1));
  };
  field.template operator()<0, 0>();
  field.template operator()<0, 1>();
  field.template operator()<1, 0>();
  field.template operator()<1, 1>();
  field.template operator()<2, 0>();
  field.template operator()<2, 1>();
  field.template operator()<3, 0>();
  field.template operator()<3, 1>();
}

// range and base of the 16 rows of a tile: fraction is 1 too large, so base = offset - range.
struct TileScales {
  HWY_ALIGN float range[kTileRows];
  HWY_ALIGN float base[kTileRows];

  HWY_INLINE explicit TileScales(const uint16_t* HWY_RESTRICT pairs) {
    const FloatTag d;
    const hn::Rebind<hwy::float16_t, FloatTag> half;
    const hn::Rebind<uint16_t, FloatTag> d16;
    for (size_t row = 0; row < kTileRows; row += kLanes) {
      hn::Vec<decltype(d16)> low, high;
      hn::LoadInterleaved2(d16, pairs + 2 * row, low, high);
      const Floats r = hn::PromoteTo(d, hn::BitCast(half, low));
      const Floats offset = hn::PromoteTo(d, hn::BitCast(half, high));
      hn::Store(r, d, range + row);
      hn::Store(hn::Sub(offset, r), d, base + row);
    }
  }
};

// One token against one tile of rows: the weights never leave the registers.
template <int Level>
void DotTile(const SlicedWeight& weight, int64_t tile, const float* HWY_RESTRICT x,
             float* HWY_RESTRICT sums) {
  const FloatTag d;
  const int64_t groups = weight.cols / kGroupSize;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t index = tile * groups + group;
    const TileScales scales(weight.scales[Level - 1] + index * kTileRows * 2);
    const float* HWY_RESTRICT x_group = x + group * kGroupSize;
    for (size_t g = 0; g < kTileRows / 2; ++g) {
      float* sums0 = sums + g * kLanes;
      float* sums1 = sums + (g + 8) * kLanes;
      Floats sum0 = hn::Load(d, sums0), sum1 = hn::Load(d, sums1);
      for (size_t part = 0; part < kPartsOfLine; ++part) {
        const auto codes = LoadCodes<Level>(
            weight.slices, index * kTileBytes + g * kLineWords * 4 + part * kLanes * 4);
        const float* x_part = x_group + part * kFieldsOfWord * kLanes;
        VisitFields<Level>(codes, scales.range + g, scales.base + g,
                           [&](int field, Floats w0, Floats w1) HWY_ATTR {
                             const Floats v = hn::Load(d, x_part + field * kLanes);
                             sum0 = hn::MulAdd(w0, v, sum0);
                             sum1 = hn::MulAdd(w1, v, sum1);
                           });
      }
      hn::Store(sum0, d, sums0);
      hn::Store(sum1, d, sums1);
    }
  }
}

// Groups [begin, begin + count) of a tile as floats in the order of the lanes: rows[16][kChunk].
template <int Level>
void DequantizeChunk(const SlicedWeight& weight, int64_t tile, int64_t begin, int64_t count,
                     float* HWY_RESTRICT rows) {
  const FloatTag d;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = tile * (weight.cols / kGroupSize) + begin + i;
    const TileScales scales(weight.scales[Level - 1] + index * kTileRows * 2);
    for (size_t g = 0; g < kTileRows / 2; ++g) {
      for (size_t part = 0; part < kPartsOfLine; ++part) {
        const auto codes = LoadCodes<Level>(
            weight.slices, index * kTileBytes + g * kLineWords * 4 + part * kLanes * 4);
        float* row0 = rows + g * kChunk + i * kGroupSize + part * kFieldsOfWord * kLanes;
        VisitFields<Level>(codes, scales.range + g, scales.base + g,
                           [&](int field, Floats w0, Floats w1) HWY_ATTR {
                             hn::Store(w0, d, row0 + field * kLanes);
                             hn::Store(w1, d, row0 + 8 * kChunk + field * kLanes);
                           });
      }
    }
  }
}

// The tokens of one level against one tile. scratch: 16 x kChunk weights, then the sums.
template <int Level>
void TileAtLevel(const SlicedJob& job, int64_t tile, const int16_t* tokens, int num_tokens,
                 float* scratch) {
  const SlicedWeight& weight = *job.weight;
  float* sums = scratch + kTileRows * kChunk;
  ZeroSums(sums, num_tokens);
  if (num_tokens == 1) {
    DotTile<Level>(weight, tile, job.permuted + tokens[0] * weight.cols, sums);
  } else {
    const int64_t groups = weight.cols / kGroupSize;
    for (int64_t begin = 0; begin < groups; begin += kChunkGroups) {
      const int64_t count = std::min(kChunkGroups, groups - begin);
      const float* x[kMaxTokens];
      for (int t = 0; t < num_tokens; ++t) {
        x[t] = job.permuted + tokens[t] * weight.cols + begin * kGroupSize;
      }
      DequantizeChunk<Level>(weight, tile, begin, count, scratch);
      DotBlock(scratch, kChunk, x, num_tokens, count * kGroupSize, sums);
    }
  }
  for (int t = 0; t < num_tokens; ++t) {
    ReduceBlock(sums + t * kSumsPerToken, job.out.Row<float>(tokens[t]) + tile * kTileRows);
  }
}

size_t ScratchFloats(int num_tokens) { return kTileRows * kChunk + num_tokens * kSumsPerToken; }

void PermuteTokens(const SlicedJob& job, int64_t begin, int64_t end) {
  const int64_t cols = job.weight->cols;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t c = 0; c < cols; c += kGroupSize) {
      PermuteGroup(job.x.Row<float>(t) + c, job.permuted + t * cols + c);
    }
  }
}

void MultiplyTiles(const SlicedJob& job, int64_t begin, int64_t end, float* scratch) {
  const SlicedWeight& weight = *job.weight;
  int segment = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    while (tile * kTileRows >= weight.segment_end[segment]) ++segment;
    const auto& first = job.order->begin[segment];
    const int16_t* tokens = job.order->token[segment].data();
    const auto run = [&]<int Level>() HWY_ATTR {
      const int count = first[Level] - first[Level - 1];
      if (count > 0) TileAtLevel<Level>(job, tile, tokens + first[Level - 1], count, scratch);
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

HWY_EXPORT(ScratchFloats);
HWY_EXPORT(PermuteTokens);
HWY_EXPORT(MultiplyTiles);

void SortByLevel(const SlicedWeight& weight, const uint8_t* levels, int64_t levels_stride,
                 int num_tokens, LevelOrder& order) {
  order.num_tokens = num_tokens;
  for (int s = 0; s < weight.num_segments; ++s) {
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
  const auto most = static_cast<int>(std::min<int64_t>(x.rows, kMaxTokens));
  workspace.Reserve(most * weight.cols, HWY_DYNAMIC_DISPATCH(ScratchFloats)(most));
  LevelOrder order;
  for (int64_t first = 0; first < x.rows; first += kMaxTokens) {
    const int64_t count = std::min<int64_t>(kMaxTokens, x.rows - first);
    SortByLevel(weight, levels + first, levels_stride, static_cast<int>(count), order);
    const SlicedJob job{&weight, &order, x.Rows(first, count), workspace.shared(),
                        out.Rows(first, count)};
    pool.RunRanges(count, 1 + 32768 / weight.cols, [&](int64_t begin, int64_t end, int) {
      HWY_DYNAMIC_DISPATCH(PermuteTokens)(job, begin, end);
    });
    const int64_t tiles = weight.rows / kTileRows;
    pool.RunRanges(tiles, 1, [&](int64_t begin, int64_t end, int thread) {
      HWY_DYNAMIC_DISPATCH(MultiplyTiles)(job, begin, end, workspace.of_thread(thread));
    });
  }
}

}  // namespace mobi::cpu
#endif  // HWY_ONCE
