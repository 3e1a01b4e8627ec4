// Backend::DenseMatmul for the CPU: weights in fp32, fp16 or bf16, products and sums in fp32. Few
// tokens stream the weights once; many convert a block of rows into cache and run the same
// register-blocked product as the sliced matmul, in the same order of sums.
#ifndef MOBI_KERNELS_CPU_DENSE_MATMUL_H_
#define MOBI_KERNELS_CPU_DENSE_MATMUL_H_

#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/workspace.h"
#include "kernels/tensor.h"

namespace mobi::cpu {

// x, out fp32; see Backend::DenseMatmul. Uses the workspace's inputs and per-thread areas.
void DenseMatmul(ThreadPool& pool, Workspace& workspace, Tensor x, Tensor weight, Tensor out);

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_DENSE_MATMUL_H_
