// Which SIMD target the CPU backend's ops run on here: chosen at run time from those compiled in.
#ifndef MOBI_KERNELS_CPU_SIMD_NAME_H_
#define MOBI_KERNELS_CPU_SIMD_NAME_H_

namespace mobi::cpu {

const char* SimdName();  // "AVX-512", "AVX2", ..., for a person

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_SIMD_NAME_H_
