#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/dense_matmul.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/cpu/reference_ops.h"
#include "kernels/cpu/route.h"
#include "kernels/cpu/sampling.h"
#include "kernels/cpu/simd_name.h"
#include "kernels/cpu/sliced_matmul.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/workspace.h"

namespace mobi {
namespace {

// What every backend in host memory shares: ops run when called, so the order of calls is the order
// of effects and there is nothing to wait for.
class HostBackend : public Backend {
 public:
  DType activation_dtype() const final { return DType::kF32; }
  MemoryInfo memory() const final { return HostMemoryInfo(); }

  absl::StatusOr<Buffer> Allocate(size_t bytes, std::string_view what) final {
    absl::StatusOr<void*> data = AllocateHost(bytes, what);
    if (!data.ok()) return data.status();
    return Buffer(this, *data, bytes);
  }
  absl::StatusOr<Buffer> Reserve(size_t bytes, std::string_view what) final {
    absl::StatusOr<void*> data = ReserveHost(bytes, what);
    if (!data.ok()) return data.status();
    reserved_.emplace_back(*data, bytes);
    return Buffer(this, *data, bytes);
  }
  absl::Status Commit(void* at, size_t bytes, std::string_view what) final {
    return CommitHost(at, bytes, what);
  }
  void Decommit(void* at, size_t bytes) final { DecommitHost(at, bytes); }
  size_t page_bytes() const final { return HostPageBytes(); }
  void Upload(const void* host, size_t bytes, void* device) final { Copy(host, bytes, device); }
  bool concurrent_uploads() const final { return true; }
  void Download(const void* device, size_t bytes, void* host) final { Copy(device, bytes, host); }
  void Zero(void* device, size_t bytes) final {
    if (bytes > 0) std::memset(device, 0, bytes);
  }
  absl::Status Synchronize() final { return absl::OkStatus(); }
  void RunStep(const StepKey&, absl::FunctionRef<void()> body) final { body(); }

 private:
  static void Copy(const void* from, size_t bytes, void* to) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void Free(void* data) final {
    const auto found = std::find_if(reserved_.begin(), reserved_.end(),
                                    [data](const auto& r) { return r.first == data; });
    if (found == reserved_.end()) return FreeHost(data);
    UnreserveHost(data, found->second);
    reserved_.erase(found);
  }

  std::vector<std::pair<void*, size_t>> reserved_;
};

class ReferenceBackend final : public HostBackend {
 public:
  std::string_view name() const override { return "cpu"; }
  std::string description() const override { return "CPU, scalar reference, 1 thread"; }

  void Embed(Tensor table, const int32_t* ids, Tensor out) override {
    reference::Embed(table, ids, out);
  }
  void RmsNorm(Tensor x, Tensor weight, float eps, Tensor out) override {
    reference::RmsNorm(x, weight, eps, out);
  }
  void AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out) override {
    reference::AddRmsNorm(delta, weight, eps, residual, out);
  }
  void Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch, uint8_t* levels,
             int64_t levels_stride) override {
    reference::Route(x, linear, batch, levels, levels_stride);
  }
  void SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                    int64_t levels_stride, Tensor out) override {
    reference::SlicedMatmul(x, weight, levels, levels_stride, out);
  }
  void DenseMatmul(Tensor x, Tensor weight, Tensor out) override {
    reference::DenseMatmul(x, weight, out);
  }
  void RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                      const int32_t* slots, const AttentionShape& shape, KvLayer kv) override {
    reference::RopeAndWriteKv(qkv, rope, positions, slots, shape, kv);
  }
  void Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
                 const AttentionShape& shape, Tensor out) override {
    reference::Attention(q, kv, batch, shape, out);
  }
  void SwiGlu(Tensor gate_up, Tensor out) override { reference::SwiGlu(gate_up, out); }
  void GatherRows(Tensor x, const int32_t* rows, Tensor out) override {
    reference::GatherRows(x, rows, out);
  }
  void Sample(Tensor logits, const SamplingBatch& batch, Sampled* out) override {
    reference::Sample(logits, batch, out);
  }
  void TokenLogprobs(Tensor logits, const int32_t* ids, float* out) override {
    reference::TokenLogprobs(logits, ids, out);
  }
  void MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count,
                  TopLogprobs* out) override {
    reference::MostLikely(logits, rows, num_rows, count, out);
  }
};

class SimdBackend final : public HostBackend {
 public:
  explicit SimdBackend(int num_threads) : pool_(num_threads), workspace_(num_threads) {}

  std::string_view name() const override { return "cpu"; }
  std::string description() const override {
    return absl::StrCat("CPU, ", cpu::SimdName(), ", ", pool_.num_threads(),
                        pool_.num_threads() == 1 ? " thread" : " threads");
  }

  void Embed(Tensor table, const int32_t* ids, Tensor out) override {
    cpu::Embed(pool_, table, ids, out);
  }
  void RmsNorm(Tensor x, Tensor weight, float eps, Tensor out) override {
    cpu::RmsNorm(pool_, x, weight, eps, out);
  }
  void AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out) override {
    cpu::AddRmsNorm(pool_, delta, weight, eps, residual, out);
  }
  void Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch, uint8_t* levels,
             int64_t levels_stride) override {
    cpu::Route(pool_, workspace_, x, linear, batch, levels, levels_stride);
  }
  void SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                    int64_t levels_stride, Tensor out) override {
    cpu::SlicedMatmul(pool_, workspace_, x, weight, levels, levels_stride, out);
  }
  void DenseMatmul(Tensor x, Tensor weight, Tensor out) override {
    cpu::DenseMatmul(pool_, workspace_, x, weight, out);
  }
  void RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                      const int32_t* slots, const AttentionShape& shape, KvLayer kv) override {
    cpu::RopeAndWriteKv(pool_, qkv, rope, positions, slots, shape, kv);
  }
  void Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
                 const AttentionShape& shape, Tensor out) override {
    cpu::Attention(pool_, workspace_, q, kv, batch, shape, out);
  }
  void SwiGlu(Tensor gate_up, Tensor out) override { cpu::SwiGlu(pool_, gate_up, out); }
  void GatherRows(Tensor x, const int32_t* rows, Tensor out) override {
    cpu::GatherRows(pool_, x, rows, out);
  }
  void Sample(Tensor logits, const SamplingBatch& batch, Sampled* out) override {
    cpu::Sample(pool_, workspace_, logits, batch, out);
  }
  void TokenLogprobs(Tensor logits, const int32_t* ids, float* out) override {
    cpu::TokenLogprobs(pool_, logits, ids, out);
  }
  void MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count,
                  TopLogprobs* out) override {
    cpu::MostLikely(pool_, workspace_, logits, rows, num_rows, count, out);
  }

 private:
  cpu::ThreadPool pool_;
  cpu::Workspace workspace_;
};

}  // namespace

std::unique_ptr<Backend> CreateCpuBackend(const CpuOptions& options) {
  if (options.reference) return std::make_unique<ReferenceBackend>();
  return std::make_unique<SimdBackend>(options.num_threads > 0 ? options.num_threads
                                                               : NumUsableCores());
}

}  // namespace mobi
