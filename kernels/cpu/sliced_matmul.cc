#include "kernels/cpu/sliced_matmul.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstring>
#include <utility>

#include "hwy/cache_control.h"

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
// How far ahead of its use a tile is asked for where one token waits for memory: the streams of a
// weight are too many for the processor to foresee them all.
constexpr int64_t kTilesAhead = 8;
// Strides that are not a power of two spread rows over the sets of the cache.
constexpr int64_t kStridePadding = 16;
constexpr int64_t kChunkStride = kChunk + kStridePadding;

// The tokens of one pass, sorted by level for each segment.
struct LevelOrder {
  std::array<std::array<int16_t, kMaxTokens>, kMaxSegments> token;
  // Where each of them has its input in the order of the lanes.
  std::array<std::array<const float*, kMaxTokens>, kMaxSegments> input;
  // Tokens of level k of segment s are token[s][begin[s][k - 1] .. begin[s][k]).
  std::array<std::array<int, kNumLevels + 1>, kMaxSegments> begin;
};

struct SlicedJob {
  const SlicedWeight* weight;
  const LevelOrder* order;
  Tensor x;         // the tokens of this pass
  float* permuted;  // [num_tokens, stride] x in the order of the lanes
  int64_t stride;
  Tensor out;
};

// fraction[i]: what a code of `Level` reads as, see Fraction, where its bits are bits Sub and up of
// the index i and the other bits of i may be anything.
template <int Level, int Sub>
struct FractionTable {
  alignas(64) float fraction[16];
  constexpr FractionTable() : fraction() {
    for (int i = 0; i < 16; ++i) {
      const int code = (i >> Sub) & ((1 << BitsOfLevel(Level)) - 1);
      fraction[i] = 1.0f + (static_cast<float>(code) + 0.5f) / (1 << BitsOfLevel(Level));
    }
  }
};
template <int Level, int Sub>
inline constexpr FractionTable<Level, Sub> kFractions;

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

// Bits of yes where the mask has ones, of no elsewhere.
HWY_INLINE Words Select(Words mask, Words yes, Words no) {
#if HWY_TARGET == HWY_AVX3
  return hn::IfVecThenElse(mask, yes, no);  // one instruction; elsewhere it selects whole bytes
#else
  return hn::OrAnd(hn::AndNot(mask, no), mask, yes);
#endif
}

// Pairs of 2-bit fields a, b as 4-bit codes: even fields first, then odd ones.
HWY_INLINE Words JoinEven(Words a, Words b) {
  return Select(hn::Set(WordTag(), 0xCCCCCCCCu), hn::ShiftLeft<2>(a), b);
}
HWY_INLINE Words JoinOdd(Words a, Words b) {
  return Select(hn::Set(WordTag(), 0xCCCCCCCCu), a, hn::ShiftRight<2>(b));
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
    container[0] = Select(mask, hn::ShiftLeft<2>(even), w[2]);
    container[1] = Select(mask, hn::ShiftLeft<2>(odd), hn::ShiftRight<2>(w[2]));
    container[2] = Select(mask, hn::ShiftRight<2>(even), hn::ShiftRight<4>(w[2]));
    container[3] = Select(mask, hn::ShiftRight<2>(odd), hn::ShiftRight<6>(w[2]));
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
    container[0] = Select(mask, hn::ShiftLeft<4>(even), even_low);
    container[1] = Select(mask, hn::ShiftLeft<4>(odd), odd_low);
    container[2] = Select(mask, even, hn::ShiftRight<4>(even_low));
    container[3] = Select(mask, odd, hn::ShiftRight<4>(odd_low));
  }
};

// Where the code of column 2 Pair + Odd (of each word's eight) of row g + 8 Half lies.
template <int Level, int Pair, int Half, int Odd>
struct CodePosition {
  static constexpr int kField = kPairShift[Pair][Half] / 2 + 8 * Odd;
  static constexpr int kContainer = kField % Codes<Level>::kCount;
  static constexpr int kBit = kField / Codes<Level>::kCount * 2 * Codes<Level>::kCount;
};

