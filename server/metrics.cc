#include "server/metrics.h"

#include <exception>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "prometheus/exposer.h"
#include "server/version.h"

namespace mobi {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

constexpr const char* kMethodNames[kNumMethods] = {
    "Generate", "Tokenize", "Detokenize", "GetModel", "Precision", "VllmEngine", "KServe"};

MetricFamily Family(std::string name, std::string help, MetricType type) {
  MetricFamily family;
  family.name = std::move(name);
  family.help = std::move(help);
  family.type = type;
  return family;
}

void AddValue(MetricFamily& family, double value, Labels labels) {
  ClientMetric metric;
  metric.label = std::move(labels);
  (family.type == MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
  family.metric.push_back(std::move(metric));
}

// Families with one series each, all with the same labels.
class Series {
 public:
  Series(std::vector<MetricFamily>& families, Labels labels)
      : families_(families), labels_(std::move(labels)) {}

  void Gauge(const char* name, const char* help, double value) {
    Add(name, help, MetricType::Gauge, value);
  }
  void Counter(const char* name, const char* help, double value) {
    Add(name, help, MetricType::Counter, value);
  }
  void Histogram(const char* name, const char* help, const LatencyHistogram& histogram) {
    const LatencyCounts counts = histogram.counts();
    ClientMetric metric;
    metric.label = labels_;
    for (size_t i = 0; i < counts.buckets.size(); ++i) {
      metric.histogram.sample_count += counts.buckets[i];
      const double bound =
          i < kLatencyBounds.size() ? kLatencyBounds[i] : std::numeric_limits<double>::infinity();
      metric.histogram.bucket.push_back({metric.histogram.sample_count, bound});
    }
    metric.histogram.sample_sum = counts.sum_seconds;
    families_.push_back(Family(name, help, MetricType::Histogram));
    families_.back().metric.push_back(std::move(metric));
  }
  const Labels& labels() const { return labels_; }

 private:
  void Add(const char* name, const char* help, MetricType type, double value) {
    families_.push_back(Family(name, help, type));
    AddValue(families_.back(), value, labels_);
  }

  std::vector<MetricFamily>& families_;
  const Labels labels_;
};

double KvUsage(const EngineStats& stats) {
  if (stats.num_kv_blocks == 0) return 0;
  return 1.0 - static_cast<double>(stats.free_kv_blocks) / stats.num_kv_blocks;
}

const char* ModeName(ControlMode mode) {
  switch (mode) {
    case ControlMode::kFixed:
      return "fixed";
    case ControlMode::kPolicy:
      return "policy";
    case ControlMode::kOverride:
      return "override";
  }
  return "";
}

}  // namespace

Metrics::Metrics(Sources sources) : sources_(std::move(sources)) {}

void Metrics::SetModel(const std::string& model_name, int block_size, int num_kv_blocks) {
  MutexLock lock(mutex_);
  model_name_ = model_name;
  block_size_ = block_size;
  num_kv_blocks_ = num_kv_blocks;
}

void Metrics::CompletionEnded(FinishReason reason) {
  const int index = reason == FinishReason::kStop ? 0 : reason == FinishReason::kLength ? 1 : 2;
  completions_[index].fetch_add(1, std::memory_order_relaxed);
}

std::vector<MetricFamily> Metrics::Collect() const {
  Families families;
  const ControlStatus control = sources_.control();
  AddVllm(control, families);
  AddPrecision(control, families);
  AddServer(control, families);
  return families;
}

void Metrics::AddVllm(const ControlStatus& control, Families& families) const {
  std::string model_name;
  int block_size = 0;
  int num_kv_blocks = 0;
  {
    MutexLock lock(mutex_);
    model_name = model_name_;
    block_size = block_size_;
    num_kv_blocks = num_kv_blocks_;
  }
  const EngineStats& stats = control.engine;
  Series series(families, {{"model_name", model_name}});
  series.Gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting_requests);
  series.Gauge("vllm:num_requests_running", "Requests in the running batch.",
               stats.running_requests);
  series.Gauge("vllm:kv_cache_usage_perc", "KV blocks in use, 1 is all of them.", KvUsage(stats));
  series.Counter("vllm:prompt_tokens_total", "Prompt tokens computed.",
                 static_cast<double>(stats.prompt_tokens));
  series.Counter("vllm:generation_tokens_total", "Tokens generated.",
                 static_cast<double>(stats.generation_tokens));
  series.Counter("vllm:num_preemptions_total", "Sequences whose blocks were taken away.",
                 static_cast<double>(stats.preemptions));
  series.Counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.",
                 static_cast<double>(stats.prefix_cache_queries));
  series.Counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.",
                 static_cast<double>(stats.prefix_cache_hits));
  series.Histogram("vllm:time_to_first_token_seconds", "Arrival to first token.",
                   time_to_first_token);
  series.Histogram("vllm:inter_token_latency_seconds", "Between tokens of one completion.",
                   inter_token_latency);
  series.Histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", request_latency);
  series.Histogram("vllm:request_queue_time_seconds", "Arrival to first scheduled.", queue_time);
  series.Histogram("vllm:request_prefill_time_seconds", "First scheduled to first token.",
                   prefill_time);
  series.Histogram("vllm:request_decode_time_seconds", "First token to last.", decode_time);

  families.push_back(
      Family("vllm:request_success_total", "Completions by how they ended.", MetricType::Counter));
  constexpr const char* kReasons[] = {"stop", "length", "abort"};
  for (size_t i = 0; i < completions_.size(); ++i) {
    AddValue(families.back(), static_cast<double>(completions_[i].load(std::memory_order_relaxed)),
             {{"model_name", model_name}, {"finished_reason", kReasons[i]}});
  }
  families.push_back(
      Family("vllm:cache_config_info", "What the KV cache is made of.", MetricType::Gauge));
  AddValue(families.back(), 1,
           {{"model_name", model_name},
            {"block_size", absl::StrCat(block_size)},
            {"num_gpu_blocks", absl::StrCat(num_kv_blocks)}});
}

