// Perplexity of a model folder through the serving engine, at any list of average bits: text as one
// stream of tokens with one BOS at its start, windows that do not overlap, the incomplete last one
// dropped, the mean over every token but the first of each window. In coherent mode windows are
// read side by side, one token each a step, and the tokens of a step share their levels.
#ifndef MOBI_CALIBRATOR_EVALUATE_H_
#define MOBI_CALIBRATOR_EVALUATE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "calibrator/text_data.h"
#include "engine/base/clock.h"

namespace mobi {

struct EvaluateOptions {
  std::string model_dir;
  std::string data_path;
  TextLayout layout = TextLayout::kPlain;
  std::vector<float> bits;  // targets; a float folder has one line whatever is asked
  bool coherent = false;
  int batch = 16;  // windows side by side in coherent mode
  // Each window asks for what the ones before it missed the target by; otherwise all ask for the
  // target and use what the price table gives.
  bool track_bits = false;
  int window = 1024;
  int64_t skip = 0;   // windows passed over, so that a long text can be read in parts
  int64_t limit = 0;  // windows; 0: all that are left
  int num_threads = 0;
  std::string device = "cpu";  // see CreateBackend
};

struct EvaluateResult {
  bool is_float = false;
  double target_bits = 0;
  double effective_bits = 0;  // mean over the tokens computed
  double nll = 0;             // mean, nats per token
  double perplexity = 0;
  int64_t windows = 0;
  int64_t predicted_tokens = 0;
  double seconds = 0;
};

// Called when each target is done.
using EvaluateCallback = std::function<void(const EvaluateResult&)>;

// INVALID_ARGUMENT and its like name what is wrong with folder, text or targets.
absl::StatusOr<std::vector<EvaluateResult>> Evaluate(const EvaluateOptions& options,
                                                     const Clock& clock,
                                                     const EvaluateCallback& on_result);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_EVALUATE_H_