template <int Right>
HWY_INLINE Words ShiftBy(Words words) {
  if constexpr (Right > 0) return hn::ShiftRight<Right>(words);
  if constexpr (Right < 0) return hn::ShiftLeft<-Right>(words);
  return words;
}

// A lookup in a table of as many floats as a vector has lanes, by the low bits of each word.
#if HWY_TARGET == HWY_AVX3
constexpr int kLookupBits = 4;
HWY_INLINE Floats Lookup(Floats table, Words index) {
  return Floats{_mm512_permutexvar_ps(index.raw, table.raw)};
}
#elif HWY_TARGET == HWY_AVX2
constexpr int kLookupBits = 3;
HWY_INLINE Floats Lookup(Floats table, Words index) {
  return Floats{_mm256_permutevar8x32_ps(table.raw, index.raw)};
}
#else
constexpr int kLookupBits = 0;
HWY_INLINE Floats Lookup(Floats table, Words) { return table; }
#endif

// The weights of one row of a line: range * fraction + base, see TileScales. Where a code fits the
// index of a lookup, the table holds the weights themselves; otherwise the code is moved to the top
// of a mantissa with exponent 0, followed by the half bit: 1 + (Q + 1/2) / 4^k, exactly.
template <int Level, int Half>
class RowWeights {
 public:
  HWY_INLINE RowWeights(float range, float base)
      : range_(hn::Set(FloatTag(), range)), base_(hn::Set(FloatTag(), base)) {
    if constexpr (kByLookup) {
      const auto fractions = hn::Load(FloatTag(), kFractions<Level, kSub>.fraction);
      table_ = hn::MulAdd(fractions, range_, base_);
    }
  }

  template <int Pair, int Odd>
  HWY_INLINE Floats Get(const Codes<Level>& codes) const {
    using At = CodePosition<Level, Pair, Half, Odd>;
    const Words container = codes.container[At::kContainer];
    if constexpr (kByLookup) {
      static_assert((At::kBit - kSub) % 2 == 0 && kSub + kBits <= kLookupBits);
      return Lookup(table_, ShiftBy<At::kBit - kSub>(container));
    } else {
      const WordTag d;
      const Words mask = hn::Set(d, ((1u << kBits) - 1) << (23 - kBits));
      const Words one_and_half_step = hn::Set(d, 0x3F800000u | 1u << (22 - kBits));
      const Words moved = ShiftBy<At::kBit + kBits - 23>(container);
      const Words fraction = hn::OrAnd(one_and_half_step, moved, mask);
      return hn::MulAdd(hn::BitCast(FloatTag(), fraction), range_, base_);
    }
  }

 private:
  static constexpr int kBits = BitsOfLevel(Level);
  static constexpr bool kByLookup = kBits <= kLookupBits;
  // Fields of the second row sit two bits above a multiple of four: looked up in place, they share
  // their shifts with the fields of the first row.
  static constexpr int kSub = Level == 1 && Half == 1 && kLookupBits == 4 ? 2 : 0;