void Metrics::AddPrecision(const ControlStatus& control, Families& families) const {
  const EngineStats& stats = control.engine;
  Series series(families, {});
  series.Gauge("mobi_target_bits", "Average bits per weight asked of the engine.",
               control.target_bits);
  series.Gauge("mobi_effective_bits", "Average bits per weight that tokens used, last second.",
               control.effective_bits);
  series.Gauge("mobi_loaded_bits", "Bits per weight that memory moved per step, last second.",
               control.loaded_bits);
  series.Gauge("mobi_decode_loaded_bits", "The same over steps without prompts.",
               control.decode_loaded_bits);
  series.Counter(
      "mobi_effective_bits_sum_total",
      "Effective bits summed over computed tokens; divide by mobi_computed_tokens_total.",
      stats.effective_bits_sum);
  series.Counter("mobi_computed_tokens_total", "Prompt and completion tokens computed.",
                 static_cast<double>(stats.effective_tokens));
  AddTokensByLevel(stats, families);
  series.Gauge("mobi_price", "Loss per byte below which a slice is not read.", control.price);
  series.Gauge("mobi_log_price_trim", "Correction of log(price) by the tracking loop, for decodes.",
               control.log_price_trim[Regime::kDecode]);
  series.Gauge("mobi_prompt_log_price_trim", "The same for prompt tokens.",
               control.log_price_trim[Regime::kPrompt]);
  series.Gauge("mobi_coherent_log_price_trim", "The same for decodes that share a level.",
               control.log_price_trim[Regime::kCoherent]);
  series.Gauge("mobi_precision_saturated", "1: the target is out of the tracking loop's reach.",
               control.saturated);
  series.Gauge("mobi_window_floor_bits", "Floor of the policy's window.",
               control.window.floor_bits);
  series.Gauge("mobi_window_ceiling_bits", "Ceiling of the policy's window.",
               control.window.ceiling_bits);
  series.Gauge(
      "mobi_bits_deficit",
      "(ceiling - effective) / (ceiling - floor): what load costs in quality; 0 when idle.",
      control.bits_deficit);
  series.Counter("mobi_seconds_below_floor_total", "Time with effective bits below the floor.",
                 control.seconds_below_floor);
  families.push_back(Family("mobi_policy_info", "The policy in force.", MetricType::Gauge));
  AddValue(families.back(), 1,
           {{"window", control.window.name},
            {"mode", ModeName(control.mode)},
            {"generation", absl::StrCat(control.policy_generation)}});
  AddPolicyReloads(control.policy_reloads, families);
  AddResidency(stats, families);
  AddSignals(control, families);
}

