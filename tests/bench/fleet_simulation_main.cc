// fleet-simulation: replicas behind a load balancer, scaled by the chart's ScaledObject, each with
// the server's own precision controller, on a trace of requests. Compares replicas only, precision
// only, and both, by replica-seconds, objectives met and bits. Time is simulated; a step's duration
// is read from a measured surface. What the model leaves out is in deploy/simulation/README.md.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <fstream>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "engine/base/flags.h"
#include "engine/base/status_macros.h"
#include "server/loadgen/trace.h"
#include "server/policy_file.h"
#include "server/pressure.h"
#include "server/pressure_signals.h"
#include "server/pressure_surface.h"
#include "tests/server/simulated_server.h"

ABSL_FLAG(std::string, trace, "", "CSV of TIMESTAMP,ContextTokens,GeneratedTokens.");
ABSL_FLAG(std::string, surface, "", "Step latency by bits and tokens (JSON).");
ABSL_FLAG(std::string, policy, "", "Policy file; its first window is in force throughout.");
ABSL_FLAG(int, load, 1, "Requests of the trace are sent so many times.");
ABSL_FLAG(int, min_replicas, 1, "Of the ScaledObject.");
ABSL_FLAG(int, max_replicas, 16, "Of the ScaledObject.");
ABSL_FLAG(double, replica_start_s, 120, "From the decision to a ready replica.");
ABSL_FLAG(double, queue_depth, 4, "Waiting requests that one replica may have.");
ABSL_FLAG(double, bits_deficit, 0.5, "Deficit that one replica may have.");
ABSL_FLAG(int, max_num_seqs, 64, "Sequences in one step.");
ABSL_FLAG(int, max_num_batched_tokens, 512, "Tokens in one step.");
ABSL_FLAG(int, kv_tokens, 262144, "Tokens of context that fit into one replica.");
ABSL_FLAG(std::string, csv, "", "Writes time series of each run to PREFIX-RUN.csv.");

namespace {

using namespace mobi;

constexpr double kTick = 0.05;            // of the controller
constexpr double kPoll = 15;              // of the autoscaler
constexpr double kAverage = 60;           // avg_over_time of its queries
constexpr double kStabilization = 300;    // of scaling down
constexpr double kScaleDownPeriod = 120;  // one replica at most in such a time
constexpr double kTolerance = 0.1;        // of the autoscaler around its threshold
constexpr double kMaxQueueWait = 10;
constexpr double kWarmUp = 600;  // not measured

// A server with its own outer loop; the inner one is taken to hold its target.
class Replica {
 public:
  Replica(const SimulatedServerOptions& options, const StepSurface& surface, const Policy& policy,
          bool elastic)
      : surface_(surface),
        policy_(policy),
        window_(policy.windows.front()),
        elastic_(elastic),
        server_(options) {
    server_.SetBits(window_.ceiling_bits);
    state_.target_bits = window_.ceiling_bits;
  }

  SimulatedServer& server() { return server_; }
  const SimulatedServer& server() const { return server_; }
  // A replica that has computed nothing within the query's range does not count.
  double deficit(double time) const {
    const double range = window_.ceiling_bits - window_.floor_bits;
    const bool idle = server_.last_work() < time - kAverage;
    return idle || range <= 0 ? 0 : (window_.ceiling_bits - server_.bits()) / range;
  }

  void Control(double time) {
    if (!elastic_) return;
    const TimePoint now{std::chrono::duration_cast<Duration>(std::chrono::duration<double>(time))};
    reader_.Add(now, server_.sample());
    const auto readings = reader_.Read(policy_.AllSignals(), {});
    state_ = UpdatePressure({},
                            {.floor_bits = window_.floor_bits,
                             .ceiling_bits = window_.ceiling_bits,
                             .readings = readings,
                             .surface = &surface_,
                             .step_tokens = reader_.step_tokens()},
                            now, state_);
    server_.SetBits(state_.target_bits);
  }

 private:
  const StepSurface& surface_;
  const Policy& policy_;
  const PolicyWindow& window_;
  const bool elastic_;
  SimulatedServer server_;
  SignalReader reader_;
  PressureState state_;
};

// The HorizontalPodAutoscaler that KEDA makes of the chart's two triggers.
class Autoscaler {
 public:
  // Once a second, with sums over replicas, as Prometheus would hold them.
  void Observe(double waiting, double deficit) {
    Add(waiting_, waiting);
    Add(deficit_, deficit);
  }