  Floats range_, base_;
  Floats table_;
};

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
template <int Level, class Visit>
HWY_INLINE void VisitFields(const Codes<Level>& codes, const RowWeights<Level, 0>& row0,
                            const RowWeights<Level, 1>& row1, Visit& visit) {
  visit(0, row0.template Get<0, 0>(codes), row1.template Get<0, 0>(codes));
  visit(1, row0.template Get<0, 1>(codes), row1.template Get<0, 1>(codes));
  visit(2, row0.template Get<1, 0>(codes), row1.template Get<1, 0>(codes));
  visit(3, row0.template Get<1, 1>(codes), row1.template Get<1, 1>(codes));
  visit(4, row0.template Get<2, 0>(codes), row1.template Get<2, 0>(codes));
  visit(5, row0.template Get<2, 1>(codes), row1.template Get<2, 1>(codes));
  visit(6, row0.template Get<3, 0>(codes), row1.template Get<3, 0>(codes));
  visit(7, row0.template Get<3, 1>(codes), row1.template Get<3, 1>(codes));
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

// The visitor of the fused product: multiplies T tokens with the weights of two rows.
template <int T>
struct MultiplyTokens {
  const float* const* x;
  int64_t offset;  // of this part of a line
  Floats sum0[T], sum1[T];

  HWY_INLINE void LoadSums(const float* HWY_RESTRICT at) {
    const FloatTag d;
    for (int t = 0; t < T; ++t) {
      sum0[t] = hn::Load(d, at + t * kSumsPerToken);
      sum1[t] = hn::Load(d, at + t * kSumsPerToken + 8 * kLanes);
    }
  }
  HWY_INLINE void StoreSums(float* HWY_RESTRICT at) const {
    const FloatTag d;
    for (int t = 0; t < T; ++t) {
      hn::Store(sum0[t], d, at + t * kSumsPerToken);
      hn::Store(sum1[t], d, at + t * kSumsPerToken + 8 * kLanes);
    }
  }
  HWY_INLINE void operator()(int field, Floats w0, Floats w1) {
    const FloatTag d;
    for (int t = 0; t < T; ++t) {
      const Floats v = hn::Load(d, x[t] + offset + field * kLanes);
      sum0[t] = hn::MulAdd(w0, v, sum0[t]);
      sum1[t] = hn::MulAdd(w1, v, sum1[t]);
    }
  }
};

// Lines of a tile that one token is multiplied with at a time. Each is two chains of dependent
// sums; four lines fill the multipliers and share the input's loads, as far as registers go.
#if HWY_TARGET == HWY_AVX3
template <int Level>
constexpr size_t kLinesAtOnce = Level == 1 ? 4 : 2;
#else
template <int Level>
constexpr size_t kLinesAtOnce = 1;
#endif

// Some lines of a tile against a field of one token's input.
template <int Level, int Pair, int Odd, size_t Lines>
HWY_INLINE void MultiplyField(const RowWeights<Level, 0> (&row0)[Lines],
                              const RowWeights<Level, 1> (&row1)[Lines],
                              const Codes<Level> (&codes)[Lines], const float* HWY_RESTRICT x,
                              Floats (&sum0)[Lines], Floats (&sum1)[Lines]) {
  const Floats v = hn::Load(FloatTag(), x + (2 * Pair + Odd) * kLanes);
  for (size_t i = 0; i < Lines; ++i) {
    sum0[i] = hn::MulAdd(row0[i].template Get<Pair, Odd>(codes[i]), v, sum0[i]);
    sum1[i] = hn::MulAdd(row1[i].template Get<Pair, Odd>(codes[i]), v, sum1[i]);
  }
}

// Lines g + I of the tile at byte `at` of each slice against one group of one token's input.
template <int Level, size_t... I>
HWY_INLINE void MultiplyLines(const SlicedWeight& weight, const TileScales& scales, size_t at,
                              size_t g, const float* HWY_RESTRICT x, float* HWY_RESTRICT sums,
                              std::index_sequence<I...>) {
  const FloatTag d;
  const RowWeights<Level, 0> row0[] = {
      RowWeights<Level, 0>(scales.range[g + I], scales.base[g + I])...};
  const RowWeights<Level, 1> row1[] = {
      RowWeights<Level, 1>(scales.range[g + I + 8], scales.base[g + I + 8])...};
  Floats sum0[] = {hn::Load(d, sums + (g + I) * kLanes)...};
  Floats sum1[] = {hn::Load(d, sums + (g + I + 8) * kLanes)...};
  for (size_t part = 0; part < kPartsOfLine; ++part, x += kFieldsOfWord * kLanes) {
    const Codes<Level> codes[] = {
        LoadCodes<Level>(weight.slices, at + ((g + I) * kLineWords + part * kLanes) * 4)...};
    MultiplyField<Level, 0, 0>(row0, row1, codes, x, sum0, sum1);
    MultiplyField<Level, 0, 1>(row0, row1, codes, x, sum0, sum1);
    MultiplyField<Level, 1, 0>(row0, row1, codes, x, sum0, sum1);
    MultiplyField<Level, 1, 1>(row0, row1, codes, x, sum0, sum1);
    MultiplyField<Level, 2, 0>(row0, row1, codes, x, sum0, sum1);
    MultiplyField<Level, 2, 1>(row0, row1, codes, x, sum0, sum1);
    MultiplyField<Level, 3, 0>(row0, row1, codes, x, sum0, sum1);
    MultiplyField<Level, 3, 1>(row0, row1, codes, x, sum0, sum1);
  }
  (hn::Store(sum0[I], d, sums + (g + I) * kLanes), ...);
  (hn::Store(sum1[I], d, sums + (g + I + 8) * kLanes), ...);
}

// One token against one tile of rows, the same sums in the same order as DotTile.
template <int Level>
HWY_NOINLINE void DotTileOneToken(const SlicedWeight& weight, int64_t tile,
                                  const float* HWY_RESTRICT x, float* HWY_RESTRICT sums) {
  constexpr size_t kLines = kLinesAtOnce<Level>;
  const int64_t groups = weight.cols / kGroupSize;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t index = tile * groups + group;
    const TileScales scales(weight.scales[Level - 1] + index * kTileRows * 2);
    hwy::Prefetch(weight.scales[Level - 1] + (index + kTilesAhead) * kTileRows * 2);
    for (size_t g = 0; g < kTileRows / 2; g += kLines) {
      const size_t ahead = (index + kTilesAhead) * kTileBytes + g * kLineWords * 4;
      for (int s = 0; s < Level; ++s) {
        for (size_t i = 0; i < kLines; ++i) {
          hwy::Prefetch(weight.slices[s] + ahead + i * kLineWords * 4);
        }
      }
      MultiplyLines<Level>(weight, scales, index * kTileBytes, g, x + group * kGroupSize, sums,
                           std::make_index_sequence<kLines>());
    }
  }
}

