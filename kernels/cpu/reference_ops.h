// Every op of Backend as plain scalar loops over host memory, sums in double: the oracle that the
// SIMD and CUDA kernels are checked against, and a backend of its own (CpuOptions::reference).
// Arguments mean what they mean in kernels/backend.h; activations may be fp32, fp16 or bf16 and are
// rounded once, when stored. Pure functions of their arguments: safe from any thread.
#ifndef MOBI_KERNELS_CPU_REFERENCE_OPS_H_
#define MOBI_KERNELS_CPU_REFERENCE_OPS_H_

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/sliced_weight.h"
#include "kernels/tensor.h"

namespace mobi::reference {

void Embed(Tensor table, const int32_t* ids, Tensor out);
void RmsNorm(Tensor x, Tensor weight, float eps, Tensor out);
void AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out);
void DenseMatmul(Tensor x, Tensor weight, Tensor out);
void RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                    const int32_t* slots, const AttentionShape& shape, KvLayer kv);
void Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
               const AttentionShape& shape, Tensor out);
void SwiGlu(Tensor gate_up, Tensor out);
void GatherRows(Tensor x, const int32_t* rows, Tensor out);

void SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                  int64_t levels_stride, Tensor out);
// The weight of `row` at `level`: values[cols].
void DequantizeRow(const SlicedWeight& weight, int64_t row, int level, double* values);

// The router's scores of every token: scores[token][segment * kNumLevels + level - 1].
std::vector<std::vector<double>> RouterScores(Tensor x, const RoutedWeight& linear);
void Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch, uint8_t* levels,
           int64_t levels_stride);

void Sample(Tensor logits, const SamplingBatch& batch, Sampled* out);
// The token's place in a draw: score / temperature of every token that the row's edits and filters
// allow, -infinity of the others; empty when the logits are not finite.
std::vector<double> FilteredScores(Tensor logits, const SamplingRow& row, const LogitEdit* edits);
void TokenLogprobs(Tensor logits, const int32_t* ids, float* out);
void MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count, TopLogprobs* out);

}  // namespace mobi::reference

#endif  // MOBI_KERNELS_CPU_REFERENCE_OPS_H_
