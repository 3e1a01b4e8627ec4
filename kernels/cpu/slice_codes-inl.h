// The codes of a part of a line of a tile as bytes, joined from the slices that a level reads.
// Compiled once per SIMD target.
//
// A line is 64 bytes of a slice of a tile (bit_slice.h): 16 words with all columns of rows g and
// g + 8; word i has columns 8 i .. 8 i + 7. A part of a line is as many words as a vector has
// lanes. The 2-bit field at bits 2 j of each byte of a word is of row g for even j, of row g + 8
// for odd j, and of these of the word's columns:
//   j      0        1        2        3
//   bytes  4 0 5 1  2 6 3 7  2 6 3 7  0 4 1 5
// so one operation on whole vectors takes the codes of four columns of a row out of every word.
// Included by *.cc through foreach_target; no include guard of the usual kind on purpose.
#if defined(MOBI_KERNELS_CPU_SLICE_CODES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBI_KERNELS_CPU_SLICE_CODES_INL_H_
#undef MOBI_KERNELS_CPU_SLICE_CODES_INL_H_
#else
#define MOBI_KERNELS_CPU_SLICE_CODES_INL_H_
#endif

#include <array>
#include <cstddef>
#include <cstdint>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/bit_slice.h"
#include "kernels/cpu/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

using WordTag = hn::Rebind<uint32_t, FloatTag>;
using Words = hn::Vec<WordTag>;

// How far ahead of its use a tile is asked for: the streams of a weight are too many for the
// processor to foresee them all. One slice alone is passed over in less time.
constexpr int TilesAhead(int level) { return level == 1 ? 16 : 8; }

constexpr size_t kLinesOfTile = kTileRows / 2;
constexpr size_t kLineBytes = kTileBytes / kLinesOfTile;
constexpr size_t kPartBytes = kLanes * sizeof(uint32_t);
constexpr size_t kPartsOfLine = kLineBytes / kPartBytes;

static_assert(kPairShift[0][0] == 8 && kPairShift[0][1] == 6 && kPairShift[1][0] == 4 &&
                  kPairShift[1][1] == 2 && kPairShift[2][0] == 0 && kPairShift[2][1] == 14 &&
                  kPairShift[3][0] == 12 && kPairShift[3][1] == 10,
              "the order of columns above");

// Row g: a code in every byte, columns 4 0 5 1 and 2 6 3 7 of every word. Row g + 8: the same for
// columns 0 4 1 5 and 2 6 3 7, shifted left by UpperShift where that saves moving fields about.
struct CodeBytes {
  Words lower[2];
  Words upper[2];
};
constexpr int UpperShift(int level) { return level == 1 || level == 3 ? 2 : 0; }

HWY_INLINE Words Repeat(uint32_t byte) { return hn::Set(WordTag(), byte * 0x01010101u); }

// Bits of yes where the mask has ones, of no elsewhere.
HWY_INLINE Words Select(Words mask, Words yes, Words no) {
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
  return hn::IfVecThenElse(mask, yes, no);  // one instruction; elsewhere it selects whole bytes
#else
  return hn::OrAnd(hn::AndNot(mask, no), mask, yes);
#endif
}

// The bits of two words that two masks without a common bit leave.
HWY_INLINE Words Merge(Words a, uint32_t mask_of_a, Words b, uint32_t mask_of_b) {
  return hn::OrAnd(hn::And(a, Repeat(mask_of_a)), b, Repeat(mask_of_b));
}

// Two slices' fields, or two halves' nibbles, side by side: those that begin at even multiples of
// Bits, then those at odd ones.
template <int Bits>
HWY_INLINE Words JoinEven(Words high, Words low) {
  return Select(Repeat(Bits == 2 ? 0xCC : 0xF0), hn::ShiftLeft<Bits>(high), low);
}
template <int Bits>
HWY_INLINE Words JoinOdd(Words high, Words low) {
  return Select(Repeat(Bits == 2 ? 0xCC : 0xF0), high, hn::ShiftRight<Bits>(low));
}

