// Steps of a loaded model, made up so that they can be timed: any number of sequences with a full
// context each, at any average bits; decodes, or chunks of prompts. Runs the very steps that the
// engine runs, uploads and results included. For mobi-bench, and for a server that wants to know
// its own step latency. One thread; the model and its backend must not be in use elsewhere
// meanwhile.
#ifndef MOBI_ENGINE_STEP_BENCH_H_
#define MOBI_ENGINE_STEP_BENCH_H_

#include <map>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model.h"
#include "engine/step_runner.h"
#include "engine/weight_source.h"

namespace mobi {

struct StepBenchOptions {
  int max_seqs = 1;
  int context = 512;  // tokens that each sequence attends to, its own included
  int chunk = 1;      // tokens of each sequence in a step, at most context; 1: decodes
  int decodes = 0;    // sequences that decode beside the chunks, not counted in max_seqs
  int block_size = 16;
  bool coherent = false;             // decodes share levels, see EngineOptions::coherent_decode
  bool whole_level_prompts = false;  // see EngineOptions
  bool whole_level_decodes = false;
};

class StepBench {
 public:
  // Of `source` only the price table is read, now. RESOURCE_EXHAUSTED says what does not fit.
  static absl::StatusOr<std::unique_ptr<StepBench>> Create(const StepBenchOptions& options,
                                                           const Model& model,
                                                           const WeightSource& source);

  // From now on steps have `num_seqs` sequences, at most max_seqs, and use `bits` on average, as
  // the engine does: 2 and 8 read one level everywhere, between them the price is searched that
  // comes nearest for all sequences that have a choice. Runs a few steps for that.
  absl::Status Set(int num_seqs, float bits);
  // Whether some sequences have a choice at these bits.
  bool Chooses(float bits) const;
  // One step, waited for.
  absl::Status Run();

  // Of the last step: mean over its sequences, those of prompts at whole levels left out unless
  // there are no others, and per weight moved (ranges and offsets included).
  double effective_bits() const { return effective_bits_; }
  double loaded_bits() const { return loaded_bits_; }
  // Bytes that such a step has to move at least: linears at their levels, lm_head, the KV cache.
  double StepBytes() const;

 private:
  StepBench(const StepBenchOptions& options, const Model& model, StepRunner runner)
      : options_(options), model_(model), runner_(std::move(runner)) {}
  void MakeSequences();
  // Tokens that a sequence brings; those behind max_seqs decode.
  int ChunkOf(int sequence) const { return sequence < options_.max_seqs ? options_.chunk : 1; }

  const StepBenchOptions options_;
  const Model& model_;
  StepRunner runner_;
  Request request_;  // its sequences are the batch
  PrecisionTarget target_;
  int num_seqs_ = 0;
  std::map<std::pair<int, float>, float> trims_;  // log price found for sequences and bits
  double effective_bits_ = 0;
  double loaded_bits_ = 0;
  int lm_head_level_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_STEP_BENCH_H_
