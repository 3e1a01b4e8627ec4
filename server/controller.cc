#include "server/controller.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "server/policy_yaml.h"
#include "server/rpc_status.h"

namespace mobi {
namespace {

// log(price) at `bits`, interpolated, clamped to the table's ends.
double LogPriceAt(absl::Span<const PricePoint> table, float bits) {
  auto log_price = [](const PricePoint& point) { return std::log(std::max(point.price, 1e-30f)); };
  auto above = std::find_if(table.begin(), table.end(),
                            [bits](const PricePoint& point) { return point.bits >= bits; });
  if (above == table.end()) return log_price(table.back());
  if (above == table.begin()) return log_price(table.front());
  const PricePoint& below = *(above - 1);
  const double part = (bits - below.bits) / (above->bits - below.bits);
  return log_price(below) + part * (log_price(*above) - log_price(below));
}

}  // namespace

float NatsPerBit(absl::Span<const PricePoint> price_table, float bits) {
  constexpr float kReach = 0.25f;
  constexpr float kLeast = 0.05f;  // flat pieces must not switch the loop off
  if (price_table.size() < 2) return 1;
  const float low = std::max(bits - kReach, price_table.front().bits);
  const float high = std::min(bits + kReach, price_table.back().bits);
  if (high <= low) return 1;
  const double fall = LogPriceAt(price_table, low) - LogPriceAt(price_table, high);
  return std::max(static_cast<float>(fall / (high - low)), kLeast);
}

LoadedPolicy PolicyFromFlags(float bits) {
  const Policy policy = FixedPolicy(bits);
  return {policy, FormatPolicy(policy), "flags"};
}

Controller::Controller(const ControllerOptions& options, LoadedPolicy policy, const Clock& clock,
                       std::unique_ptr<PromqlPoller> prometheus)
    : options_(options),
      clock_(clock),
      prometheus_(std::move(prometheus)),
      surface_(options.surface),
      signal_reader_(options.signals) {
  MutexLock lock(mutex_);
  PutInForceLocked(std::move(policy));
}

void Controller::WatchLatency(const LatencyHistogram& time_to_first_token,
                              const LatencyHistogram& inter_token_latency) {
  MutexLock lock(mutex_);
  time_to_first_token_ = &time_to_first_token;
  inter_token_latency_ = &inter_token_latency;
}

void Controller::Attach(Engine* engine, PriceTables prices, std::optional<StepSurface> surface) {
  MutexLock lock(mutex_);
  if (surface) surface_ = std::move(surface);
  engine_ = engine;
  prices_ = std::move(prices);
  status_.elastic = !prices_.token.empty();
  ApplyLocked();
}

void Controller::Tick() {
  MutexLock lock(mutex_);
  const TimePoint now = clock_.Now();
  if (override_ && now >= override_->until) override_.reset();
  if (engine_ == nullptr) return ChooseTargetLocked();
  const EngineStats stats = engine_->stats();
  FollowLoadLocked(now, stats);
  ChooseTargetLocked();
  if (status_.elastic) TrackLocked(now, stats);
  AverageLocked(now, stats);
}

PolicyVersion Controller::policy() const {
  MutexLock lock(mutex_);
  return policy_;
}

absl::Status Controller::Check(const Policy& policy) const {
  MOBI_RETURN_IF_ERROR(CheckPolicy(policy));
  if (prometheus_ != nullptr) return absl::OkStatus();
  for (const PolicySignal& signal : policy.signals) {
    if (signal.kind != SignalKind::kPromql) continue;
    return absl::FailedPreconditionError(
        absl::StrFormat("signal %s: the server was started without --prometheus_url", signal.name));
  }
  return absl::OkStatus();
}

absl::Status Controller::SetPolicy(LoadedPolicy policy,
                                   std::optional<uint64_t> expected_generation) {
  MOBI_RETURN_IF_ERROR(Check(policy.policy));
  MutexLock lock(mutex_);
  if (expected_generation && *expected_generation != policy_.generation) {
    return absl::AbortedError(
        absl::StrFormat("expected_generation: %d, but generation %d is in force",
                        *expected_generation, policy_.generation));
  }
  PutInForceLocked(std::move(policy));
  return absl::OkStatus();
}

absl::Status Controller::Override(float target_bits, Duration ttl) {
  if (!(target_bits >= kLowestBits && target_bits <= kHighestBits)) {
    return FieldError("target_bits", absl::StrFormat("%g is out of range [%g, %g]", target_bits,
                                                     kLowestBits, kHighestBits));
  }
  if (ttl < std::chrono::seconds(1) || ttl > options_.max_override) {
    return FieldError("ttl", absl::StrFormat("%g s is out of range [1 s, %g s]", ToSeconds(ttl),
                                             ToSeconds(options_.max_override)));
  }
  MutexLock lock(mutex_);
  const auto wall_ttl = std::chrono::duration_cast<WallTime::duration>(ttl);
  override_ = {target_bits, clock_.Now() + ttl, clock_.WallNow() + wall_ttl};
  ChooseTargetLocked();
  ApplyLocked();
  return absl::OkStatus();
}

void Controller::ClearOverride() {
  MutexLock lock(mutex_);
  override_.reset();
  ChooseTargetLocked();
  ApplyLocked();
}

ControlStatus Controller::status() const {
  MutexLock lock(mutex_);
  ControlStatus status = status_;
  status.time = clock_.WallNow();
  if (engine_ != nullptr) {
    status.engine = engine_->stats();
    status.price = status.engine.price;
  }
  if (prometheus_ != nullptr) status.promql = prometheus_->counts();
  return status;
}

void Controller::ReportReload(const absl::Status& status) {
  MutexLock lock(mutex_);
  PolicyReloads& reloads = status_.policy_reloads;
  ++(status.ok() ? reloads.applied : reloads.refused);
  if (status.ok()) reloads.last_applied = clock_.WallNow();
  reloads.last = status;
}

void Controller::PutInForceLocked(LoadedPolicy policy) {
  policy_ = {.policy = std::make_shared<const Policy>(std::move(policy.policy)),
             .yaml = std::move(policy.yaml),
             .source = std::move(policy.source),
             .generation = policy_.generation + 1,
             .applied_at = clock_.WallNow()};
  signals_ = policy_.policy->AllSignals();
  if (prometheus_ != nullptr) prometheus_->SetSignals(signals_);
  open_.reset();
  ChooseTargetLocked();
  ApplyLocked();
}

const PolicyWindow& Controller::WindowLocked() {
  const TimePoint monotonic = clock_.Now();
  schedule_clock_ =
      FollowWallClock(options_.schedule_clock, monotonic, clock_.WallNow(), schedule_clock_);
  const absl::Time now = absl::FromChrono(ScheduleNow(schedule_clock_, monotonic));
  if (!open_ || now >= open_->until || now < open_since_) {
    open_ = WindowAt(*policy_.policy, now);
    open_since_ = now;
    status_.window_until.reset();
    if (open_->until != absl::InfiniteFuture()) {
      status_.window_until = absl::ToChronoTime(open_->until);
    }
  }
  return policy_.policy->windows[open_->window];
}

void Controller::FollowLoadLocked(TimePoint now, const EngineStats& stats) {
  LoadSample sample{.stats = stats};
  if (time_to_first_token_ != nullptr) {
    sample.time_to_first_token = time_to_first_token_->counts();
    sample.inter_token_latency = inter_token_latency_->counts();
  }
  signal_reader_.Add(now, sample);
  const std::vector<SignalReading> readings = signal_reader_.Read(
      signals_, prometheus_ == nullptr ? std::map<std::string, double>() : prometheus_->Answers());
  const PolicyWindow& window = WindowLocked();
  const double integral = pressure_.integral;
  pressure_ = UpdatePressure(options_.pressure,
                             {.floor_bits = window.floor_bits,
                              .ceiling_bits = window.ceiling_bits,
                              .readings = readings,
                              .surface = surface_ ? &*surface_ : nullptr,
                              .step_tokens = signal_reader_.step_tokens()},
                             now, std::move(pressure_));
  if (override_) {
    // Load answers to the override now; afterwards bits move on from there.
    pressure_.integral = integral;
    pressure_.moving_bits = pressure_.target_bits =
        std::clamp(override_->target_bits, window.floor_bits, window.ceiling_bits);
  }
  status_.pressure = pressure_.pressure;
  status_.signals = pressure_.signals;
  status_.kept_bits = pressure_.kept_bits;
  status_.ttft_p95_ms = signal_reader_.ttft_p95_ms();
  status_.itl_p95_ms = signal_reader_.itl_p95_ms();
}

void Controller::ChooseTargetLocked() {
  const PolicyWindow& window = WindowLocked();
  status_.window = window;
  status_.policy_generation = policy_.generation;
  status_.override_until.reset();
  if (override_) {
    status_.mode = ControlMode::kOverride;
    status_.target_bits = override_->target_bits;
    status_.override_until = override_->until_wall;
    return;
  }
  const bool fixed = window.floor_bits == window.ceiling_bits;
  status_.mode = fixed ? ControlMode::kFixed : ControlMode::kPolicy;
  const float wanted = pressure_.updated ? pressure_.target_bits : window.ceiling_bits;
  status_.target_bits = std::clamp(wanted, window.floor_bits, window.ceiling_bits);
}

void Controller::TrackLocked(TimePoint now, const EngineStats& stats) {
  const float target = status_.target_bits;
  PerRegime<float> slope;
  slope[Regime::kPrompt] = slope[Regime::kDecode] = NatsPerBit(prices_.token, target);
  slope[Regime::kCoherent] = NatsPerBit(prices_.coherent, target);
  tracker_ = TrackBits(options_.tracker, slope, stats.tracked, now, tracker_);
  ApplyLocked();
}

void Controller::ApplyLocked() {
  status_.log_price_trim = tracker_.trim;
  status_.saturated = tracker_.saturated;
  if (engine_ == nullptr) return;
  engine_->SetPrecision({.target_bits = status_.target_bits,
                         .log_price_trim = tracker_.trim,
                         .floor_bits = status_.mode == ControlMode::kOverride
                                           ? status_.target_bits
                                           : status_.window.floor_bits});
}

void Controller::AverageLocked(TimePoint now, const EngineStats& stats) {
  const Sample last = samples_.empty() ? Sample{now, stats} : samples_.back();
  samples_.push_back({now, stats});
  while (samples_.size() > 2 && now - samples_[1].time >= options_.averaging) samples_.pop_front();
  const EngineStats& from = samples_.front().stats;
  const double seconds = ToSeconds(now - samples_.front().time);
  if (seconds <= 0) return;

  status_.tokens_per_second =
      static_cast<double>(stats.generation_tokens - from.generation_tokens) / seconds;
  status_.prompt_tokens_per_second =
      static_cast<double>(stats.prompt_tokens - from.prompt_tokens) / seconds;
  if (const auto tokens = stats.effective_tokens - from.effective_tokens; tokens > 0) {
    status_.effective_bits = static_cast<float>(
        (stats.effective_bits_sum - from.effective_bits_sum) / static_cast<double>(tokens));
  }
  if (const auto steps = static_cast<double>(stats.steps - from.steps); steps > 0) {
    status_.loaded_bits =
        static_cast<float>((stats.loaded_bits_sum - from.loaded_bits_sum) / steps);
    status_.step_seconds = (stats.step_seconds_sum - from.step_seconds_sum) / steps;
  }
  if (const auto steps = static_cast<double>(stats.decode_steps - from.decode_steps); steps > 0) {
    status_.decode_loaded_bits =
        static_cast<float>((stats.decode_loaded_bits_sum - from.decode_loaded_bits_sum) / steps);
  }
  const PolicyWindow& window = status_.window;
  const float range = window.ceiling_bits - window.floor_bits;
  // Bits of the past say nothing about an idle server; one whose step is long is not idle.
  const bool idle = stats.effective_tokens == from.effective_tokens &&
                    stats.running_requests == 0 && stats.waiting_requests == 0;
  const bool measured = stats.effective_tokens > 0;
  status_.bits_deficit =
      idle || !measured || range <= 0
          ? 0
          : std::clamp((window.ceiling_bits - status_.effective_bits) / range, 0.f, 1.f);
  const bool worked = stats.effective_tokens > last.stats.effective_tokens;
  if (worked && status_.effective_bits < window.floor_bits - options_.below_floor_margin) {
    status_.seconds_below_floor += ToSeconds(now - last.time);
  }
}

}  // namespace mobi
