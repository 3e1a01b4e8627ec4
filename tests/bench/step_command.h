// `mobi-bench step` and `mobi-bench surface`: whole steps of a model, at any bits and number of
// sequences.
#ifndef MOBI_TESTS_BENCH_STEP_COMMAND_H_
#define MOBI_TESTS_BENCH_STEP_COMMAND_H_

#include <vector>

#include "absl/status/statusor.h"
#include "engine/model.h"
#include "engine/weight_source.h"
#include "nlohmann/json.hpp"
#include "parts_backend.h"

namespace mobi {

struct StepCommandOptions {
  std::vector<float> bits;
  std::vector<int> sequences;
  int context = 512;
  int chunk = 1;    // tokens of each sequence (step)
  int decodes = 0;  // sequences that decode beside them (step)
  bool coherent = false;
  bool whole_level_prompts = false;  // (step)
  bool whole_level_decodes = false;
  bool parts = true;
  bool print = true;            // a table while it runs
  double seconds = 1;           // least time per case
  double bytes_per_second = 0;  // that the device reads: the floor
};

// The model must have been loaded through `parts`. The result is an array, an object per case:
// bits, effective_bits, loaded_bits, sequences, context, chunk, decodes, milliseconds (median),
// best_milliseconds, cpu_milliseconds (median of all threads' processor time), floor_milliseconds,
// and parts_milliseconds by name.
absl::StatusOr<nlohmann::json> TimeSteps(const Model& model, const WeightSource& source,
                                         PartsBackend& parts, const StepCommandOptions& options);

// An array of {bits, tokens, milliseconds}, one for every pair: what a server's controller reads.
absl::StatusOr<nlohmann::json> TimeSurface(const Model& model, const WeightSource& source,
                                           const StepCommandOptions& options);

}  // namespace mobi

#endif  // MOBI_TESTS_BENCH_STEP_COMMAND_H_
