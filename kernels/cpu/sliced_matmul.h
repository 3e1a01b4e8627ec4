// Backend::SlicedMatmul for the CPU: reads only the slices that the tokens' levels ask for, turns
// codes into floats in registers, and multiplies in fp32. One token is a fused pass over the slices
// at the speed of memory; many tokens dequantize a block of rows once per level into cache and run
// a register-blocked product. Both do the same arithmetic in the same order.
#ifndef MOBI_KERNELS_CPU_SLICED_MATMUL_H_
#define MOBI_KERNELS_CPU_SLICED_MATMUL_H_

#include <cstdint>

#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/workspace.h"
#include "kernels/sliced_weight.h"
#include "kernels/tensor.h"

namespace mobi::cpu {

// x, out fp32; see Backend::SlicedMatmul.
void SlicedMatmul(ThreadPool& pool, Workspace& workspace, Tensor x, const SlicedWeight& weight,
                  const uint8_t* levels, int64_t levels_stride, Tensor out);

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_SLICED_MATMUL_H_
