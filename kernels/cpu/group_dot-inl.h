// Products of a tile of codes with one group of a token's inputs, in integers: exact, hence the
// same on every SIMD target and in any order. Compiled once per SIMD target.
//
// A group of 128 inputs is rounded once to x = scale * n, n whole and within +-32639. That moves an
// input by at most 1.6e-5 of the group's largest; 16-bit floats, which the CUDA backend takes, move
// it by up to 4.9e-4 of itself. A row's product is below 128 * 255 * 32639 < 2^30.
// Included by *.cc through foreach_target; no include guard of the usual kind on purpose.
#if defined(MOBI_KERNELS_CPU_GROUP_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBI_KERNELS_CPU_GROUP_DOT_INL_H_
#undef MOBI_KERNELS_CPU_GROUP_DOT_INL_H_
#else
#define MOBI_KERNELS_CPU_GROUP_DOT_INL_H_
#endif

#include <bit>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/bit_slice.h"
#include "kernels/cpu/slice_codes-inl.h"

#ifndef MOBI_KERNELS_CPU_GROUP_DOT_INL_H_ONCE_
#define MOBI_KERNELS_CPU_GROUP_DOT_INL_H_ONCE_
namespace mobi::cpu {

// One group of one token: its inputs are scale * n.
struct GroupScale {
  float scale;
  int32_t sum;  // of n
};
constexpr size_t kGroupInputBytes = kGroupSize * sizeof(int16_t);  // as they are kept

}  // namespace mobi::cpu
#endif  // MOBI_KERNELS_CPU_GROUP_DOT_INL_H_ONCE_

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

using IntTag = hn::Rebind<int32_t, FloatTag>;
using Ints = hn::Vec<IntTag>;
using Floats = hn::Vec<FloatTag>;
using WordPairTag = hn::Repartition<uint16_t, WordTag>;

// Where one instruction sums four products of unsigned with signed bytes (AVX-512 VNNI), inputs are
// split into bytes: n = 256 high + low, both signed. Elsewhere codes are widened to 16 bits.
#undef MOBI_BYTE_PRODUCTS
#if HWY_TARGET == HWY_AVX3_DL
#define MOBI_BYTE_PRODUCTS 1
static_assert(kPartsOfLine == 1);
#else
#define MOBI_BYTE_PRODUCTS 0
#endif

// The inputs of four columns of each word of a part. By bytes: high and low bytes of the inputs, in
// the order of the codes. By 16 bits: inputs of the codes in even bytes, then in odd ones.
struct Inputs {
  Words first, second;
};
constexpr size_t kPartInputBytes = kGroupInputBytes / kPartsOfLine;

// From pairs of columns, 16 bits each.
HWY_INLINE Inputs ArrangeInputs(Words even_bytes, Words odd_bytes) {
#if MOBI_BYTE_PRODUCTS
  const Words odd = hn::Set(WordTag(), 0xFF00FF00u);
  const WordPairTag d16;
  const auto rounded = [&](Words n) HWY_ATTR {  // to multiples of 256: what is left is signed
    return hn::BitCast(WordTag(), hn::Add(hn::BitCast(d16, n), hn::Set(d16, 128)));
  };
  return {Select(odd, rounded(odd_bytes), hn::ShiftRight<8>(rounded(even_bytes))),
          Select(odd, hn::ShiftLeft<8>(odd_bytes), even_bytes)};
#else
  return {even_bytes, odd_bytes};
#endif
}

// The same inputs for codes whose neighbouring bytes are swapped.
HWY_INLINE Inputs SwapNeighbours(const Inputs& x) {
#if MOBI_BYTE_PRODUCTS
  const WordPairTag d16;
  const auto swap = [&](Words bytes) HWY_ATTR {
    const auto pairs = hn::BitCast(d16, bytes);
    return hn::BitCast(WordTag(), hn::Or(hn::ShiftLeft<8>(pairs), hn::ShiftRight<8>(pairs)));
  };
  return {swap(x.first), swap(x.second)};
#else
  return {x.second, x.first};
#endif
}