  int Decide(double time, int replicas) {
    const int wanted =
        std::max(Wanted(Mean(waiting_), absl::GetFlag(FLAGS_queue_depth), replicas),
                 Wanted(Mean(deficit_), absl::GetFlag(FLAGS_bits_deficit), replicas));
    recent_.push_back({time, std::clamp(wanted, absl::GetFlag(FLAGS_min_replicas),
                                        absl::GetFlag(FLAGS_max_replicas))});
    while (recent_.front().first < time - kStabilization) recent_.pop_front();
    const int now = recent_.back().second;
    // At most doubled, or four more, every 15 s: the autoscaler's default.
    if (now > replicas) return std::min(now, std::max(2 * replicas, replicas + 4));
    int most = now;
    for (const auto& [when, count] : recent_) most = std::max(most, count);
    if (most >= replicas || time < scaled_down_ + kScaleDownPeriod) return replicas;
    scaled_down_ = time;
    return replicas - 1;
  }

 private:
  static void Add(std::deque<double>& values, double value) {
    values.push_back(value);
    if (values.size() > kAverage) values.pop_front();
  }
  static double Mean(const std::deque<double>& values) {
    if (values.empty()) return 0;
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  }
  static int Wanted(double sum, double threshold, int replicas) {
    if (std::abs(sum / (threshold * replicas) - 1) <= kTolerance) return replicas;
    return static_cast<int>(std::ceil(sum / threshold));
  }

  std::deque<double> waiting_, deficit_;
  std::deque<std::pair<double, int>> recent_;
  double scaled_down_ = -kScaleDownPeriod;
};

struct Run {
  const char* name;
  bool elastic;
  bool scaled;
};

class Fleet {
 public:
  Fleet(const Run& run, const SimulatedServerOptions& options, const StepSurface& surface,
        const Policy& policy)
      : run_(run), options_(options), surface_(surface), policy_(policy) {
    while (static_cast<int>(ready_.size()) < absl::GetFlag(FLAGS_min_replicas))
      ready_.push_back(New());
    if (const std::string prefix = absl::GetFlag(FLAGS_csv); !prefix.empty()) {
      csv_.open(absl::StrCat(prefix, "-", run.name, ".csv"));
      csv_ << "seconds,replicas,ready,waiting,bits,requests_per_second\n";
    }
  }

  void Simulate(const std::vector<SimulatedRequest>& requests) {
    size_t next = 0;
    const double end = requests.back().arrival;
    for (int64_t tick = 1; tick * kTick <= end; ++tick) {
      const double time = static_cast<double>(tick) * kTick;
      for (; next < requests.size() && requests[next].arrival <= time; ++next) {
        // Round robin over ready replicas, as clients of a headless service do.
        ready_[turn_++ % ready_.size()]->server().Submit(requests[next]);
        ++arrived_;
      }
      for (auto* group : {&ready_, &leaving_}) {
        for (auto& replica : *group) {
          replica->server().RunUntil(time);
          replica->Control(time);
        }
      }
      std::erase_if(leaving_, [this](const auto& replica) {
        if (!replica->server().idle()) return false;
        outcome_ += replica->server().outcome();
        return true;
      });
      if (time > kWarmUp) replica_seconds_ += kTick * replicas();
      if (tick % std::lround(1 / kTick) == 0) EverySecond(time);
    }
    for (const auto* group : {&ready_, &leaving_}) {
      for (const auto& replica : *group) outcome_ += replica->server().outcome();
    }
  }

  const SimulatedOutcome& outcome() const { return outcome_; }
  double replica_seconds() const { return replica_seconds_; }
  int most_replicas() const { return most_replicas_; }

 private:
  std::unique_ptr<Replica> New() const {
    return std::make_unique<Replica>(options_, surface_, policy_, run_.elastic);
  }
  // Those that are paid for.
  int replicas() const {
    return static_cast<int>(ready_.size() + leaving_.size() + starting_.size());
  }

  void EverySecond(double time) {
    double waiting = 0, deficit = 0, bits = 0;
    for (const auto& replica : ready_) {
      waiting += replica->server().waiting();
      deficit += replica->deficit(time);
      bits += replica->server().bits();
    }
    const double mean_bits = bits / static_cast<double>(ready_.size());
    scaler_.Observe(waiting, deficit);
    std::erase_if(starting_, [&](double ready_at) {
      if (ready_at > time) return false;
      ready_.push_back(New());
      return true;
    });
    if (run_.scaled && std::fmod(time, kPoll) < 0.5) Scale(time);
    most_replicas_ = std::max(most_replicas_, replicas());
    if (csv_.is_open() && std::fmod(time, 5) < 0.5) {
      csv_ << std::lround(time) << ',' << replicas() << ',' << ready_.size() << ',' << waiting
           << ',' << mean_bits << ',' << arrived_ / 5.0 << '\n';
      arrived_ = 0;
    }
  }

  void Scale(double time) {
    const int now = static_cast<int>(ready_.size() + starting_.size());
    const int wanted = scaler_.Decide(time, now);
    for (int i = now; i < wanted; ++i) {
      starting_.push_back(time + absl::GetFlag(FLAGS_replica_start_s));
    }
    for (int i = now; i > wanted; --i) {
      if (!starting_.empty()) {
        starting_.pop_back();
      } else if (ready_.size() > 1) {
        leaving_.push_back(std::move(ready_.back()));
        ready_.pop_back();
      }
    }
  }

