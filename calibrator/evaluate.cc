#include "calibrator/evaluate.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "calibrator/bits_aim.h"
#include "calibrator/eval_session.h"
#include "engine/base/status_macros.h"
#include "engine/engine.h"
#include "engine/precision.h"

namespace mobi {
namespace {

// Windows given to the engine at once where each chooses for itself.
constexpr int kWindowsInFlight = 4;
constexpr int kMaxBatch = 256;

int WindowsInFlight(const EvaluateOptions& options) {
  return options.coherent ? options.batch : kWindowsInFlight;
}

GenerationRequest WindowRequest(const EvaluateOptions& options, absl::Span<const int32_t> window,
                                float bits) {
  GenerationRequest request;
  request.prompt.assign(window.begin(), window.end());
  request.max_new_tokens = 0;
  request.prompt_logprobs = true;
  // A pinned request keeps its levels to itself, so those that share take the engine's target.
  request.prompt_as_decodes = options.coherent;
  request.precision =
      options.coherent ? PrecisionBand{kMinBits, kMaxBits} : PrecisionBand{bits, bits};
  return request;
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
  std::vector<std::unique_ptr<ScoreSink>> sinks(static_cast<size_t>(windows));
  const int in_flight = WindowsInFlight(options);
  BitsAim aim(bits, in_flight);
  std::vector<float> asked(sinks.size(), bits);
  absl::Status status;
  double bits_sum = 0;
  const auto collect = [&](int64_t i) {
    const RequestEnd end = sinks[i]->Wait();
    if (status.ok()) status = end.status;
    bits_sum += end.mean_effective_bits;
    aim.Saw(asked[i], end.mean_effective_bits);
    for (const float logprob : sinks[i]->logprobs()) result.nll -= logprob;
    result.predicted_tokens += static_cast<int64_t>(sinks[i]->logprobs().size());
    sinks[i].reset();
  };
  int64_t submitted = 0;
  for (int64_t next = 0; next < submitted || (submitted < windows && status.ok()); ++next) {
    // Windows side by side start together, so that a batch is as full as it can be.
    const int64_t end =
        options.coherent ? (next + in_flight) / in_flight * in_flight : next + in_flight;
    while (submitted < std::min(windows, end) && status.ok()) {
      if (options.track_bits) asked[submitted] = aim.Next();
      engine.SetPrecision({asked[submitted]});
      GenerationRequest request = WindowRequest(
          options, ids.subspan(static_cast<size_t>(submitted) * window, window), asked[submitted]);
      sinks[submitted] = std::make_unique<ScoreSink>();
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
  MOBI_RETURN_IF_ERROR(CheckBits(options.bits));
  if (options.coherent && (options.batch < 1 || options.batch > kMaxBatch)) {
    return absl::InvalidArgumentError(
        absl::StrCat("batch ", options.batch, " is not within 1 and ", kMaxBatch));
  }
  MOBI_ASSIGN_OR_RETURN(const std::string text, ReadText(options.data_path, options.layout));
  MOBI_ASSIGN_OR_RETURN(const auto session,
                        EvalSession::Open({.model_dir = options.model_dir,
                                           .device = options.device,
                                           .num_threads = options.num_threads,
                                           .max_tokens = options.window,
                                           .in_flight = WindowsInFlight(options),
                                           .coherent = options.coherent},
                                          clock));
  MOBI_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, session->Encode(text));
  if (static_cast<int64_t>(ids.size()) < options.window) {
    return absl::InvalidArgumentError(absl::StrCat(
        options.data_path, ": ", ids.size(), " tokens, less than one window of ", options.window));
  }
  const auto windows = static_cast<int64_t>(ids.size()) / options.window;
  if (options.skip < 0 || options.skip >= windows) {
    return absl::InvalidArgumentError(absl::StrCat(options.data_path, ": skip ", options.skip,
                                                   " is not within 0 and ", windows - 1));
  }
  const auto rest =
      absl::MakeConstSpan(ids).subspan(static_cast<size_t>(options.skip * options.window));
  const bool quantized = session->checkpoint().quantized();
  std::vector<EvaluateResult> results;
  for (const float bits : quantized ? options.bits : std::vector<float>{kMaxBits}) {
    MOBI_ASSIGN_OR_RETURN(EvaluateResult result,
                          EvaluateAt(session->engine(), options, rest, bits, clock));
    result.is_float = !quantized;
    if (result.is_float) result.target_bits = result.effective_bits;
    on_result(result);
    results.push_back(result);
  }
  return results;
}

}  // namespace mobi
