// The ops of Backend that touch each activation once, for the CPU: embedding, norms, rope, SwiGLU,
// gathering of rows. They are bound by memory; large ones are shared among the threads by rows.
#ifndef MOBI_KERNELS_CPU_ELEMENTWISE_H_
#define MOBI_KERNELS_CPU_ELEMENTWISE_H_

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/tensor.h"

namespace mobi::cpu {

// Activations are fp32; see the ops of the same names in Backend.
void Embed(ThreadPool& pool, Tensor table, const int32_t* ids, Tensor out);
void RmsNorm(ThreadPool& pool, Tensor x, Tensor weight, float eps, Tensor out);
void AddRmsNorm(ThreadPool& pool, Tensor delta, Tensor weight, float eps, Tensor residual,
                Tensor out);
void RopeAndWriteKv(ThreadPool& pool, Tensor qkv, const RopeTable& rope, const int32_t* positions,
                    const int32_t* slots, const AttentionShape& shape, KvLayer kv);
void SwiGlu(ThreadPool& pool, Tensor gate_up, Tensor out);
void GatherRows(ThreadPool& pool, Tensor x, const int32_t* rows, Tensor out);

float MeanSquare(const float* x, int64_t count);

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_ELEMENTWISE_H_
