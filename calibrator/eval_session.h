// A model folder opened for evaluation: checkpoint, tokenizer, backend, model and the engine that
// serves it, in the order in which they depend on each other. What perplexity (evaluate.h) and
// multiple choice (multiple_choice.h) submit their requests to. Methods may be called from the
// thread that opened it.
#ifndef MOBI_CALIBRATOR_EVAL_SESSION_H_
#define MOBI_CALIBRATOR_EVAL_SESSION_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "engine/checkpoint.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/tokenizer.h"

namespace mobi {

struct EvalSessionOptions {
  std::string model_dir;
  std::string device = "cpu";  // see CreateBackend
  int num_threads = 0;
  int max_tokens = 0;  // of one request; 0: the model's context
  int in_flight = 4;   // requests at once
  bool coherent = false;
};

class EvalSession {
 public:
  // INVALID_ARGUMENT when the model's context is shorter than `max_tokens`.
  static absl::StatusOr<std::unique_ptr<EvalSession>> Open(const EvalSessionOptions& options,
                                                           const Clock& clock);

  const Checkpoint& checkpoint() const { return checkpoint_; }
  Engine& engine() { return *engine_; }
  // Ids of `text`, one BOS first where the tokenizer adds one; every id is within the vocabulary.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text) const;

 private:
  explicit EvalSession(Checkpoint checkpoint) : checkpoint_(std::move(checkpoint)) {}

  const Checkpoint checkpoint_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Engine> engine_;
};

// One scored request's log probabilities, waited for by the submitting thread.
class ScoreSink final : public TokenSink {
 public:
  void OnPromptLogprobs(int first, absl::Span<const float> logprobs) override;
  bool OnToken(const TokenEvent&) override { return true; }
  void OnDone(const RequestEnd& end) override;

  RequestEnd Wait();
  // After Wait: [i] is of prompt token i + 1.
  const std::vector<float>& logprobs() const { return logprobs_; }

 private:
  Mutex mutex_;
  CondVar changed_;
  RequestEnd end_;
  bool done_ = false;
  std::vector<float> logprobs_;
};

// INVALID_ARGUMENT when one of `bits` is outside what a checkpoint serves.
absl::Status CheckBits(absl::Span<const float> bits);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_EVAL_SESSION_H_
