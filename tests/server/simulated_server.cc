#include "tests/server/simulated_server.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace mobi {
namespace {

Duration Seconds(double seconds) { return Duration(static_cast<int64_t>(seconds * 1e9)); }

int DrawLength(std::mt19937_64& rng, double mean, int most) {
  constexpr double kSigma = 0.6;
  std::lognormal_distribution<double> length(std::log(mean) - kSigma * kSigma / 2, kSigma);
  return std::clamp(static_cast<int>(length(rng)), 1, most);
}

double Part(int64_t part, int64_t whole) {
  return whole == 0 ? 1 : static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

SimulatedOutcome& SimulatedOutcome::operator+=(const SimulatedOutcome& other) {
  first_tokens += other.first_tokens;
  first_in_time += other.first_in_time;
  later_tokens += other.later_tokens;
  later_in_time += other.later_in_time;
  refused += other.refused;
  finished += other.finished;
  tokens += other.tokens;
  bits_sum += other.bits_sum;
  most_waiting = std::max(most_waiting, other.most_waiting);
  return *this;
}

double SimulatedOutcome::ttft_attainment() const {
  return Part(first_in_time, first_tokens + refused);
}

double SimulatedOutcome::itl_attainment() const { return Part(later_in_time, later_tokens); }

double SimulatedOutcome::mean_bits() const {
  return bits_sum / static_cast<double>(std::max<int64_t>(tokens, 1));
}

SimulatedServer::SimulatedServer(const SimulatedServerOptions& options)
    : options_(options), pace_(0, options.max_seqs, options.max_step_tokens / 2) {
  stats_.num_kv_blocks = stats_.free_kv_blocks = options.num_kv_blocks;
}

void SimulatedServer::RunUntil(double time) {
  for (;;) {
    if (!step_.running) BeginStep();
    const double arrival = coming_.empty() ? time + 1 : coming_.front().arrival;
    const bool step_first = step_.running && step_.end <= arrival;
    const double next = step_first ? step_.end : arrival;
    if (next > time) break;
    time_ = next;
    step_first ? EndStep() : Arrive();
  }
  time_ = time;
}

LoadSample SimulatedServer::sample() const {
  LoadSample sample{stats_, time_to_first_token_.counts(), inter_token_latency_.counts()};
  sample.stats.waiting_requests = admission_.waiting_requests();
  sample.stats.waiting_tokens = admission_.waiting_tokens();
  sample.stats.expected_wait_seconds = ToSeconds(admission_.ExpectedWait(0));
  sample.stats.running_requests = static_cast<int>(running_.size());
  return sample;
}

void SimulatedServer::Arrive() {
  waiting_.push_back({.request = coming_.front()});
  admission_.Enter(0, coming_.front().prompt_tokens);
  outcome_.most_waiting = std::max(outcome_.most_waiting, waiting());
  coming_.pop_front();
}

void SimulatedServer::BeginStep() {
  const auto leave = [this] {
    admission_.Leave(0, waiting_.front().request.prompt_tokens);
    waiting_.pop_front();
  };
  while (!waiting_.empty() && time_ - waiting_.front().request.arrival > options_.max_queue_wait) {
    outcome_.refused += waiting_.front().request.arrival > options_.count_from;
    leave();
  }
  step_ = {.begin = time_, .bits = bits_};
  while (!waiting_.empty()) {
    step_.full = static_cast<int>(running_.size()) >= options_.max_seqs ||
                 reserved_blocks_ + Reserved(waiting_.front()) > options_.num_kv_blocks;
    if (step_.full) break;
    reserved_blocks_ += Reserved(waiting_.front());
    running_.push_back(waiting_.front());
    running_.back().started = time_;
    ++step_.started;
    leave();
  }
  if (running_.empty()) return;
  for (Sequence& s : running_) step_.decodes += s.chunk = s.generated > 0;
  for (Sequence& s : running_) {
    if (s.generated > 0) continue;
    const int budget = options_.max_step_tokens - step_.decodes - step_.prompt_tokens;
    s.chunk = std::clamp(s.request.prompt_tokens - s.computed, 0, std::max(budget, 0));
    step_.prompt_tokens += s.chunk;
  }
  step_.end = time_ + options_.step_seconds(bits_, step_.decodes, step_.prompt_tokens);
  step_.running = true;
}

void SimulatedServer::EndStep() {
  step_.running = false;
  last_work_ = time_;
  const int tokens = step_.decodes + step_.prompt_tokens;
  const double seconds = step_.end - step_.begin;
  ++stats_.steps;
  stats_.effective_tokens += tokens;
  stats_.effective_bits_sum += tokens * step_.bits;
  stats_.prompt_tokens += step_.prompt_tokens;
  stats_.step_seconds_sum += seconds;
  if (time_ > options_.count_from) {
    outcome_.tokens += tokens;
    outcome_.bits_sum += tokens * step_.bits;
  }
  pace_.Observe(step_.decodes, step_.prompt_tokens, seconds);
  admission_.StepEnded({.seconds = seconds,
                        .running = static_cast<int>(running_.size()),
                        .started = step_.started,
                        .others_wait = !waiting_.empty(),
                        .full = step_.full},
                       pace_.seconds_per_prompt_token());
  for (Sequence& s : running_) {
    s.computed += s.chunk;
    if (s.chunk > 0 && s.computed >= s.request.prompt_tokens) Token(s);
  }
  std::erase_if(running_, [this](const Sequence& s) {
    if (s.generated < s.request.output_tokens) return false;
    reserved_blocks_ -= Reserved(s);
    admission_.Finished(time_ - s.started);
    ++outcome_.finished;
    return true;
  });
  stats_.free_kv_blocks = options_.num_kv_blocks;
  for (const Sequence& s : running_) stats_.free_kv_blocks -= Blocks(s.computed);
}

void SimulatedServer::Token(Sequence& sequence) {
  const bool first = sequence.generated++ == 0;
  const double latency = time_ - (first ? sequence.request.arrival : sequence.last_token);
  (first ? time_to_first_token_ : inter_token_latency_).Observe(Seconds(latency));
  sequence.last_token = time_;
  ++stats_.generation_tokens;
  if (sequence.request.arrival < options_.count_from) return;
  ++(first ? outcome_.first_tokens : outcome_.later_tokens);
  (first ? outcome_.first_in_time : outcome_.later_in_time) +=
      latency <= (first ? options_.ttft_objective_seconds : options_.itl_objective_seconds);
}

SimulatedArrivals::SimulatedArrivals(uint64_t seed, std::function<double(double)> rate,
                                     double max_rate, double mean_prompt_tokens,
                                     double mean_output_tokens)
    : rng_(seed),
      rate_(std::move(rate)),
      max_rate_(max_rate),
      mean_prompt_tokens_(mean_prompt_tokens),
      mean_output_tokens_(mean_output_tokens) {
  Draw();
}

void SimulatedArrivals::SubmitUntil(double time, SimulatedServer& server) {
  for (; next_.arrival <= time; Draw()) server.Submit(next_);
}

// A Poisson process of varying rate, by thinning one of the highest rate.
void SimulatedArrivals::Draw() {
  std::exponential_distribution<double> gap(max_rate_);
  std::uniform_real_distribution<double> part(0, max_rate_);
  do {
    next_.arrival += gap(rng_);
  } while (part(rng_) >= rate_(next_.arrival));
  next_.prompt_tokens = DrawLength(rng_, mean_prompt_tokens_, 4000);
  next_.output_tokens = DrawLength(rng_, mean_output_tokens_, 2000);
}

}  // namespace mobi
