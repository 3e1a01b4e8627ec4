// The inner loops of products in floats, compiled once per SIMD target: rows of weights against
// tokens, both along K, and the sum over lanes at the end. An output is one chain of fused
// multiply-adds per lane in the order of K, then one fixed tree over the lanes, whatever the size
// of the block it is computed in: this is what makes results independent of the rest of the batch.
// Included by *.cc through foreach_target; no include guard of the usual kind on purpose.
#if defined(MOBI_KERNELS_CPU_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBI_KERNELS_CPU_DOT_INL_H_
#undef MOBI_KERNELS_CPU_DOT_INL_H_
#else
#define MOBI_KERNELS_CPU_DOT_INL_H_
#endif

#include <algorithm>
#include <cstddef>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Vectors of at most 16 floats: a 64-byte line of a slice (slice_codes-inl.h) is 16 words.
using FloatTag = HWY_CAPPED(float, 16);
constexpr size_t kLanes = hn::MaxLanes(FloatTag());

// Rows that are worked on together, and the floats of their partial sums for one token.
constexpr size_t kBlockRows = 16;
constexpr size_t kSumsPerToken = kBlockRows * kLanes;

HWY_INLINE hn::Vec<FloatTag> LoadWeights(const float* HWY_RESTRICT w) {
  return hn::LoadU(FloatTag(), w);
}
template <class Half>  // hwy::float16_t or hwy::bfloat16_t
HWY_INLINE hn::Vec<FloatTag> LoadWeights(const Half* HWY_RESTRICT w) {
  return hn::PromoteTo(FloatTag(), hn::LoadU(hn::Rebind<Half, FloatTag>(), w));
}

// Adds to sums[t][r][lane], for the 4 rows w and T tokens, the products of `length` columns, a
// multiple of kLanes. The columns of token t begin at x[t] + x_offset. Sums of neighbouring rows
// are kLanes apart, of tokens kSumsPerToken.
template <int T, class Weight>
HWY_INLINE void Dot4Rows(const Weight* const* w, const float* const* x, size_t x_offset,
                         size_t length, float* HWY_RESTRICT sums) {
  const FloatTag d;
  const auto sum = [&](int t, int r) HWY_ATTR { return sums + t * kSumsPerToken + r * kLanes; };
  constexpr int t1 = T > 1 ? 1 : 0, t2 = T > 2 ? 2 : 0, t3 = T > 3 ? 3 : 0;
  const Weight *row0 = w[0], *row1 = w[1], *row2 = w[2], *row3 = w[3];
  const float* HWY_RESTRICT x0 = x[0] + x_offset;
  const float* HWY_RESTRICT x1 = x[t1] + x_offset;
  const float* HWY_RESTRICT x2 = x[t2] + x_offset;
  const float* HWY_RESTRICT x3 = x[t3] + x_offset;
  auto s00 = hn::Load(d, sum(0, 0)), s01 = hn::Load(d, sum(0, 1));
  auto s02 = hn::Load(d, sum(0, 2)), s03 = hn::Load(d, sum(0, 3));
  auto s10 = hn::Load(d, sum(t1, 0)), s11 = hn::Load(d, sum(t1, 1));
  auto s12 = hn::Load(d, sum(t1, 2)), s13 = hn::Load(d, sum(t1, 3));
  auto s20 = hn::Load(d, sum(t2, 0)), s21 = hn::Load(d, sum(t2, 1));
  auto s22 = hn::Load(d, sum(t2, 2)), s23 = hn::Load(d, sum(t2, 3));
  auto s30 = hn::Load(d, sum(t3, 0)), s31 = hn::Load(d, sum(t3, 1));
  auto s32 = hn::Load(d, sum(t3, 2)), s33 = hn::Load(d, sum(t3, 3));
  for (size_t k = 0; k < length; k += kLanes) {
    const auto w0 = LoadWeights(row0 + k), w1 = LoadWeights(row1 + k);
    const auto w2 = LoadWeights(row2 + k), w3 = LoadWeights(row3 + k);
    const auto v0 = hn::LoadU(d, x0 + k);
    s00 = hn::MulAdd(w0, v0, s00);
    s01 = hn::MulAdd(w1, v0, s01);
    s02 = hn::MulAdd(w2, v0, s02);
    s03 = hn::MulAdd(w3, v0, s03);
    if constexpr (T > 1) {
      const auto v1 = hn::LoadU(d, x1 + k);
      s10 = hn::MulAdd(w0, v1, s10);
      s11 = hn::MulAdd(w1, v1, s11);
      s12 = hn::MulAdd(w2, v1, s12);
      s13 = hn::MulAdd(w3, v1, s13);
    }
    if constexpr (T > 2) {
      const auto v2 = hn::LoadU(d, x2 + k);
      s20 = hn::MulAdd(w0, v2, s20);
      s21 = hn::MulAdd(w1, v2, s21);
      s22 = hn::MulAdd(w2, v2, s22);
      s23 = hn::MulAdd(w3, v2, s23);
    }
    if constexpr (T > 3) {
      const auto v3 = hn::LoadU(d, x3 + k);
      s30 = hn::MulAdd(w0, v3, s30);
      s31 = hn::MulAdd(w1, v3, s31);
      s32 = hn::MulAdd(w2, v3, s32);
      s33 = hn::MulAdd(w3, v3, s33);
    }
  }
  hn::Store(s00, d, sum(0, 0));
  hn::Store(s01, d, sum(0, 1));
  hn::Store(s02, d, sum(0, 2));
  hn::Store(s03, d, sum(0, 3));
  if constexpr (T > 1) {
    hn::Store(s10, d, sum(1, 0));
    hn::Store(s11, d, sum(1, 1));
    hn::Store(s12, d, sum(1, 2));
    hn::Store(s13, d, sum(1, 3));
  }
  if constexpr (T > 2) {
    hn::Store(s20, d, sum(2, 0));
    hn::Store(s21, d, sum(2, 1));
    hn::Store(s22, d, sum(2, 2));
    hn::Store(s23, d, sum(2, 3));
  }
  if constexpr (T > 3) {
    hn::Store(s30, d, sum(3, 0));
    hn::Store(s31, d, sum(3, 1));
    hn::Store(s32, d, sum(3, 2));
    hn::Store(s33, d, sum(3, 3));
  }
}