void Metrics::AddTokensByLevel(const EngineStats& stats, Families& families) {
  families.push_back(
      Family("mobi_tokens_total",
             "Computed tokens by phase and by the level (2 bits each) nearest to what they used.",
             MetricType::Counter));
  for (const Phase phase : {Phase::kPrefill, Phase::kDecode}) {
    const LevelTokens& tokens = stats.tokens_by_level[static_cast<int>(phase)];
    for (int level = 1; level <= kNumLevels; ++level) {
      AddValue(families.back(), static_cast<double>(tokens[level - 1]),
               {{"phase", phase == Phase::kPrefill ? "prefill" : "decode"},
                {"level", absl::StrCat(level)}});
    }
  }
}

void Metrics::AddResidency(const EngineStats& stats, Families& families) {
  Series series(families, {});
  series.Gauge("mobi_resident_bits", "Bits of the slices in memory; no token reads more.",
               BitsOfLevel(stats.resident_levels));
  series.Gauge("mobi_resident_slice_bytes", "Memory of the slices and their scales.",
               static_cast<double>(stats.resident_slice_bytes));
  series.Gauge("mobi_kv_blocks", "KV blocks that there are, lent ones included.",
               stats.num_kv_blocks);
  series.Gauge("mobi_lent_kv_blocks", "KV blocks in the memory of slices that are away.",
               stats.lent_kv_blocks);
  series.Counter("mobi_slice_change_seconds_total",
                 "Time from deciding that slices leave or return until they had.",
                 stats.slice_change_seconds_sum);
  series.Gauge("mobi_last_slice_change_seconds", "The same of the last change.",
               stats.last_slice_change_seconds);
  families.push_back(Family("mobi_slice_changes_total",
                            "Levels whose slices left memory or returned.", MetricType::Counter));
  AddValue(families.back(), static_cast<double>(stats.slice_drops), {{"change", "leave"}});
  AddValue(families.back(), static_cast<double>(stats.slice_restores), {{"change", "return"}});
}

void Metrics::AddSignals(const ControlStatus& control, Families& families) {
  Series series(families, {});
  series.Gauge("mobi_pressure", "The largest of the signals' pressures; 1 is where one is met.",
               control.pressure);
  series.Gauge("mobi_kept_bits",
               "Bits that pressure asked for and that were kept, since fewer would be no faster.",
               control.kept_bits);
  const auto add = [&](const char* name, const char* help, auto&& value) {
    families.push_back(Family(name, help, MetricType::Gauge));
    for (const SignalPressure& signal : control.signals) {
      AddValue(families.back(), value(signal), {{"signal", signal.name}});
    }
  };
  add("mobi_signal_pressure", "value / reference, smoothed.",
      [](const SignalPressure& signal) { return signal.pressure; });
  add("mobi_signal_value", "A load signal as it was read.",
      [](const SignalPressure& signal) { return signal.value; });
  add("mobi_signal_reference", "The value of a signal that makes a pressure of 1.",
      [](const SignalPressure& signal) { return signal.reference; });
  add("mobi_signal_stale", "1: there is no value, and the policy's default pressure is assumed.",
      [](const SignalPressure& signal) { return signal.stale ? 1.0 : 0.0; });
  families.push_back(
      Family("mobi_promql_queries_total", "Questions to Prometheus.", MetricType::Counter));
  for (const auto& [name, counts] : control.promql) {
    AddValue(families.back(), static_cast<double>(counts.queries), {{"signal", name}});
  }
  families.push_back(Family("mobi_promql_errors_total", "Questions to Prometheus without a value.",
                            MetricType::Counter));
  for (const auto& [name, counts] : control.promql) {
    for (int error = 0; error < kNumPromqlErrors; ++error) {
      AddValue(families.back(), static_cast<double>(counts.errors[error]),
               {{"signal", name}, {"reason", PromqlErrorName(static_cast<PromqlError>(error))}});
    }
  }
}

