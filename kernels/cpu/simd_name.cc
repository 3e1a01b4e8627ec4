#define HWY_WANT_AVX3_DL  // the target of sliced_matmul.cc, see there
#include "kernels/cpu/simd_name.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd_name.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

const char* NameOfTarget() {
  switch (HWY_TARGET) {
    case HWY_AVX3_DL:
      return "AVX-512 with VNNI";
    case HWY_AVX3:
      return "AVX-512";
    case HWY_SCALAR:
    case HWY_EMU128:
      return "no SIMD";
    default:
      return hwy::TargetName(HWY_TARGET);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mobi::cpu {

HWY_EXPORT(NameOfTarget);

const char* SimdName() { return HWY_DYNAMIC_DISPATCH(NameOfTarget)(); }

}  // namespace mobi::cpu
#endif  // HWY_ONCE
