#include "calibrator/eval_session.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/precision.h"
#include "kernels/create_backend.h"

namespace mobi {
namespace {

constexpr int kScoredTogether = 128;

}  // namespace

absl::StatusOr<std::unique_ptr<EvalSession>> EvalSession::Open(const EvalSessionOptions& options,
                                                               const Clock& clock) {
  MOBI_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(options.model_dir, {}));
  const int context = checkpoint.config().max_position_embeddings;
  const int max_tokens = options.max_tokens > 0 ? options.max_tokens : context;
  if (max_tokens < 2 || max_tokens > context) {
    return absl::InvalidArgumentError(
        absl::StrCat("window ", max_tokens, " is not within 2 and the model's ", context));
  }
  auto session = std::unique_ptr<EvalSession>(new EvalSession(std::move(checkpoint)));
  MOBI_ASSIGN_OR_RETURN(session->tokenizer_, Tokenizer::Load(options.model_dir));
  MOBI_ASSIGN_OR_RETURN(session->backend_, CreateBackend(options.device, options.num_threads));
  Backend& backend = *session->backend_;
  MOBI_ASSIGN_OR_RETURN(session->model_, Model::Load(session->checkpoint_, backend, max_tokens));
  EngineOptions engine;
  engine.coherent_decode = options.coherent;
  // Scores are read in batches of this many positions: few of them would read the output embedding
  // over and over.
  engine.max_num_seqs = std::max(options.in_flight, kScoredTogether);
  engine.max_num_batched_tokens = std::max(engine.max_num_batched_tokens, engine.max_num_seqs);
  engine.max_model_len = max_tokens;
  engine.num_kv_blocks = options.in_flight * (max_tokens / engine.block_size + 2);
  // Nobody waits for an answer here: all that is submitted is served, however long it takes.
  engine.max_queue_wait = engine.max_expected_wait = std::chrono::hours(24);
  engine.max_waiting_tokens = std::max(engine.max_waiting_tokens, options.in_flight * max_tokens);
  engine.max_decode_slowdown = 1;
  MOBI_ASSIGN_OR_RETURN(session->engine_, Engine::Create(engine, *session->model_,
                                                         session->checkpoint_, backend, clock));
  return session;
}

absl::StatusOr<std::vector<int32_t>> EvalSession::Encode(std::string_view text) const {
  MOBI_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer_->Encode(text));
  const int vocab = checkpoint_.config().vocab_size;
  for (const int32_t id : ids) {
    if (id < vocab) continue;
    return absl::InvalidArgumentError(absl::StrCat(checkpoint_.dir(), ": the tokenizer gives id ",
                                                   id, ", the model's vocab_size is ", vocab));
  }
  return ids;
}

void ScoreSink::OnPromptLogprobs(int, absl::Span<const float> logprobs) {
  MutexLock lock(mutex_);
  logprobs_.insert(logprobs_.end(), logprobs.begin(), logprobs.end());
}

void ScoreSink::OnDone(const RequestEnd& end) {
  MutexLock lock(mutex_);
  end_ = end;
  done_ = true;
  changed_.NotifyAll();
}

RequestEnd ScoreSink::Wait() {
  MutexLock lock(mutex_);
  while (!done_) changed_.Wait(mutex_);
  return end_;
}

absl::Status CheckBits(absl::Span<const float> bits) {
  for (const float b : bits) {
    if (b >= kMinBits && b <= kMaxBits) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("bits ", b, " is not within ", kMinBits, " and ", kMaxBits));
  }
  return absl::OkStatus();
}

}  // namespace mobi
