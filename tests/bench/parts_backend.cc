#include "parts_backend.h"

namespace mobi {

void PartsBackend::RunStep(const StepKey& key, absl::FunctionRef<void()> body) {
  // Records of steps that lack different parts must not be taken for each other; of the key, the
  // inner backend only asks whether it is equal.
  StepKey varied = key;
  const int variant = omitted_.has_value() ? 1 + static_cast<int>(*omitted_) : 0;
  varied.num_coherent += variant << 20;
  inner_->RunStep(varied, body);
}

void PartsBackend::Embed(Tensor table, const int32_t* ids, Tensor out) {
  Do(Part::kNorms, [&] { inner_->Embed(table, ids, out); });
}

void PartsBackend::RmsNorm(Tensor x, Tensor weight, float eps, Tensor out) {
  Do(Part::kNorms, [&] { inner_->RmsNorm(x, weight, eps, out); });
}

void PartsBackend::AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out) {
  Do(Part::kNorms, [&] { inner_->AddRmsNorm(delta, weight, eps, residual, out); });
}

void PartsBackend::Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch,
                         uint8_t* levels, int64_t levels_stride) {
  Do(Part::kRouter, [&] { inner_->Route(x, linear, batch, levels, levels_stride); });
}

void PartsBackend::SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                                int64_t levels_stride, Tensor out) {
  Do(weight.rows == PaddedRows(vocab_size_) ? Part::kLmHead : Part::kLinears,
     [&] { inner_->SlicedMatmul(x, weight, levels, levels_stride, out); });
}

void PartsBackend::DenseMatmul(Tensor x, Tensor weight, Tensor out) {
  Do(weight.rows == vocab_size_ ? Part::kLmHead : Part::kLinears,
     [&] { inner_->DenseMatmul(x, weight, out); });
}

void PartsBackend::RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                                  const int32_t* slots, const AttentionShape& shape, KvLayer kv) {
  Do(Part::kAttention, [&] { inner_->RopeAndWriteKv(qkv, rope, positions, slots, shape, kv); });
}

void PartsBackend::Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
                             const AttentionShape& shape, Tensor out) {
  Do(Part::kAttention, [&] { inner_->Attention(q, kv, batch, shape, out); });
}

void PartsBackend::SwiGlu(Tensor gate_up, Tensor out) {
  Do(Part::kNorms, [&] { inner_->SwiGlu(gate_up, out); });
}

void PartsBackend::GatherRows(Tensor x, const int32_t* rows, Tensor out) {
  Do(Part::kLmHead, [&] { inner_->GatherRows(x, rows, out); });
}

void PartsBackend::Sample(Tensor logits, const SamplingBatch& batch, Sampled* out) {
  Do(Part::kSampling, [&] { inner_->Sample(logits, batch, out); });
}

void PartsBackend::TokenLogprobs(Tensor logits, const int32_t* ids, float* out) {
  Do(Part::kSampling, [&] { inner_->TokenLogprobs(logits, ids, out); });
}

void PartsBackend::MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count,
                              TopLogprobs* out) {
  Do(Part::kSampling, [&] { inner_->MostLikely(logits, rows, num_rows, count, out); });
}

}  // namespace mobi
