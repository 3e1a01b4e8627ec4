// Compiles a function once per generation of x86 vector units and picks at run time. For loops that
// the compiler vectorizes well; sanitizers cannot run the resolvers, so there it means nothing.
#ifndef MOBI_CALIBRATOR_SIMD_H_
#define MOBI_CALIBRATOR_SIMD_H_

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define MOBI_VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOBI_VECTORIZED
#endif

#endif  // MOBI_CALIBRATOR_SIMD_H_
