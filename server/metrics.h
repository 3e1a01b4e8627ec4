// The one place that names metrics. Counts what happens to requests (lock-free, so the engine's
// thread may report), and at a scrape joins it with snapshots of engine and controller. Names are
// an API: vllm:* are those that dashboards and endpoint pickers know, mobi_* are ours. Thread-safe.
#ifndef MOBI_SERVER_METRICS_H_
#define MOBI_SERVER_METRICS_H_

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/mutex.h"
#include "engine/engine.h"
#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"
#include "server/controller.h"
#include "server/latency_histogram.h"

namespace prometheus {
class Exposer;
}

namespace mobi {

// RPCs that are counted by status.
enum class Method { kGenerate, kTokenize, kDetokenize, kGetModel, kPrecision, kVllm, kKserve };
inline constexpr int kNumMethods = 7;
inline constexpr int kNumStatusCodes = 17;

// Files that are taken over again when they change.
enum class AccessFiles { kTls, kTokens };

class Metrics final : public prometheus::Collectable {
 public:
  // What a scrape asks for; called on the scraping thread.
  struct Sources {
    std::function<ControlStatus()> control;
    std::function<bool()> ready;
    std::function<int()> active_calls;
  };

  explicit Metrics(Sources sources);

  // Once the model is known: the label model_name, and what the cache is made of.
  void SetModel(const std::string& model_name, int block_size, int num_kv_blocks);

  LatencyHistogram time_to_first_token;
  LatencyHistogram inter_token_latency;
  LatencyHistogram request_latency;
  LatencyHistogram queue_time;
  LatencyHistogram prefill_time;
  LatencyHistogram decode_time;

  void RequestEnded(Method method, absl::StatusCode code) {
    requests_[static_cast<int>(method)][static_cast<int>(code)].fetch_add(
        1, std::memory_order_relaxed);
  }
  // kStop, kLength; everything else counts as an abort.
  void CompletionEnded(FinishReason reason);
  void AccessReloaded(AccessFiles files, bool ok) {
    access_reloads_[static_cast<int>(files)][ok ? 0 : 1].fetch_add(1, std::memory_order_relaxed);
  }
  void OutboxOverflowed() { outbox_overflows_.fetch_add(1, std::memory_order_relaxed); }
  void WriteStalled() { write_stalls_.fetch_add(1, std::memory_order_relaxed); }

  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  using Families = std::vector<prometheus::MetricFamily>;
  void AddVllm(const ControlStatus& control, Families& families) const;
  void AddPrecision(const ControlStatus& control, Families& families) const;
  static void AddTokensByLevel(const EngineStats& stats, Families& families);
  static void AddResidency(const EngineStats& stats, Families& families);
  static void AddSignals(const ControlStatus& control, Families& families);
  static void AddPolicyReloads(const PolicyReloads& reloads, Families& families);
  void AddServer(const ControlStatus& control, Families& families) const;

  const Sources sources_;
  std::array<std::array<std::atomic<uint64_t>, kNumStatusCodes>, kNumMethods> requests_{};
  std::array<std::atomic<uint64_t>, 3> completions_{};  // stop, length, abort
  // By files, then applied and refused.
  std::array<std::array<std::atomic<uint64_t>, 2>, 2> access_reloads_{};
  std::atomic<uint64_t> outbox_overflows_{0};
  std::atomic<uint64_t> write_stalls_{0};
  mutable Mutex mutex_;
  std::string model_name_ ABSL_GUARDED_BY(mutex_);
  int block_size_ ABSL_GUARDED_BY(mutex_) = 0;
  int num_kv_blocks_ ABSL_GUARDED_BY(mutex_) = 0;
};

// An HTTP server with /metrics.
class MetricsServer {
 public:
  // UNAVAILABLE: the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(
      const std::string& address, const std::shared_ptr<Metrics>& metrics);
  ~MetricsServer();

  int port() const { return port_; }

 private:
  explicit MetricsServer(std::unique_ptr<prometheus::Exposer> exposer);

  std::unique_ptr<prometheus::Exposer> exposer_;
  int port_ = 0;
};

}  // namespace mobi

#endif  // MOBI_SERVER_METRICS_H_
