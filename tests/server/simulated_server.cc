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

}  // namespace

SimulatedServer::SimulatedServer(const SimulatedServerOptions& options, uint64_t seed,
                                 std::function<double(double)> rate, double max_rate)
    : options_(options), rate_(std::move(rate)), max_rate_(max_rate), rng_(seed) {
  stats_.num_kv_blocks = stats_.free_kv_blocks = options.num_kv_blocks;
  DrawArrival();
}

void SimulatedServer::RunUntil(double time) {
  for (;;) {
    if (!in_step_) BeginStep();
    const bool step_first = in_step_ && step_end_ <= next_arrival_;
    const double next = step_first ? step_end_ : next_arrival_;
    if (next > time) break;
    time_ = next;
    step_first ? EndStep() : Arrive();
  }
  time_ = time;
}

LoadSample SimulatedServer::sample() const {
  LoadSample sample{stats_, time_to_first_token_.counts(), inter_token_latency_.counts()};
  sample.stats.waiting_requests = static_cast<int>(waiting_.size());
  sample.stats.running_requests = static_cast<int>(running_.size());
  for (const Sequence& sequence : waiting_) sample.stats.waiting_tokens += sequence.prompt_tokens;
  return sample;
}

double SimulatedServer::mean_bits() const {
  return stats_.effective_bits_sum /
         static_cast<double>(std::max<uint64_t>(stats_.effective_tokens, 1));
}

double SimulatedServer::ttft_attainment() const {
  return first_tokens_ == 0 ? 1 : static_cast<double>(first_tokens_in_time_) / first_tokens_;
}

double SimulatedServer::itl_attainment() const {
  return later_tokens_ == 0 ? 1 : static_cast<double>(later_tokens_in_time_) / later_tokens_;
}

// A Poisson process of varying rate, by thinning one of the highest rate.
void SimulatedServer::DrawArrival() {
  std::exponential_distribution<double> gap(max_rate_);
  std::uniform_real_distribution<double> part(0, max_rate_);
  do {
    next_arrival_ += gap(rng_);
  } while (part(rng_) >= rate_(next_arrival_));
}

void SimulatedServer::Arrive() {
  waiting_.push_back({.arrival = next_arrival_,
                      .prompt_tokens = DrawLength(rng_, options_.mean_prompt_tokens, 4000),
                      .output_tokens = DrawLength(rng_, options_.mean_output_tokens, 2000)});
  most_waiting_ = std::max(most_waiting_, static_cast<int>(waiting_.size()));
  DrawArrival();
}

void SimulatedServer::BeginStep() {
  int used = UsedBlocks();
  while (!waiting_.empty() && static_cast<int>(running_.size()) < options_.max_seqs) {
    const Sequence& first = waiting_.front();
    used += Blocks(first.prompt_tokens + first.output_tokens);
    if (used > options_.num_kv_blocks) break;
    running_.push_back(first);
    waiting_.pop_front();
  }
  if (running_.empty()) return;
  chunks_.assign(running_.size(), 0);
  int budget = options_.max_step_tokens, decodes = 0, prompt_tokens = 0;
  for (size_t i = 0; i < running_.size(); ++i) {
    if (running_[i].generated == 0) continue;
    chunks_[i] = 1;
    ++decodes, --budget;
  }
  for (size_t i = 0; i < running_.size(); ++i) {
    if (running_[i].generated > 0) continue;
    chunks_[i] = std::min(budget, running_[i].prompt_tokens - running_[i].computed);
    budget -= chunks_[i];
    prompt_tokens += chunks_[i];
  }
  step_bits_ = bits_;
  step_end_ = time_ + options_.step_seconds(bits_, decodes, prompt_tokens);
  in_step_ = true;
}

void SimulatedServer::EndStep() {
  in_step_ = false;
  ++stats_.steps;
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = running_[i];
    if (chunks_[i] == 0) continue;
    sequence.computed += chunks_[i];
    stats_.effective_tokens += chunks_[i];
    stats_.effective_bits_sum += chunks_[i] * step_bits_;
    if (sequence.generated == 0) stats_.prompt_tokens += chunks_[i];
    if (sequence.computed < sequence.prompt_tokens) continue;
    const bool first = sequence.generated++ == 0;
    const double latency = time_ - (first ? sequence.arrival : sequence.last_token);
    (first ? time_to_first_token_ : inter_token_latency_).Observe(Seconds(latency));
    ++(first ? first_tokens_ : later_tokens_);
    if (first) first_tokens_in_time_ += latency <= options_.ttft_objective_seconds;
    if (!first) later_tokens_in_time_ += latency <= options_.itl_objective_seconds;
    sequence.last_token = time_;
    ++stats_.generation_tokens;
  }
  finished_ += static_cast<int>(
      std::erase_if(running_, [](const Sequence& s) { return s.generated >= s.output_tokens; }));
  stats_.free_kv_blocks = std::max(0, options_.num_kv_blocks - UsedBlocks());
}

int SimulatedServer::UsedBlocks() const {
  int used = 0;
  for (const Sequence& sequence : running_) used += Blocks(sequence.computed);
  return used;
}

}  // namespace mobi