// T tokens against one tile of rows: the weights never leave the registers.
template <int Level, int T>
HWY_NOINLINE void DotTile(const SlicedWeight& weight, int64_t tile, const float* const* x,
                          float* HWY_RESTRICT sums) {
  const int64_t groups = weight.cols / kGroupSize;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t index = tile * groups + group;
    const TileScales scales(weight.scales[Level - 1] + index * kTileRows * 2);
    for (size_t g = 0; g < kTileRows / 2; ++g) {
      const RowWeights<Level, 0> row0(scales.range[g], scales.base[g]);
      const RowWeights<Level, 1> row1(scales.range[g + 8], scales.base[g + 8]);
      MultiplyTokens<T> multiply{x, group * kGroupSize, {}, {}};
      multiply.LoadSums(sums + g * kLanes);
      for (size_t part = 0; part < kPartsOfLine; ++part) {
        const auto codes = LoadCodes<Level>(
            weight.slices, index * kTileBytes + (g * kLineWords + part * kLanes) * 4);
        VisitFields<Level>(codes, row0, row1, multiply);
        multiply.offset += kFieldsOfWord * kLanes;
      }
      multiply.StoreSums(sums + g * kLanes);
    }
  }
}

// The visitor that writes weights out.
struct StoreRows {
  float* HWY_RESTRICT row0;

  HWY_INLINE void operator()(int field, Floats w0, Floats w1) {
    const FloatTag d;
    hn::Store(w0, d, row0 + field * kLanes);
    hn::Store(w1, d, row0 + 8 * kChunkStride + field * kLanes);
  }
};

// Groups [begin, begin + count) of a tile as floats in the order of the lanes, 16 rows kChunkStride
// apart.
template <int Level>
HWY_NOINLINE void DequantizeChunk(const SlicedWeight& weight, int64_t tile, int64_t begin,
                                  int64_t count, float* HWY_RESTRICT rows) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = tile * (weight.cols / kGroupSize) + begin + i;
    const TileScales scales(weight.scales[Level - 1] + index * kTileRows * 2);
    for (size_t g = 0; g < kTileRows / 2; ++g) {
      const RowWeights<Level, 0> row0(scales.range[g], scales.base[g]);
      const RowWeights<Level, 1> row1(scales.range[g + 8], scales.base[g + 8]);
      StoreRows store{rows + g * kChunkStride + i * kGroupSize};
      for (size_t part = 0; part < kPartsOfLine; ++part) {
        const auto codes = LoadCodes<Level>(
            weight.slices, index * kTileBytes + (g * kLineWords + part * kLanes) * 4);
        VisitFields<Level>(codes, row0, row1, store);
        store.row0 += kFieldsOfWord * kLanes;
      }
    }
  }
}

