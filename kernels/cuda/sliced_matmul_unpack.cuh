// From slice words to operand fragments of mma.m16n8k16: a warp's 32 lanes hold one 16 x 128 tile
// of a slice as one 16-byte load each (kernels/bit_slice.h); word w of every lane becomes two
// fragments of 16 rows x 16 columns. No table and no arithmetic per weight: bits are placed in the
// mantissa of an fp16 whose exponent makes them read as bias + code / 4^level. The bias and the
// half step meet the sum of x over the group afterwards (see CodeOffset).
//
//   level 1      one AND-OR per pair of weights and one shift; see LevelOneBias.
//   level 2..4   the slices' fields are first merged into bytes (the code, truncated), then one
//                byte permute per pair puts a byte beside the exponent: 0x44cc = 4 + code / 256.
//
// Order of a fragment pair: pairs of columns 0..3 of bit_slice.h times {row g, row g + 8} =
// {a0, a1, a2, a3} of the first and of the second fragment.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_UNPACK_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_UNPACK_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/bit_slice.h"

namespace mobi::cuda {

// What a level 1 fragment adds to Q / 4 for a weight of pair p in row g + 8 h: 2^(8 - bit), where
// the pairs whose bit is above 8 were shifted by 6.
__host__ __device__ constexpr float LevelOneBias(int pair, int h) {
  const int bit = 8 - 4 * pair - 2 * h;
  return static_cast<float>(1 << (8 - (bit < 0 ? bit + 10 : bit)));
}

// At levels 2..4 a fragment holds 4 + Q / 4^level: with this the weight is
// range * (fragment + CodeOffset) + offset.
constexpr float CodeOffset(int level) {
  return 0.5f / static_cast<float>(1 << (kSliceBits * level)) - 4.0f;
}

// Codes of 16 weights: h (row g + 8) and l (row g), as bytes in the order of the fragments.
struct CodeWords {
  uint32_t ha, hb, la, lb;
};

// Any function of three words, given by its value for a = 0xF0, b = 0xCC, c = 0xAA. One
// instruction, where the compiler takes two for two constants.
template <int table>
__host__ __device__ __forceinline__ uint32_t Logic(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
#ifdef __CUDA_ARCH__
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(table));
#else
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
#endif
  return result;
}

template <int bit>
__host__ __device__ __forceinline__ uint32_t Field(uint32_t word) {
  return Logic<(0xF0 & 0xCC) | 0xAA>(word, 0x00030003u << bit,
                                     0x00010001u * ((15 + 8 - bit) << 10));
}

// fragments[0..7] of level 1.
__host__ __device__ __forceinline__ void UnpackLevel1(uint32_t word, uint32_t* fragments) {
  const uint32_t high = word >> 6;
  fragments[0] = Field<8>(word);
  fragments[1] = Field<6>(word);
  fragments[2] = Field<4>(word);
  fragments[3] = Field<2>(word);
  fragments[4] = Field<0>(word);
  fragments[5] = Field<8>(high);
  fragments[6] = Field<6>(high);
  fragments[7] = Field<4>(high);
}

__host__ __device__ __forceinline__ uint32_t Select(uint32_t a, uint32_t b, uint32_t mask) {
  return Logic<(0xF0 & 0xAA) | (0xCC & ~0xAA & 0xFF)>(a, b, mask);
}

// The codes that slices 0..3 hold together; slices not read are given as 0.
__host__ __device__ __forceinline__ CodeWords MergeSlices(uint32_t s0, uint32_t s1, uint32_t s2,
                                                          uint32_t s3) {
  // Fields at bits 2, 6, 10, 14 belong to row g + 8, those at 0, 4, 8, 12 to row g.
  const uint32_t h01 = Select(s0, s1 >> 2, 0xCCCCCCCCu), l01 = Select(s0 << 2, s1, 0xCCCCCCCCu);
  const uint32_t h23 = Select(s2, s3 >> 2, 0xCCCCCCCCu), l23 = Select(s2 << 2, s3, 0xCCCCCCCCu);
  return {Select(h01, h23 >> 4, 0xF0F0F0F0u), Select(h01 << 4, h23, 0xF0F0F0F0u),
          Select(l01, l23 >> 4, 0xF0F0F0F0u), Select(l01 << 4, l23, 0xF0F0F0F0u)};
}

__host__ __device__ __forceinline__ CodeWords Truncate(const CodeWords& c, uint32_t mask) {
  return {c.ha & mask, c.hb & mask, c.la & mask, c.lb & mask};
}

