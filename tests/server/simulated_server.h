// A server without weights: requests wait, are prefilled in chunks and decoded in continuous
// batches in arrival order, and a step takes a time that depends on bits and tokens. Gives what the
// controller reads (engine stats, latency histograms) and takes what it decides. Time is simulated.
// The plant of the controller's property tests and of fleet-simulation.
#ifndef MOBI_TESTS_SERVER_SIMULATED_SERVER_H_
#define MOBI_TESTS_SERVER_SIMULATED_SERVER_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "engine/admission.h"
#include "engine/step_pace.h"
#include "server/latency_histogram.h"
#include "server/pressure_signals.h"

namespace mobi {

struct SimulatedRequest {
  double arrival = 0;  // seconds
  int prompt_tokens = 1;
  int output_tokens = 1;
};

struct SimulatedServerOptions {
  int max_seqs = 16;
  int max_step_tokens = 512;
  int num_kv_blocks = 1024;
  int block_size = 16;
  // A step's seconds at so many bits, decode tokens and prompt tokens.
  std::function<double(double bits, int decodes, int prompt_tokens)> step_seconds;
  double ttft_objective_seconds = 0.5;
  double itl_objective_seconds = 0.05;
  // Requests that waited longer are refused.
  double max_queue_wait = std::numeric_limits<double>::infinity();
  double count_from = 0;  // what arrives or is computed before is not in the outcome
};

// What users got.
struct SimulatedOutcome {
  int64_t first_tokens = 0, first_in_time = 0;
  int64_t later_tokens = 0, later_in_time = 0;
  int64_t refused = 0, finished = 0;
  int64_t tokens = 0;
  double bits_sum = 0;  // over tokens
  int most_waiting = 0;

  SimulatedOutcome& operator+=(const SimulatedOutcome& other);
  // Parts of first tokens, refusals counted, and of later ones that met their objective.
  double ttft_attainment() const;
  double itl_attainment() const;
  double mean_bits() const;
};

class SimulatedServer {
 public:
  explicit SimulatedServer(const SimulatedServerOptions& options);

  void SetBits(double bits) { bits_ = bits; }
  // In order of arrival, none before the time that it has run until.
  void Submit(const SimulatedRequest& request) { coming_.push_back(request); }
  void RunUntil(double time);

  LoadSample sample() const;
  const SimulatedOutcome& outcome() const { return outcome_; }
  double bits() const { return bits_; }
  int waiting() const { return static_cast<int>(waiting_.size()); }
  bool idle() const { return coming_.empty() && waiting_.empty() && running_.empty(); }
  double last_work() const { return last_work_; }  // when a step last ended; 0: never

 private:
  struct Sequence {
    SimulatedRequest request;
    double started = 0;
    int computed = 0;
    int generated = 0;
    double last_token = 0;
    int chunk = 0;
  };
  void Arrive();
  void BeginStep();
  void EndStep();
  void Token(Sequence& sequence);
  int Blocks(int tokens) const { return tokens / options_.block_size + 1; }
  int Reserved(const Sequence& s) const {
    return Blocks(s.request.prompt_tokens + s.request.output_tokens);
  }

  const SimulatedServerOptions options_;
  double time_ = 0;
  double bits_ = 8;
  std::deque<SimulatedRequest> coming_;
  std::deque<Sequence> waiting_;
  std::vector<Sequence> running_;
  int reserved_blocks_ = 0;
  double last_work_ = 0;
  struct Step {
    double begin = 0, end = 0, bits = 8;
    int decodes = 0, prompt_tokens = 0, started = 0;
    bool running = false, full = false;
  } step_;
  Admission admission_{{}};
  StepPace pace_;
  EngineStats stats_;
  LatencyHistogram time_to_first_token_;
  LatencyHistogram inter_token_latency_;
  SimulatedOutcome outcome_;
};

// Requests that come at random, at a rate that changes.
class SimulatedArrivals {
 public:
  // `rate`: requests per second at a time, at most `max_rate`. Lengths are lognormal.
  SimulatedArrivals(uint64_t seed, std::function<double(double)> rate, double max_rate,
                    double mean_prompt_tokens, double mean_output_tokens);

  // Submits all until then.
  void SubmitUntil(double time, SimulatedServer& server);

 private:
  void Draw();

  std::mt19937_64 rng_;
  const std::function<double(double)> rate_;
  const double max_rate_;
  const double mean_prompt_tokens_;
  const double mean_output_tokens_;
  SimulatedRequest next_;
};

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_SIMULATED_SERVER_H_
