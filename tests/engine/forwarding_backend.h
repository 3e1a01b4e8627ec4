// A backend that passes everything on to another, for those that differ in a few things only.
// Buffers know the backend that made them, which is the inner one.
#ifndef MOBI_TESTS_ENGINE_FORWARDING_BACKEND_H_
#define MOBI_TESTS_ENGINE_FORWARDING_BACKEND_H_

#include <memory>
#include <string>
#include <utility>

#include "kernels/backend.h"

namespace mobi {

class ForwardingBackend : public Backend {
 public:
  explicit ForwardingBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  std::string_view name() const override { return inner_->name(); }
  std::string description() const override { return inner_->description(); }
  DType activation_dtype() const override { return inner_->activation_dtype(); }
  MemoryInfo memory() const override { return inner_->memory(); }
  absl::StatusOr<Buffer> Allocate(size_t bytes, std::string_view what) override {
    return inner_->Allocate(bytes, what);
  }
  absl::StatusOr<Buffer> Reserve(size_t bytes, std::string_view what) override {
    return inner_->Reserve(bytes, what);
  }
  absl::Status Commit(void* at, size_t bytes, std::string_view what) override {
    return inner_->Commit(at, bytes, what);
  }
  void Decommit(void* at, size_t bytes) override { inner_->Decommit(at, bytes); }
  size_t page_bytes() const override { return inner_->page_bytes(); }
  void Upload(const void* host, size_t bytes, void* device) override {
    inner_->Upload(host, bytes, device);
  }
  bool concurrent_uploads() const override { return inner_->concurrent_uploads(); }
  void Download(const void* device, size_t bytes, void* host) override {
    inner_->Download(device, bytes, host);
  }
  void Zero(void* device, size_t bytes) override { inner_->Zero(device, bytes); }
  absl::Status Synchronize() override { return inner_->Synchronize(); }
  int PaddedDecodes(int num_decodes) const override { return inner_->PaddedDecodes(num_decodes); }
  void RunStep(const StepKey& key, absl::FunctionRef<void()> body) override {
    inner_->RunStep(key, body);
  }

  void Embed(Tensor table, const int32_t* ids, Tensor out) override {
    inner_->Embed(table, ids, out);
  }
  void RmsNorm(Tensor x, Tensor weight, float eps, Tensor out) override {
    inner_->RmsNorm(x, weight, eps, out);
  }
  void AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out) override {
    inner_->AddRmsNorm(delta, weight, eps, residual, out);
  }
  void Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch, uint8_t* levels,
             int64_t levels_stride) override {
    inner_->Route(x, linear, batch, levels, levels_stride);
  }
  void SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                    int64_t levels_stride, Tensor out) override {
    inner_->SlicedMatmul(x, weight, levels, levels_stride, out);
  }
  void DenseMatmul(Tensor x, Tensor weight, Tensor out) override {
    inner_->DenseMatmul(x, weight, out);
  }
  void RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                      const int32_t* slots, const AttentionShape& shape, KvLayer kv) override {
    inner_->RopeAndWriteKv(qkv, rope, positions, slots, shape, kv);
  }
  void Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
                 const AttentionShape& shape, Tensor out) override {
    inner_->Attention(q, kv, batch, shape, out);
  }
  void SwiGlu(Tensor gate_up, Tensor out) override { inner_->SwiGlu(gate_up, out); }
  void GatherRows(Tensor x, const int32_t* rows, Tensor out) override {
    inner_->GatherRows(x, rows, out);
  }
  void Sample(Tensor logits, const SamplingBatch& batch, Sampled* out) override {
    inner_->Sample(logits, batch, out);
  }
  void TokenLogprobs(Tensor logits, const int32_t* ids, float* out) override {
    inner_->TokenLogprobs(logits, ids, out);
  }
  void MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count,
                  TopLogprobs* out) override {
    inner_->MostLikely(logits, rows, num_rows, count, out);
  }

 protected:
  const std::unique_ptr<Backend> inner_;

 private:
  void Free(void*) override {}
};

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_FORWARDING_BACKEND_H_
