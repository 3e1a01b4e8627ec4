// Multiple-choice tasks through the serving engine: every choice is scored as a continuation of its
// context, and the likeliest one is the model's answer. Accuracy as lm-eval computes it: `acc` by
// the sum of the choice's log probabilities, `acc_norm` by that sum over the choice's characters.
// Source: EleutherAI's lm-evaluation-harness, output_type multiple_choice.
#ifndef MOBI_CALIBRATOR_MULTIPLE_CHOICE_H_
#define MOBI_CALIBRATOR_MULTIPLE_CHOICE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/base/clock.h"

namespace mobi {

struct ChoiceQuestion {
  std::string context;
  std::vector<std::string> choices;  // a space is put between context and choice
  int answer = 0;                    // index of the right one
};

// One JSON object a line: {"context": "...", "choices": ["...", ...], "answer": 0}. Blank lines are
// skipped. INVALID_ARGUMENT names file, line and key.
absl::StatusOr<std::vector<ChoiceQuestion>> ParseQuestions(std::string_view jsonl,
                                                           const std::string& file);

struct ChoiceOptions {
  std::string model_dir;
  std::string data_path;
  std::vector<float> bits;  // targets; a float folder has one line whatever is asked
  int64_t limit = 0;        // questions; 0: all
  int num_threads = 0;
  std::string device = "cpu";
};

struct ChoiceResult {
  bool is_float = false;
  double target_bits = 0;
  double effective_bits = 0;
  int64_t questions = 0;
  double acc = 0;
  double acc_norm = 0;
  double acc_stderr = 0;  // of the mean, as lm-eval reports it
  double acc_norm_stderr = 0;
  double seconds = 0;
  std::vector<std::vector<double>> logprobs;  // [question][choice]
};

using ChoiceCallback = std::function<void(const ChoiceResult&)>;

absl::StatusOr<std::vector<ChoiceResult>> EvaluateChoices(const ChoiceOptions& options,
                                                          const Clock& clock,
                                                          const ChoiceCallback& on_result);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_MULTIPLE_CHOICE_H_