HWY_INLINE CodeBytes JoinSlices(const Words (&w)[1]) {
  const Words moved = hn::ShiftRight<4>(w[0]);
  const Words low = Repeat(0x03), high = Repeat(0x0C);
  return {{hn::And(w[0], low), hn::And(moved, low)}, {hn::And(moved, high), hn::And(w[0], high)}};
}

HWY_INLINE CodeBytes JoinSlices(const Words (&w)[2]) {
  const Words lower = JoinEven<2>(w[0], w[1]), upper = JoinOdd<2>(w[0], w[1]);
  const Words nibble = Repeat(0x0F);
  return {{hn::And(lower, nibble), hn::And(hn::ShiftRight<4>(lower), nibble)},
          {hn::And(hn::ShiftRight<4>(upper), nibble), hn::And(upper, nibble)}};
}

HWY_INLINE CodeBytes JoinSlices(const Words (&w)[3]) {
  const Words lower = JoinEven<2>(w[0], w[1]), upper = JoinOdd<2>(w[0], w[1]);
  const Words moved = hn::ShiftRight<4>(w[2]);
  return {{Merge(w[2], 0x03, hn::ShiftLeft<2>(lower), 0x3C),
           Merge(moved, 0x03, hn::ShiftRight<2>(lower), 0x3C)},
          {Merge(moved, 0x0C, upper, 0xF0), Merge(w[2], 0x0C, hn::ShiftLeft<4>(upper), 0xF0)}};
}

HWY_INLINE CodeBytes JoinSlices(const Words (&w)[4]) {
  const Words lower = JoinEven<2>(w[0], w[1]), upper = JoinOdd<2>(w[0], w[1]);
  const Words lower_low = JoinEven<2>(w[2], w[3]), upper_low = JoinOdd<2>(w[2], w[3]);
  return {{JoinEven<4>(lower, lower_low), JoinOdd<4>(lower, lower_low)},
          {JoinOdd<4>(upper, upper_low), JoinEven<4>(upper, upper_low)}};
}

// The codes of one tile, straight from its slices.
template <int Level>
struct SlicedTile {
  static constexpr int kUpperShift = UpperShift(Level);
  const std::array<const uint8_t*, kNumSlices>& slices;
  int64_t begin;  // of the tile in each slice, in bytes

  HWY_INLINE CodeBytes Get(size_t line, size_t part) const {
    Words words[Level];
    for (int s = 0; s < Level; ++s) {
      const uint8_t* at = slices[s] + begin + line * kLineBytes + part * kPartBytes;
      hwy::Prefetch(at + TilesAhead(Level) * kTileBytes);
      words[s] = hn::LoadU(WordTag(), reinterpret_cast<const uint32_t*>(at));
    }
    return JoinSlices(words);
  }
};

// The codes of one tile, joined before: a tile that several tokens are multiplied with.
template <int Level>
struct JoinedTile {
  static constexpr int kUpperShift = UpperShift(Level);
  uint8_t* bytes;  // aligned as vectors are

  HWY_INLINE JoinedTile(uint8_t* scratch, const SlicedTile<Level>& tile) : bytes(scratch) {
    // Unrolled, it would have the compiler keep a whole tile in registers, which it cannot.
#pragma GCC unroll 1
    for (size_t line = 0; line < kLinesOfTile; ++line) {
      for (size_t part = 0; part < kPartsOfLine; ++part) {
        const CodeBytes codes = tile.Get(line, part);
        const Words vectors[] = {codes.lower[0], codes.lower[1], codes.upper[0], codes.upper[1]};
        for (int i = 0; i < 4; ++i) hn::Store(vectors[i], WordTag(), At(line, part, i));
      }
    }
  }

  HWY_INLINE CodeBytes Get(size_t line, size_t part) const {
    const auto load = [&](int i) HWY_ATTR { return hn::Load(WordTag(), At(line, part, i)); };
    return {{load(0), load(1)}, {load(2), load(3)}};
  }

 private:
  HWY_INLINE uint32_t* At(size_t line, size_t part, size_t i) const {
    return reinterpret_cast<uint32_t*>(bytes + ((line * kPartsOfLine + part) * 4 + i) * kPartBytes);
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#endif  // MOBI_KERNELS_CPU_SLICE_CODES_INL_H_
