// Backend::SlicedMatmul for the CPU: reads only the slices that the tokens' levels ask for. Inputs
// are rounded to 16 bits per group of 128 and token; a group's product with the codes is then a sum
// of whole numbers, scaled and added in fp32 in the order of groups. So a token's result has the
// same bits in any company, with any number of threads. One token is a pass over the slices at the
// speed of memory; several join a tile's slices to codes once.
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
