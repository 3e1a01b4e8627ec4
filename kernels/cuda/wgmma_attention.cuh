// wgmma for attention (compute capability 9.0): queries or weights in registers, as in
// wgmma_registers.cuh, by a tile of K or V in shared memory. The sums are bit for bit those of a
// chain of mma.m16n8k16.
#ifndef MOBI_KERNELS_CUDA_WGMMA_ATTENTION_CUH_
#define MOBI_KERNELS_CUDA_WGMMA_ATTENTION_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace mobi::cuda::ptx {

// Describes 16 rows (tokens) by columns in parts of 64 (dims), each part rows of 128 bytes swizzled
// in blocks of 8, `part_bytes` apart.
__device__ __forceinline__ uint64_t WgmmaTransposedOperand(uint32_t shared, uint32_t part_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kBlockStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kBlockStride | uint64_t{part_bytes >> 4} << 16 | (shared & 0x3FFFF) >> 4;
}

// d[64 x N] (+)= a[64 x 16] b with fp32 sums. b: N rows of 16 (WgmmaOperand), or, if kTransposed,
// 16 rows of N (WgmmaTransposedOperand). FromZero: what was in d does not matter.
template <int N, bool kBf16, bool kTransposed>
struct WgmmaAttention;

#define MOBI_LIST_32                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "           \
  "{%32, %33, %34, %35}, %36, "
#define MOBI_LIST_64                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "  \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "  \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "           \
  "{%64, %65, %66, %67}, %68, "
#define MOBI_SUMS_8(how, i)                                                             \
  how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3]), how(d[i + 4]), how(d[i + 5]), \
      how(d[i + 6]), how(d[i + 7])
#define MOBI_SUMS_32(how) \
  MOBI_SUMS_8(how, 0), MOBI_SUMS_8(how, 8), MOBI_SUMS_8(how, 16), MOBI_SUMS_8(how, 24)
#define MOBI_SUMS_64(how)                                                              \
  MOBI_SUMS_32(how), MOBI_SUMS_8(how, 32), MOBI_SUMS_8(how, 40), MOBI_SUMS_8(how, 48), \
      MOBI_SUMS_8(how, 56)
#define MOBI_WGMMA_FORM(name, adds, how, N, type, transposed, sums)                    \
  static __device__ __forceinline__ void name(float(&d)[N / 2], const uint32_t(&a)[4], \
                                              uint64_t b) {                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " adds                              \
                 ", 0;\n"                                                              \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type       \
                 " " MOBI_LIST_##sums "p, 1, 1, " transposed ";\n}\n"                  \
                 : MOBI_SUMS_##sums(how)                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                \
  }
#define MOBI_WGMMA_ATTENTION(N, kBf16, type, kTransposed, transposed, sums) \
  template <>                                                               \
  struct WgmmaAttention<N, kBf16, kTransposed> {                            \
    MOBI_WGMMA_FORM(FromZero, "0", "=f", N, type, transposed, sums)         \
    MOBI_WGMMA_FORM(Add, "1", "+f", N, type, transposed, sums)              \
  }
#if MOBI_WGMMA
MOBI_WGMMA_ATTENTION(128, false, "f16", false, "0", 64);
MOBI_WGMMA_ATTENTION(128, true, "bf16", false, "0", 64);
MOBI_WGMMA_ATTENTION(64, false, "f16", true, "1", 32);
MOBI_WGMMA_ATTENTION(64, true, "bf16", true, "1", 32);
MOBI_WGMMA_ATTENTION(128, false, "f16", true, "1", 64);
MOBI_WGMMA_ATTENTION(128, true, "bf16", true, "1", 64);
#endif
#undef MOBI_WGMMA_ATTENTION
#undef MOBI_WGMMA_FORM
#undef MOBI_SUMS_64
#undef MOBI_SUMS_32
#undef MOBI_SUMS_8
#undef MOBI_LIST_64
#undef MOBI_LIST_32

}  // namespace mobi::cuda::ptx

#endif  // MOBI_KERNELS_CUDA_WGMMA_ATTENTION_CUH_