// The same for any number of tokens.
template <class Weight>
HWY_INLINE void Dot4RowsTokens(const Weight* const* w, const float* const* x, size_t x_offset,
                               size_t num_tokens, size_t length, float* HWY_RESTRICT sums) {
  size_t t = 0;
  for (; t + 4 <= num_tokens; t += 4) {
    Dot4Rows<4>(w, x + t, x_offset, length, sums + t * kSumsPerToken);
  }
  sums += t * kSumsPerToken;
  switch (num_tokens - t) {
    case 1:
      return Dot4Rows<1>(w, x + t, x_offset, length, sums);
    case 2:
      return Dot4Rows<2>(w, x + t, x_offset, length, sums);
    case 3:
      return Dot4Rows<3>(w, x + t, x_offset, length, sums);
  }
}

// A block of kBlockRows rows, w_stride apart. Tokens are the outer loop: the block's weights stay
// in the first level cache while inputs and sums stream by.
inline void DotBlock(const float* HWY_RESTRICT w, size_t w_stride, const float* const* x,
                     size_t x_offset, size_t num_tokens, size_t length, float* HWY_RESTRICT sums) {
  for (size_t t = 0; t < num_tokens; t += 4) {
    for (size_t r = 0; r < kBlockRows; r += 4) {
      const float* rows[4] = {w + r * w_stride, w + (r + 1) * w_stride, w + (r + 2) * w_stride,
                              w + (r + 3) * w_stride};
      Dot4RowsTokens(rows, x + t, x_offset, std::min<size_t>(4, num_tokens - t), length,
                     sums + t * kSumsPerToken + r * kLanes);
    }
  }
}

// The sums over lanes of kLanes vectors, in order: neighbours first, then neighbouring pairs, ...
template <size_t Count, class D>
HWY_INLINE hn::Vec<D> SumLanes(D d, const float* HWY_RESTRICT vectors) {
  if constexpr (Count == 1) {
    return hn::Load(d, vectors);
  } else {
#if HWY_TARGET != HWY_SCALAR  // has one lane and no such shuffles
    const auto low = SumLanes<Count / 2>(d, vectors);
    const auto high = SumLanes<Count / 2>(d, vectors + Count / 2 * kLanes);
    return hn::Add(hn::ConcatEven(d, high, low), hn::ConcatOdd(d, high, low));
#endif
  }
}

// The outputs of one token's block of rows from its partial sums.
HWY_INLINE void ReduceBlock(const float* HWY_RESTRICT sums, float* HWY_RESTRICT out) {
  const FloatTag d;
  for (size_t r = 0; r < kBlockRows; r += kLanes) {
    hn::StoreU(SumLanes<kLanes>(d, sums + r * kLanes), d, out + r);
  }
}

HWY_INLINE void ZeroSums(float* HWY_RESTRICT sums, size_t num_tokens) {
  std::fill_n(sums, num_tokens * kSumsPerToken, 0.0f);
}

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#endif  // MOBI_KERNELS_CPU_DOT_INL_H_
