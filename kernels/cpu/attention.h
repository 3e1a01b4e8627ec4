// Backend::Attention for the CPU: paged, grouped queries, online softmax in fp32 over tiles of 64
// positions counted from the start of the sequence, so that a token's result does not depend on how
// its prompt was cut into chunks nor on what runs beside it.
#ifndef MOBI_KERNELS_CPU_ATTENTION_H_
#define MOBI_KERNELS_CPU_ATTENTION_H_

#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/workspace.h"
#include "kernels/tensor.h"

namespace mobi::cpu {

// q, cache and out fp32; see Backend::Attention.
void Attention(ThreadPool& pool, Workspace& workspace, Tensor q, const KvLayer& kv,
               const AttentionBatch& batch, const AttentionShape& shape, Tensor out);

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_ATTENTION_H_