// sum, and in each lane products of a word's codes with its inputs: of two sets of four columns. A
// product may be in another lane of the same row; only sums over all lanes have a meaning.
HWY_INLINE Ints AddProducts(Ints sum, const Words (&codes)[2], const Inputs& x0, const Inputs& x1) {
  const IntTag d;
#if MOBI_BYTE_PRODUCTS
  const auto add = [](Ints to, Words unsigned_bytes, Words signed_bytes) HWY_ATTR {
    // Not the intrinsic: Highway 1.0 compiles this target for a processor without VNNI, though it
    // runs it only on one with it.
    asm("vpdpbusd %2, %1, %0" : "+v"(to.raw) : "v"(unsigned_bytes.raw), "vm"(signed_bytes.raw));
    return to;
  };
  const Ints high = add(add(hn::Zero(d), codes[0], x0.first), codes[1], x1.first);
  const Ints low = add(add(hn::ShiftLeft<8>(high), codes[0], x0.second), codes[1], x1.second);
  return hn::Add(sum, low);
#elif HWY_TARGET == HWY_SCALAR
  const Inputs* x[] = {&x0, &x1};
  int32_t product = 0;
  for (int i = 0; i < 2; ++i) {
    for (int byte = 0; byte < 4; ++byte) {
      const uint32_t pair = hn::GetLane(byte % 2 == 0 ? x[i]->first : x[i]->second);
      const auto n = static_cast<int16_t>(pair >> (byte / 2 * 16));
      product += n * static_cast<int32_t>(hn::GetLane(codes[i]) >> (8 * byte) & 0xFF);
    }
  }
  return hn::Add(sum, hn::Set(d, product));
#else
  const hn::Repartition<int16_t, WordTag> d16;
  Ints other = hn::Zero(d);  // some machines spread a product's halves over two vectors
  const auto add = [&](Words pairs, Words inputs) HWY_ATTR {
    sum = hn::ReorderWidenMulAccumulate(d, hn::BitCast(d16, pairs), hn::BitCast(d16, inputs), sum,
                                        other);
  };
  const Words even = hn::Set(WordTag(), 0x00FF00FFu);
  const auto odd = [](Words w) HWY_ATTR {
    return hn::BitCast(WordTag(), hn::ShiftRight<8>(hn::BitCast(WordPairTag(), w)));
  };
  add(hn::And(codes[0], even), x0.first);
  add(odd(codes[0]), x0.second);
  add(hn::And(codes[1], even), x1.first);
  add(odd(codes[1]), x1.second);
  return hn::Add(sum, other);
#endif
}

// Rounds a group, and writes kGroupInputBytes of Inputs: for each part those of the columns
// 4 0 5 1 of all words (slice_codes-inl.h), then those of 2 6 3 7. A NaN or an infinity among x
// makes the scale one, so that nothing computed with it is finite.
HWY_INLINE GroupScale RoundGroup(const float* HWY_RESTRICT x, uint8_t* HWY_RESTRICT inputs) {
  constexpr float kLargest = 32639;  // 127 * 256 + 127
  constexpr float kTiny = 1e-30f;    // smaller groups lose bits, but no division overflows
  const FloatTag d;
  const IntTag di;
  // Bits of floats above 0 order as the floats do, with NaN on top.
  Ints bits = hn::BitCast(di, hn::Set(d, kTiny));
  for (size_t i = 0; i < kGroupSize; i += kLanes) {
    bits = hn::Max(bits, hn::BitCast(di, hn::Abs(hn::LoadU(d, x + i))));
  }
  const auto largest = std::bit_cast<float>(hn::GetLane(hn::MaxOfLanes(di, bits)));

  const hn::Rebind<int16_t, FloatTag> d16;
  HWY_ALIGN int16_t n[kGroupSize];
  const Floats inverse = hn::Set(d, kLargest / largest);
  Ints sum = hn::Zero(di);
  for (size_t i = 0; i < kGroupSize; i += kLanes) {
    const auto rounded = hn::DemoteTo(d16, hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), inverse)));
    hn::Store(rounded, d16, n + i);
    sum = hn::Add(sum, hn::PromoteTo(di, rounded));
  }

  const WordTag dw;
  for (size_t part = 0; part < kPartsOfLine; ++part) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(n) + part * 4 * kLanes;
    auto* to = reinterpret_cast<uint32_t*>(inputs + part * kPartInputBytes);
    Words pair0, pair1, pair2, pair3;  // columns 0 1, 2 3, 4 5, 6 7 of each word
    hn::LoadInterleaved4(dw, pairs, pair0, pair1, pair2, pair3);
    const Inputs x0 = ArrangeInputs(pair2, pair0), x1 = ArrangeInputs(pair1, pair3);
    hn::Store(x0.first, dw, to);
    hn::Store(x0.second, dw, to + kLanes);
    hn::Store(x1.first, dw, to + 2 * kLanes);
    hn::Store(x1.second, dw, to + 3 * kLanes);
  }
  return {largest / kLargest, hn::GetLane(hn::SumOfLanes(di, sum))};
}