  const Run run_;
  const SimulatedServerOptions options_;
  const StepSurface& surface_;
  const Policy& policy_;
  std::vector<std::unique_ptr<Replica>> ready_, leaving_;
  std::vector<double> starting_;  // when each is ready
  Autoscaler scaler_;
  SimulatedOutcome outcome_;
  double replica_seconds_ = 0;
  int most_replicas_ = 0;
  size_t turn_ = 0;
  int arrived_ = 0;
  std::ofstream csv_;
};

// Copies follow at even distances within a second, so that no two come at once.
std::vector<SimulatedRequest> Requests(absl::Span<const TraceRow> rows, int copies) {
  std::vector<SimulatedRequest> requests;
  for (const TraceRow& row : rows) {
    for (int copy = 0; copy < copies; ++copy) {
      requests.push_back({.arrival = row.seconds + static_cast<double>(copy) / copies,
                          .prompt_tokens = std::max(row.context_tokens, 1),
                          .output_tokens = std::max(row.generated_tokens, 1)});
    }
  }
  std::sort(requests.begin(), requests.end(),
            [](const auto& a, const auto& b) { return a.arrival < b.arrival; });
  return requests;
}

SimulatedServerOptions ServerOptionsFor(const StepSurface& surface, const LatencyObjectives& slo) {
  SimulatedServerOptions options;
  options.max_seqs = absl::GetFlag(FLAGS_max_num_seqs);
  options.max_step_tokens = absl::GetFlag(FLAGS_max_num_batched_tokens);
  options.num_kv_blocks = absl::GetFlag(FLAGS_kv_tokens) / options.block_size;
  options.step_seconds = [&surface](double bits, int decodes, int prompt_tokens) {
    return surface.StepMs(bits, decodes + prompt_tokens) * 1e-3;
  };
  if (slo.ttft_p95_ms) options.ttft_objective_seconds = *slo.ttft_p95_ms * 1e-3;
  if (slo.itl_p95_ms) options.itl_objective_seconds = *slo.itl_p95_ms * 1e-3;
  options.max_queue_wait = kMaxQueueWait;
  options.count_from = kWarmUp;
  return options;
}

absl::Status Simulate() {
  MOBI_ASSIGN_OR_RETURN(const auto rows, ReadTrace(absl::GetFlag(FLAGS_trace)));
  if (absl::GetFlag(FLAGS_load) < 1 || absl::GetFlag(FLAGS_min_replicas) < 1) {
    return absl::InvalidArgumentError("--load and --min_replicas: must be at least 1");
  }
  const std::vector<SimulatedRequest> requests = Requests(rows, absl::GetFlag(FLAGS_load));
  MOBI_ASSIGN_OR_RETURN(const StepSurface surface, StepSurface::Load(absl::GetFlag(FLAGS_surface)));
  MOBI_ASSIGN_OR_RETURN(const PolicyText policy, ReadPolicyFile(absl::GetFlag(FLAGS_policy)));
  const SimulatedServerOptions options = ServerOptionsFor(surface, policy.policy.slo);
  std::printf("%zu requests in %.0f s; first token within %.0f ms, later ones within %.0f ms\n",
              requests.size(), requests.back().arrival, options.ttft_objective_seconds * 1e3,
              options.itl_objective_seconds * 1e3);
  std::printf("%-10s %15s %5s %12s %12s %8s %6s\n", "run", "replica-seconds", "most", "ttft met %",
              "itl met %", "refused", "bits");
  constexpr Run kRuns[] = {{"fixed", false, false},
                           {"replicas", false, true},
                           {"precision", true, false},
                           {"both", true, true}};
  for (const Run& run : kRuns) {
    Fleet fleet(run, options, surface, policy.policy);
    fleet.Simulate(requests);
    const SimulatedOutcome& o = fleet.outcome();
    std::printf("%-10s %15.0f %5d %12.2f %12.2f %8lld %6.2f\n", run.name, fleet.replica_seconds(),
                fleet.most_replicas(), 100 * o.ttft_attainment(), 100 * o.itl_attainment(),
                static_cast<long long>(o.refused), o.mean_bits());
  }
  return absl::OkStatus();
}

}  // namespace

int main(int argc, char** argv) {
  if (PrintedHelp(argc, argv, "fleet-simulation --trace CSV --surface JSON --policy YAML [flags]\n",
                  __FILE__))
    return 0;
  const auto arguments = ParseFlags(argc, argv, __FILE__);
  const absl::Status status = arguments.ok() ? Simulate() : arguments.status();
  if (status.ok()) return 0;
  std::fprintf(stderr, "fleet-simulation: %s\n", std::string(status.message()).c_str());
  return kExitUsage;
}