// Tokens of one level against one tile; x[t] is token t's input in the order of the lanes.
// scratch: 16 rows of weights, then the sums.
template <int Level>
float* TileAtLevel(const SlicedWeight& weight, int64_t tile, const float* const* x, int num_tokens,
                   float* scratch) {
  float* sums = scratch + kTileRows * kChunkStride;
  ZeroSums(sums, num_tokens);
  if (num_tokens == 1) {
    DotTileOneToken<Level>(weight, tile, x[0], sums);
  } else if (num_tokens == 2) {
    DotTile<Level, 2>(weight, tile, x, sums);
  } else if (num_tokens == 3) {
    DotTile<Level, 3>(weight, tile, x, sums);
  } else if (num_tokens == 4) {
    DotTile<Level, 4>(weight, tile, x, sums);
  } else {
    const int64_t groups = weight.cols / kGroupSize;
    for (int64_t begin = 0; begin < groups; begin += kChunkGroups) {
      const int64_t count = std::min(kChunkGroups, groups - begin);
      DequantizeChunk<Level>(weight, tile, begin, count, scratch);
      DotBlock(scratch, kChunkStride, x, begin * kGroupSize, num_tokens, count * kGroupSize, sums);
    }
  }
  return sums;
}

size_t ScratchFloats(int num_tokens) {
  return kTileRows * kChunkStride + num_tokens * kSumsPerToken;
}

void PermuteTokens(const SlicedJob& job, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t c = 0; c < job.weight->cols; c += kGroupSize) {
      PermuteGroup(job.x.Row<float>(t) + c, job.permuted + t * job.stride + c);
    }
  }
}

void MultiplyTiles(const SlicedJob& job, int64_t begin, int64_t end, float* scratch) {
  const SlicedWeight& weight = *job.weight;
  int segment = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    while (tile * kTileRows >= weight.segment_end[segment]) ++segment;
    const int* first = job.order->begin[segment].data();
    const auto run = [&]<int Level>() HWY_ATTR {
      const int count = first[Level] - first[Level - 1];
      if (count == 0) return;
      const int16_t* tokens = job.order->token[segment].data() + first[Level - 1];
      const float* const* x = job.order->input[segment].data() + first[Level - 1];
      const float* sums = TileAtLevel<Level>(weight, tile, x, count, scratch);
      for (int t = 0; t < count; ++t) {
        ReduceBlock(sums + t * kSumsPerToken, job.out.Row<float>(tokens[t]) + tile * kTileRows);
      }
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

void SortByLevel(const uint8_t* levels, int64_t levels_stride, int num_segments, int num_tokens,
                 const float* inputs, int64_t input_stride, LevelOrder& order) {
  for (int s = 0; s < num_segments; ++s) {
    int count = 0;
    order.begin[s][0] = 0;
    for (int level = 1; level <= kNumLevels; ++level) {
      for (int t = 0; t < num_tokens; ++t) {
        if (levels[s * levels_stride + t] == level) {
          order.input[s][count] = inputs + t * input_stride;
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
  const int64_t stride = weight.cols + kStridePadding;
  float* inputs = workspace.inputs(most * stride);
  workspace.ReservePerThread(HWY_DYNAMIC_DISPATCH(ScratchFloats)(most));
  LevelOrder order;
  for (int64_t first = 0; first < x.rows; first += kMaxTokens) {
    const int64_t count = std::min<int64_t>(kMaxTokens, x.rows - first);
    SortByLevel(levels + first, levels_stride, weight.num_segments, static_cast<int>(count), inputs,
                stride, order);
    const SlicedJob job{&weight, &order, x.Rows(first, count),
                        inputs,  stride, out.Rows(first, count)};
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
