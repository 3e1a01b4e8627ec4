// Vector mathematics shared by the ops: exp from Highway, and what is built on it.
// Included by *.cc after hwy/foreach_target.h, once per SIMD target.
#if defined(MOBI_KERNELS_CPU_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBI_KERNELS_CPU_MATH_INL_H_
#undef MOBI_KERNELS_CPU_MATH_INL_H_
#else
#define MOBI_KERNELS_CPU_MATH_INL_H_
#endif

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

// x / (1 + exp(-x)). Highway's Exp is defined up to 88.7, where the quotient is zero to fp32.
template <class D, class V = hwy::HWY_NAMESPACE::Vec<D>>
HWY_INLINE V Silu(D d, V x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const V one = hn::Set(d, 1.0f);
  const V exponent = hn::Min(hn::Neg(x), hn::Set(d, 88.0f));
  return hn::Div(x, hn::Add(one, hn::Exp(d, exponent)));
}

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#endif  // MOBI_KERNELS_CPU_MATH_INL_H_
