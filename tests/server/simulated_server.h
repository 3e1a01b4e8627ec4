// A server without weights: requests arrive at random, wait, are prefilled in chunks and decoded in
// continuous batches, and a step takes a time that depends on bits and tokens. Gives what the
// controller reads (engine stats, latency histograms) and takes what it decides. Time is simulated.
#ifndef MOBI_TESTS_SERVER_SIMULATED_SERVER_H_
#define MOBI_TESTS_SERVER_SIMULATED_SERVER_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#include "server/latency_histogram.h"
#include "server/pressure_signals.h"

namespace mobi {

struct SimulatedServerOptions {
  int max_seqs = 16;
  int max_step_tokens = 512;
  int num_kv_blocks = 1024;
  int block_size = 16;
  // A step's seconds at so many bits, decode tokens and prompt tokens.
  std::function<double(double bits, int decodes, int prompt_tokens)> step_seconds;
  double mean_prompt_tokens = 200;
  double mean_output_tokens = 60;
  double ttft_objective_seconds = 0.5;
  double itl_objective_seconds = 0.05;
};

class SimulatedServer {
 public:
  // `rate`: requests per second at a time, at most `max_rate`.
  SimulatedServer(const SimulatedServerOptions& options, uint64_t seed,
                  std::function<double(double)> rate, double max_rate);

  void SetBits(double bits) { bits_ = bits; }
  void RunUntil(double time);

  LoadSample sample() const;
  double mean_bits() const;
  // Parts of first tokens and of later tokens that met their objective.
  double ttft_attainment() const;
  double itl_attainment() const;
  int most_waiting() const { return most_waiting_; }
  int finished() const { return finished_; }

 private:
  struct Sequence {
    double arrival = 0;
    int prompt_tokens = 0;
    int output_tokens = 0;
    int computed = 0;
    int generated = 0;
    double last_token = 0;
  };
  void DrawArrival();
  void Arrive();
  void BeginStep();
  void EndStep();
  int Blocks(int tokens) const { return tokens / options_.block_size + 1; }
  int UsedBlocks() const;

  const SimulatedServerOptions options_;
  const std::function<double(double)> rate_;
  const double max_rate_;
  std::mt19937_64 rng_;
  double time_ = 0;
  double bits_ = 8;
  double next_arrival_ = 0;
  std::deque<Sequence> waiting_;
  std::vector<Sequence> running_;
  bool in_step_ = false;
  double step_end_ = 0;
  double step_bits_ = 8;
  std::vector<int> chunks_;
  EngineStats stats_;
  LatencyHistogram time_to_first_token_;
  LatencyHistogram inter_token_latency_;
  int64_t first_tokens_ = 0, first_tokens_in_time_ = 0;
  int64_t later_tokens_ = 0, later_tokens_in_time_ = 0;
  int most_waiting_ = 0;
  int finished_ = 0;
};

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_SIMULATED_SERVER_H_
