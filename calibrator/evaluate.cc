#include "calibrator/evaluate.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/mutex.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/precision.h"
#include "engine/tokenizer.h"
#include "kernels/create_backend.h"

namespace mobi {
namespace {

constexpr int kWindowsInFlight = 4;

// One window's log probabilities, waited for by the submitting thread.
class WindowSink final : public TokenSink {
 public:
  void OnPromptLogprobs(int, absl::Span<const float> logprobs) override {
    MutexLock lock(mutex_);
    for (const float logprob : logprobs) nll_ -= logprob;
    predicted_ += static_cast<int64_t>(logprobs.size());
  }
  bool OnToken(const TokenEvent&) override { return true; }
  void OnDone(const RequestEnd& end) override {
    MutexLock lock(mutex_);
    end_ = end;
    done_ = true;
    changed_.NotifyAll();
  }
  RequestEnd Wait() {
    MutexLock lock(mutex_);
    while (!done_) changed_.Wait(mutex_);
    return end_;
  }
  // After Wait.
  double nll() const { return nll_; }
  int64_t predicted() const { return predicted_; }

 private:
  Mutex mutex_;
  CondVar changed_;
  RequestEnd end_;
  bool done_ = false;
  double nll_ = 0;
  int64_t predicted_ = 0;
};

absl::StatusOr<std::vector<int32_t>> ReadStream(const EvaluateOptions& options,
                                                const ModelConfig& config) {
  MOBI_ASSIGN_OR_RETURN(const std::string text, ReadText(options.data_path, options.layout));
  MOBI_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(options.model_dir));
  MOBI_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer->Encode(text));
  if (static_cast<int64_t>(ids.size()) < options.window) {
    return absl::InvalidArgumentError(absl::StrCat(
        options.data_path, ": ", ids.size(), " tokens, less than one window of ", options.window));
  }
  for (const int32_t id : ids) {
    if (id < config.vocab_size) continue;
    return absl::InvalidArgumentError(absl::StrCat(options.model_dir, ": the tokenizer gives id ",
                                                   id, ", the model's vocab_size is ",
                                                   config.vocab_size));
  }
  return ids;
}

absl::StatusOr<EvaluateResult> EvaluateAt(Engine& engine, const EvaluateOptions& options,
                                          absl::Span<const int32_t> ids, float bits,
                                          const Clock& clock) {
  const TimePoint start = clock.Now();
  const auto window = static_cast<size_t>(options.window);
  int64_t windows = static_cast<int64_t>(ids.size() / window);
  if (options.limit > 0) windows = std::min(windows, options.limit);
  EvaluateResult result;
  result.target_bits = bits;
  result.windows = windows;
  std::vector<std::unique_ptr<WindowSink>> sinks(static_cast<size_t>(windows));
  absl::Status status;
  double bits_sum = 0;
  const auto collect = [&](int64_t i) {
    const RequestEnd end = sinks[i]->Wait();
    if (status.ok()) status = end.status;
    bits_sum += end.mean_effective_bits;
    result.nll += sinks[i]->nll();
    result.predicted_tokens += sinks[i]->predicted();
    sinks[i].reset();
  };
  int64_t submitted = 0;
  for (int64_t next = 0; next < submitted || (submitted < windows && status.ok()); ++next) {
    while (submitted < windows && submitted < next + kWindowsInFlight && status.ok()) {
      const auto begin = ids.begin() + static_cast<std::ptrdiff_t>(submitted * options.window);
      GenerationRequest request;
      request.prompt.assign(begin, begin + options.window);
      request.max_new_tokens = 0;
      request.prompt_logprobs = true;
      request.precision = {bits, bits};
      sinks[submitted] = std::make_unique<WindowSink>();
      auto id = engine.Submit(std::move(request), sinks[submitted].get());
      if (!id.ok()) {
        status = id.status();
        break;
      }
      ++submitted;
    }
    if (next < submitted) collect(next);
  }
  MOBI_RETURN_IF_ERROR(status);
  result.nll /= static_cast<double>(result.predicted_tokens);
  result.perplexity = std::exp(result.nll);
  result.effective_bits = bits_sum / static_cast<double>(windows);
  result.seconds = ToSeconds(clock.Now() - start);
  return result;
}

}  // namespace

absl::StatusOr<std::vector<EvaluateResult>> Evaluate(const EvaluateOptions& options,
                                                     const Clock& clock,
                                                     const EvaluateCallback& on_result) {
  MOBI_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(options.model_dir, {}));
  const ModelConfig& config = checkpoint.config();
  if (options.window < 2 || options.window > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("window ", options.window,
                                                   " is not within 2 and the model's ",
                                                   config.max_position_embeddings));
  }
  for (const float bits : options.bits) {
    if (bits >= kMinBits && bits <= kMaxBits) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("bits ", bits, " is not within ", kMinBits, " and ", kMaxBits));
  }
  MOBI_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, ReadStream(options, config));
  MOBI_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend,
                        CreateBackend(options.device, options.num_threads));
  MOBI_ASSIGN_OR_RETURN(const auto model,
                        Model::Load(checkpoint, *backend, options.window, nullptr));
  EngineOptions engine_options;
  engine_options.max_num_seqs = kWindowsInFlight;
  engine_options.max_model_len = options.window;
  engine_options.num_kv_blocks =
      kWindowsInFlight * (options.window / engine_options.block_size + 2);
  engine_options.max_queue_wait = std::chrono::hours(24);
  MOBI_ASSIGN_OR_RETURN(const auto engine,
                        Engine::Create(engine_options, *model, checkpoint, *backend, clock));
  std::vector<float> targets = options.bits;
  if (!checkpoint.quantized()) targets = {kMaxBits};
  std::vector<EvaluateResult> results;
  for (const float bits : targets) {
    MOBI_ASSIGN_OR_RETURN(EvaluateResult result, EvaluateAt(*engine, options, ids, bits, clock));
    result.is_float = !checkpoint.quantized();
    if (result.is_float) result.target_bits = result.effective_bits;
    on_result(result);
    results.push_back(result);
  }
  return results;
}

}  // namespace mobi