// Products of rows g (lower) and g + 8 (upper) of a line with a group.
struct LineProducts {
  Ints lower, upper;
};
template <class Tile>
HWY_INLINE LineProducts MultiplyLine(const Tile& tile, size_t line, const uint8_t* inputs) {
  const IntTag d;
  LineProducts sums{hn::Zero(d), hn::Zero(d)};
  for (size_t part = 0; part < kPartsOfLine; ++part) {
    const auto* at = reinterpret_cast<const uint32_t*>(inputs + part * kPartInputBytes);
    const auto load = [&](size_t i) HWY_ATTR { return hn::Load(WordTag(), at + i * kLanes); };
    const Inputs x0{load(0), load(1)}, x1{load(2), load(3)};
    const CodeBytes codes = tile.Get(line, part);
    sums.lower = AddProducts(sums.lower, codes.lower, x0, x1);
    sums.upper = AddProducts(sums.upper, codes.upper, SwapNeighbours(x0), x1);
  }
  return sums;
}

// Sums of upper rows, whose codes lay shifted in their bytes, so they are whole multiples.
template <class Tile>
HWY_INLINE Ints Unshift(Ints upper) {
  if constexpr (Tile::kUpperShift == 0) {
    return upper;
  } else {
    return hn::ShiftRight<Tile::kUpperShift>(upper);
  }
}

constexpr size_t kTileVectors = kTileRows / kLanes;

#if HWY_TARGET == HWY_SCALAR
// The products of a tile's rows with a group.
template <class Tile>
HWY_INLINE void MultiplyTile(const Tile& tile, const uint8_t* inputs, Ints (&out)[kTileVectors]) {
  for (size_t line = 0; line < kLinesOfTile; ++line) {
    const LineProducts products = MultiplyLine(tile, line, inputs);
    out[line] = products.lower;
    out[line + kLinesOfTile] = Unshift<Tile>(products.upper);
  }
}
#else
// The sums over the lanes of each block of 128 bits, of four rows side by side.
HWY_INLINE Ints SumBlocks(Ints r0, Ints r1, Ints r2, Ints r3) {
  const IntTag d;
  const hn::Repartition<int64_t, IntTag> d64;
  const auto pairs = [&](Ints a, Ints b) HWY_ATTR {
    return hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  };
  const auto low = pairs(r0, r1), high = pairs(r2, r3);
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, low, high)),
                 hn::BitCast(d, hn::InterleaveUpper(d64, low, high)));
}

// The sums over blocks of four such quads of rows, in the order of rows.
HWY_INLINE void SumQuads(Ints q0, Ints q1, Ints q2, Ints q3, Ints (&out)[kTileVectors]) {
#if HWY_CAP_GE256
  const IntTag d;
  const auto halves = [&](Ints a, Ints b) HWY_ATTR {
    return hn::Add(hn::ConcatLowerLower(d, b, a), hn::ConcatUpperUpper(d, b, a));
  };
#if HWY_CAP_GE512
  const Ints even = halves(q0, q2), odd = halves(q1, q3);  // two blocks to be added for each quad
  out[0] = hn::Add(hn::OddEvenBlocks(hn::SwapAdjacentBlocks(odd), even),
                   hn::OddEvenBlocks(odd, hn::SwapAdjacentBlocks(even)));
#else
  out[0] = halves(q0, q1);
  out[1] = halves(q2, q3);
#endif
#else
  out[0] = q0;
  out[1] = q1;
  out[2] = q2;
  out[3] = q3;
#endif
}

// Four lines, summed over each block: four lines at a time, so that few sums are kept.
template <class Tile>
HWY_INLINE LineProducts MultiplyFourLines(const Tile& tile, size_t line, const uint8_t* inputs) {
  const LineProducts p0 = MultiplyLine(tile, line, inputs);
  const LineProducts p1 = MultiplyLine(tile, line + 1, inputs);
  const LineProducts p2 = MultiplyLine(tile, line + 2, inputs);
  const LineProducts p3 = MultiplyLine(tile, line + 3, inputs);
  return {SumBlocks(p0.lower, p1.lower, p2.lower, p3.lower),
          Unshift<Tile>(SumBlocks(p0.upper, p1.upper, p2.upper, p3.upper))};
}

// The products of a tile's rows with a group.
template <class Tile>
HWY_INLINE void MultiplyTile(const Tile& tile, const uint8_t* inputs, Ints (&out)[kTileVectors]) {
  const LineProducts first = MultiplyFourLines(tile, 0, inputs);
  const LineProducts second = MultiplyFourLines(tile, 4, inputs);
  SumQuads(first.lower, second.lower, first.upper, second.upper, out);
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#endif  // MOBI_KERNELS_CPU_GROUP_DOT_INL_H_