// The bytes of both halves of a word beside 0x44: the even or the odd byte of each half.
template <bool odd>
__host__ __device__ __forceinline__ uint32_t WithExponent(uint32_t codes) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;"
      : "=r"(result)
      : "r"(codes), "r"(0x44444444u), "n"(odd ? 0x4341 : 0x4240));
  return result;
#else
  return ((odd ? codes >> 8 : codes) & 0x00FF00FFu) | 0x44004400u;
#endif
}

// fragments[0..7] of levels 2..4.
__host__ __device__ __forceinline__ void UnpackCodes(const CodeWords& c, uint32_t* fragments) {
  fragments[0] = WithExponent<true>(c.lb);
  fragments[1] = WithExponent<false>(c.ha);
  fragments[2] = WithExponent<false>(c.la);
  fragments[3] = WithExponent<false>(c.hb);
  fragments[4] = WithExponent<false>(c.lb);
  fragments[5] = WithExponent<true>(c.ha);
  fragments[6] = WithExponent<true>(c.la);
  fragments[7] = WithExponent<true>(c.hb);
}

// All weights of one word of each slice at a level known to the compiler.
template <int level>
__host__ __device__ __forceinline__ void Unpack(const uint32_t (&slices)[level],
                                                uint32_t* fragments) {
  if constexpr (level == 1) {
    UnpackLevel1(slices[0], fragments);
  } else if constexpr (level == 2) {
    UnpackCodes(MergeSlices(slices[0], slices[1], 0, 0), fragments);
  } else if constexpr (level == 3) {
    UnpackCodes(MergeSlices(slices[0], slices[1], slices[2], 0), fragments);
  } else {
    UnpackCodes(MergeSlices(slices[0], slices[1], slices[2], slices[3]), fragments);
  }
}

// ---- Bytes: operand fragments of mma.m16n8k32, one of 16 rows x 32 columns for each word. A byte
// is the code's place among 256: 256 Q / 4^level, exactly.

// With this the weight is range * (byte / 256 + HalfStep) + offset.
constexpr float HalfStep(int level) { return 0.5f / static_cast<float>(1 << (kSliceBits * level)); }

// The column, of the lane's eight of a word, of the i-th byte of its two registers of the operand:
// 2, 6, 3, 7 and 0, 4, 1, 5. Rows g and g + 8 have them alike once a word's bytes have changed
// places.
__host__ __device__ constexpr int ByteColumn(int i) { return i % 2 * 4 + (i < 4) * 2 + i / 2 % 2; }

__host__ __device__ __forceinline__ uint32_t SwapBytes(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __byte_perm(word, 0, 0x2301);
#else
  return (word & 0x00FF00FFu) << 8 | (word >> 8 & 0x00FF00FFu);
#endif
}

__host__ __device__ __forceinline__ void OrderBytes(const CodeWords& c, uint32_t (&a)[4]) {
  a[0] = c.la, a[1] = c.hb, a[2] = SwapBytes(c.lb), a[3] = c.ha;
}

// All weights of one word of each slice.
template <int level>
__host__ __device__ __forceinline__ void UnpackBytes(const uint32_t (&slices)[level],
                                                     uint32_t (&a)[4]) {
  const uint32_t s0 = slices[0];
  if constexpr (level == 1) {
    constexpr uint32_t kTop = 0xC0C0C0C0u;
    OrderBytes({s0 & kTop, s0 << 4 & kTop, s0 << 2 & kTop, s0 << 6 & kTop}, a);
  } else if constexpr (level == 2) {
    constexpr uint32_t kTop = 0xF0F0F0F0u;
    const uint32_t h = Select(s0, slices[1] >> 2, 0xCCCCCCCCu);
    const uint32_t l = Select(s0 << 2, slices[1], 0xCCCCCCCCu);
    OrderBytes({h & kTop, h << 4 & kTop, l & kTop, l << 4 & kTop}, a);
  } else if constexpr (level == 3) {
    OrderBytes(MergeSlices(s0, slices[1], slices[2], 0), a);
  } else {
    OrderBytes(MergeSlices(s0, slices[1], slices[2], slices[3]), a);
  }
}

// The bytes of a lower level, of a higher one's.
__host__ __device__ constexpr uint32_t BytesOfLevel(int level) {
  return 0x01010101u * (0xFFu << (8 - kSliceBits * level) & 0xFFu);
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_UNPACK_CUH_
