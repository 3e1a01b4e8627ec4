// A backend that passes everything on to another and tells what each part of a step costs: on a
// backend whose ops return when they are done, by the clock; elsewhere, by leaving one part out and
// timing the step without it, overlap included. One thread.
#ifndef MOBI_TESTS_BENCH_PARTS_BACKEND_H_
#define MOBI_TESTS_BENCH_PARTS_BACKEND_H_

#include <array>
#include <memory>
#include <optional>
#include <utility>

#include "engine/base/clock.h"
#include "kernels/backend.h"
#include "tests/engine/forwarding_backend.h"

namespace mobi {

enum class Part { kLinears, kRouter, kAttention, kNorms, kLmHead, kSampling };
inline constexpr int kNumParts = 6;
inline constexpr std::array<const char*, kNumParts> kPartNames = {"linears", "router",  "attention",
                                                                  "norms",   "lm_head", "sampling"};

class PartsBackend final : public ForwardingBackend {
 public:
  // Products with `vocab_size` outputs are lm_head's.
  PartsBackend(std::unique_ptr<Backend> inner, int vocab_size)
      : ForwardingBackend(std::move(inner)), vocab_size_(vocab_size) {}

  // From now on steps lack this part; their results mean nothing.
  void Omit(std::optional<Part> part) { omitted_ = part; }
  // Since the last call, by part. Nothing where ops run on after they return.
  std::array<double, kNumParts> TakeSeconds() { return std::exchange(seconds_, {}); }

  void RunStep(const StepKey& key, absl::FunctionRef<void()> body) override;

  void Embed(Tensor table, const int32_t* ids, Tensor out) override;
  void RmsNorm(Tensor x, Tensor weight, float eps, Tensor out) override;
  void AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out) override;
  void Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch, uint8_t* levels,
             int64_t levels_stride) override;
  void SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                    int64_t levels_stride, Tensor out) override;
  void DenseMatmul(Tensor x, Tensor weight, Tensor out) override;
  void RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                      const int32_t* slots, const AttentionShape& shape, KvLayer kv) override;
  void Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
                 const AttentionShape& shape, Tensor out) override;
  void SwiGlu(Tensor gate_up, Tensor out) override;
  void GatherRows(Tensor x, const int32_t* rows, Tensor out) override;
  void Sample(Tensor logits, const SamplingBatch& batch, Sampled* out) override;
  void TokenLogprobs(Tensor logits, const int32_t* ids, float* out) override;
  void MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count,
                  TopLogprobs* out) override;

 private:
  template <typename Op>
  void Do(Part part, Op&& op) {
    if (omitted_ == part) return;
    const TimePoint begin = clock_.Now();
    op();
    seconds_[static_cast<int>(part)] += ToSeconds(clock_.Now() - begin);
  }

  const RealClock clock_;
  const int vocab_size_;
  std::optional<Part> omitted_;
  std::array<double, kNumParts> seconds_{};
};

}  // namespace mobi

#endif  // MOBI_TESTS_BENCH_PARTS_BACKEND_H_
