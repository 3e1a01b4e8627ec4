// End-to-end tuning of a fitted model: codes stay, the (range, offset) pairs of chosen levels are
// trained with Adam so that the model's output distribution nears the float model's (KL). It undoes
// what fitting one linear at a time cannot see: errors that later layers could compensate. Needs
// every level of the whole model in memory in fp32, so it is for small models; deterministic for a
// seed.
#ifndef MOBI_CALIBRATOR_SCALE_TUNING_H_
#define MOBI_CALIBRATOR_SCALE_TUNING_H_

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "calibrator/block_calibration.h"
#include "calibrator/float_model.h"

namespace mobi {

struct ScaleTuningOptions {
  int steps = 80;
  int batch = 8;        // windows in a step, each on a thread
  int positions = 512;  // tokens of a window; a sequence holds as many as fit
  float learning_rate =
      6e-3f;  // of a range, relative to it; of a centre, relative to a step of level 1
  std::array<bool, kNumLevels> train = {true, false, false, false};
  // A window in every `pure_every` reads the lowest trained level throughout; 0: none.
  int pure_every = 16;
  // So many of the others read one level in each linear, as a batch that shares its levels does:
  // the best for average bits drawn from this interval. Losses are measured on the first sequences
  // and multiplied by log-normal factors of the jitter's size, since they differ from batch to
  // batch.
  double allocated_share = 1;
  std::array<double, 2> allocated_bits = {2.5, 3.5};
  double allocated_jitter = 0.3;
  int64_t allocated_sequences = 4;
  // How often a token reads each level in the windows that are left.
  std::array<double, kNumLevels> level_shares = {0.6, 0.25, 0.1, 0.05};
  int max_memory_gib = 32;  // models that would need more are not tuned
  uint64_t seed = 1;
  int num_threads = 1;
};

// What tuning holds, near enough: four levels of every linear, and the traces of a step's windows.
double TuningGib(const ModelConfig& config, const ScaleTuningOptions& options);

// Called after each step with the mean KL per token of its batch; an error ends the tuning.
using TuningCallback = std::function<absl::Status(int step, double kl)>;

// `ids`: sequences of `seq_len` tokens, whose windows are taken in turn: the first of every
// sequence, then the second of every one. `float_hidden`: what the float model has behind its last
// block for the first of these windows, as many as somebody has run it on already. Updates the
// pairs in `blocks`.
absl::Status TuneScales(const FloatModel& model, absl::Span<const int32_t> ids, int64_t seq_len,
                        const ScaleTuningOptions& options, Matrix float_hidden,
                        const TuningCallback& on_step, std::vector<FittedBlock>& blocks);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_SCALE_TUNING_H_