void Metrics::AddPolicyReloads(const PolicyReloads& reloads, Families& families) {
  Series series(families, {});
  series.Gauge("mobi_policy_reload_success", "0: the last reload of the policy file was refused.",
               reloads.last.ok());
  series.Gauge("mobi_policy_last_applied_timestamp_seconds",
               "When the policy file was last applied by a reload; 0 for never.",
               std::chrono::duration<double>(reloads.last_applied.time_since_epoch()).count());
  families.push_back(Family("mobi_policy_reloads_total", "Reloads of the policy file by result.",
                            MetricType::Counter));
  AddValue(families.back(), static_cast<double>(reloads.applied), {{"result", "applied"}});
  AddValue(families.back(), static_cast<double>(reloads.refused), {{"result", "refused"}});
}

void Metrics::AddServer(const ControlStatus& control, Families& families) const {
  const EngineStats& stats = control.engine;
  Series series(families, {});
  series.Counter("mobi_engine_steps_total", "Steps of the engine.",
                 static_cast<double>(stats.steps));
  series.Counter("mobi_engine_step_seconds_total", "Time spent in steps.", stats.step_seconds_sum);
  series.Gauge("mobi_engine_last_step_seconds", "Duration of the last step.",
               stats.last_step_seconds);
  series.Gauge("mobi_waiting_prompt_tokens", "Prompt tokens in the queue.",
               static_cast<double>(stats.waiting_tokens));
  series.Gauge("mobi_ready", "1: takes requests.", sources_.ready());
  series.Gauge("mobi_active_calls", "Generate calls that were let in and have not ended.",
               sources_.active_calls());
  series.Counter("mobi_outbox_overflows_total", "Calls ended because the client read too slowly.",
                 static_cast<double>(outbox_overflows_.load(std::memory_order_relaxed)));
  series.Counter("mobi_write_stalls_total", "Calls ended because the client stopped reading.",
                 static_cast<double>(write_stalls_.load(std::memory_order_relaxed)));
  families.push_back(Family("mobi_access_reloads_total",
                            "Reloads of TLS and token files by result.", MetricType::Counter));
  for (int files = 0; files < 2; ++files) {
    for (int refused = 0; refused < 2; ++refused) {
      AddValue(families.back(),
               static_cast<double>(access_reloads_[files][refused].load(std::memory_order_relaxed)),
               {{"files", files == 0 ? "tls" : "tokens"},
                {"result", refused == 0 ? "applied" : "refused"}});
    }
  }
  families.push_back(Family("mobi_requests_total", "RPCs by status.", MetricType::Counter));
  for (int method = 0; method < kNumMethods; ++method) {
    for (int code = 0; code < kNumStatusCodes; ++code) {
      const uint64_t count = requests_[method][code].load(std::memory_order_relaxed);
      if (count == 0 && code != 0) continue;  // OK exists from the start, so rates have a zero
      AddValue(families.back(), static_cast<double>(count),
               {{"method", kMethodNames[method]},
                {"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(code))}});
    }
  }
  families.push_back(Family("mobi_build_info", "What runs.", MetricType::Gauge));
  AddValue(families.back(), 1, {{"version", kServerVersion}});
}

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(
    const std::string& address, const std::shared_ptr<Metrics>& metrics) {
  try {
    // The library throws when it cannot bind.
    auto exposer = std::make_unique<prometheus::Exposer>(address);
    exposer->RegisterCollectable(metrics);
    return std::unique_ptr<MetricsServer>(new MetricsServer(std::move(exposer)));
  } catch (const std::exception& error) {
    return absl::UnavailableError(absl::StrCat("metrics address ", address, ": ", error.what()));
  }
}

MetricsServer::MetricsServer(std::unique_ptr<prometheus::Exposer> exposer)
    : exposer_(std::move(exposer)) {
  const std::vector<int> ports = exposer_->GetListeningPorts();
  if (!ports.empty()) port_ = ports.front();
}

MetricsServer::~MetricsServer() = default;

}  // namespace mobi
