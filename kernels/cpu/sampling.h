// Backend::Sample, TokenLogprobs and MostLikely for the CPU. A row of logits is scanned with SIMD;
// what the filters keep is usually a handful of tokens, which plain code sorts and draws from.
// Rows are shared among the threads; a row's result is computed by one of them alone.
#ifndef MOBI_KERNELS_CPU_SAMPLING_H_
#define MOBI_KERNELS_CPU_SAMPLING_H_

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/workspace.h"
#include "kernels/tensor.h"

namespace mobi::cpu {

void Sample(ThreadPool& pool, Workspace& workspace, Tensor logits, const SamplingBatch& batch,
            Sampled* out);
void TokenLogprobs(ThreadPool& pool, Tensor logits, const int32_t* ids, float* out);
void MostLikely(ThreadPool& pool, Workspace& workspace, Tensor logits, const int32_t* rows,
                int num_rows, int count, TopLogprobs* out);

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_SAMPLING_H_
