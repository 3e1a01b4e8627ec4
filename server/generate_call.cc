#include "server/generate_call.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "server/rpc_status.h"

namespace mobi {
namespace {

constexpr char kTenantKey[] = "mobi-tenant";

v1::FinishReason ReasonOf(FinishReason reason) {
  return reason == FinishReason::kLength ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_STOP;
}

absl::StatusOr<std::string> TenantOf(const grpc::CallbackServerContext& context,
                                     const RequestLimits& limits) {
  const auto found = context.client_metadata().find(kTenantKey);
  if (found == context.client_metadata().end()) return std::string();
  if (found->second.size() > static_cast<size_t>(limits.max_tenant_bytes)) {
    return FieldError(kTenantKey, absl::StrFormat("%d bytes, at most %d are taken",
                                                  found->second.size(), limits.max_tenant_bytes));
  }
  return std::string(found->second.data(), found->second.size());
}

}  // namespace

void GenerateCall::Start(const absl::StatusOr<v1::GenerateRequest>& request) {
  // Registered before it is admitted, so that a drain sees every call it let in; one that is
  // refused is nothing to wait for, however many keep coming.
  services_.registry.Add(this);
  if (auto status = Submit(request); !status.ok()) {
    services_.registry.Remove(this);
    Conclude(OnThisWire(std::move(status)), nullptr, std::nullopt);
  }
}

absl::Status GenerateCall::Submit(const absl::StatusOr<v1::GenerateRequest>& request) {
  MOBI_RETURN_IF_ERROR(services_.access.Check(*context_, Scope::kGenerate));
  MOBI_RETURN_IF_ERROR(request.status());
  MOBI_ASSIGN_OR_RETURN(const ServedModel* model, services_.state.Admit());
  const PolicyVersion policy = services_.controller.policy();
  MOBI_ASSIGN_OR_RETURN(ParsedRequest parsed,
                        ParseGenerateRequest(*request, *model, services_.limits, *policy.policy,
                                             services_.clock.WallNow()));
  MOBI_ASSIGN_OR_RETURN(parsed.engine.tenant, TenantOf(*context_, services_.limits));
  parsed.engine.deadline = Deadline();
  if (parsed.engine.deadline <= services_.clock.Now()) {
    return absl::DeadlineExceededError("the deadline passed before the request was queued");
  }
  if (!parsed.has_seed) parsed.engine.sampling.seed = services_.seeds.Next();
  if (parsed.request_id.empty()) {
    parsed.request_id = absl::StrFormat("%016x", services_.seeds.Next());
  }
  engine_ = model->engine.get();
  SetUpCompletions(*request, parsed, *model->tokenizer);
  MOBI_ASSIGN_OR_RETURN(const RequestId id, engine_->Submit(std::move(parsed.engine), this));
  bool cancelled = false;
  {
    MutexLock lock(mutex_);
    engine_id_ = id;
    cancelled = cancelled_;
  }
  if (cancelled) engine_->Cancel(id);
  return absl::OkStatus();
}

// The client's, in the engine's time, capped.
TimePoint GenerateCall::Deadline() const {
  const TimePoint now = services_.clock.Now();
  const Duration left = context_->deadline() == std::chrono::system_clock::time_point::max()
                            ? services_.limits.max_deadline
                            : Duration(context_->deadline() - std::chrono::system_clock::now());
  return now + std::min(left, services_.limits.max_deadline);
}

void GenerateCall::SetUpCompletions(const v1::GenerateRequest& request, const ParsedRequest& parsed,
                                    const Tokenizer& tokenizer) {
  tokenizer_ = &tokenizer;
  prompt_tokens_ = static_cast<int>(parsed.engine.prompt.size());
  stops_ = parsed.stops;
  request_id_ = parsed.request_id;
  seed_ = parsed.engine.sampling.seed;
  wants_logprobs_ = parsed.logprobs;
  top_logprobs_ = parsed.engine.top_logprobs;
  prompt_top_logprobs_ = parsed.engine.prompt_top_logprobs;
  wants_prompt_ = request.echo() || request.has_prompt_logprobs();
  completions_.reserve(parsed.engine.n);
  // Text is continued; the answer to a chat stands for itself, and so do ids, whose text we never
  // saw.
  const bool continuation = request.has_text();
  for (int i = 0; i < parsed.engine.n; ++i) {
    completions_.emplace_back(tokenizer, continuation, stops_);
  }
  finish_reasons_.resize(parsed.engine.n, v1::FINISH_REASON_UNSPECIFIED);
  if (!wants_prompt_) return;
  const auto& ids = parsed.engine.prompt;
  prompt_.mutable_token_ids()->Assign(ids.begin(), ids.end());
  if (request.echo()) {
    *prompt_.mutable_text() =
        request.has_text() ? request.text() : tokenizer.Decode(ids, /*skip_special=*/false);
  }
  if (!request.has_prompt_logprobs()) return;
  for (size_t i = 1; i < ids.size(); ++i) {
    v1::TokenLogprob& logprob = *prompt_.add_logprobs();
    logprob.set_token_id(ids[i]);
    logprob.set_token(std::string(tokenizer.TokenBytes(ids[i])));
  }
}

void GenerateCall::OnPromptLogprobs(int first, absl::Span<const float> logprobs) {
  if (!wants_prompt_) return;  // sent; a preempted prompt was read again
  for (size_t i = 0; i < logprobs.size(); ++i) {
    prompt_.mutable_logprobs(first - 1 + static_cast<int>(i))->set_logprob(logprobs[i]);
  }
}

void GenerateCall::OnPromptTopLogprobs(int first, absl::Span<const TopLogprobs> top) {
  if (!wants_prompt_) return;
  for (size_t i = 0; i < top.size(); ++i) {
    auto& logprob = *prompt_.mutable_logprobs(first - 1 + static_cast<int>(i));
    logprob.clear_top();
    AddTop(top[i], prompt_top_logprobs_, logprob);
  }
}

bool GenerateCall::OnToken(const TokenEvent& event) {
  Completion& completion = completions_[event.index];
  ObserveToken(completion);
  const std::string text = completion.matcher.Push(completion.detokenizer.Push(event.token));
  MutexLock lock(mutex_);
  if (overflowed_ || broken_) return false;
  SendPromptLocked();
  outbox_.AddToken(event.index, event.token, event.effective_bits, text);
  if (wants_logprobs_) outbox_.AddLogprob(event.index, LogprobOf(event));
  if (outbox_.bytes() > services_.stream_limits.max_outbox_bytes) {
    overflowed_ = true;
    outbox_.Clear();
    services_.metrics.OutboxOverflowed();
    return false;
  }
  ScheduleLocked();
  return !completion.matcher.matched().has_value();
}

void GenerateCall::OnCompletionEnd(const CompletionEnd& end) {
  Completion& completion = completions_[end.index];
  std::string text = completion.matcher.Push(completion.detokenizer.Flush());
  text += completion.matcher.Flush();
  const auto matched = completion.matcher.matched();
  // Text that the flush completed may hold a stop string too.
  const FinishReason reason = matched ? FinishReason::kStop : end.reason;
  completion.ended = true;
  finish_reasons_[end.index] = ReasonOf(reason);
  MutexLock lock(mutex_);
  const bool lost = overflowed_ || broken_;
  services_.metrics.CompletionEnded(lost ? FinishReason::kCancelled : reason);
  if (lost) return;
  SendPromptLocked();
  outbox_.EndCompletion(end.index, text, ReasonOf(reason), matched ? &stops_[*matched] : nullptr,
                        !matched && end.stop_id ? &*end.stop_id : nullptr);
  ScheduleLocked();
}

void GenerateCall::OnDone(const RequestEnd& end) {
  absl::Status status;
  {
    MutexLock lock(mutex_);
    status = FinalStatusLocked(end.status);
  }
  std::optional<v1::Summary> summary;
  if (status.ok()) summary = SummaryOf(end);
  Conclude(status, &end, std::move(summary));
}

void GenerateCall::Written(bool ok) {
  if (!ok) {
    {
      MutexLock lock(mutex_);
      broken_ = true;
      outbox_.Clear();
    }
    CancelEngine();
  }
  WriteNext();
}

void GenerateCall::Cancelled() {
  {
    MutexLock lock(mutex_);
    if (forced_status_.ok()) {
      const bool late = context_->deadline() <= std::chrono::system_clock::now();
      forced_status_ = late ? absl::DeadlineExceededError("the deadline has passed")
                            : absl::CancelledError("the client went away");
    }
  }
  CancelEngine();
}

void GenerateCall::Gone() {
  services_.registry.Remove(this);
  delete this;
}

void GenerateCall::Pump() { WriteNext(); }

void GenerateCall::Sweep(TimePoint now) {
  {
    MutexLock lock(mutex_);
    if (write_state_ != WriteState::kWriting || broken_) return;
    if (now - write_started_ < services_.stream_limits.max_write_stall) return;
    broken_ = true;
    outbox_.Clear();
    if (forced_status_.ok()) {
      forced_status_ = absl::ResourceExhaustedError("the client stopped reading");
    }
  }
  services_.metrics.WriteStalled();
  // The client takes nothing, so no status can reach it in order: reset the stream.
  context_->TryCancel();
}

void GenerateCall::End(const absl::Status& status) {
  {
    MutexLock lock(mutex_);
    if (forced_status_.ok()) forced_status_ = status;
  }
  CancelEngine();
}

v1::TokenLogprob GenerateCall::LogprobOf(const TokenEvent& event) const {
  v1::TokenLogprob logprob;
  logprob.set_token_id(event.token);
  logprob.set_logprob(event.logprob);
  logprob.set_token(std::string(tokenizer_->TokenBytes(event.token)));
  if (event.top != nullptr) AddTop(*event.top, top_logprobs_, logprob);
  return logprob;
}

void GenerateCall::AddTop(const TopLogprobs& top, int count, v1::TokenLogprob& logprob) const {
  for (int i = 0; i < count; ++i) {
    auto& alternative = *logprob.add_top();
    alternative.set_token_id(top.tokens[i]);
    alternative.set_logprob(top.logprobs[i]);
    alternative.set_token(std::string(tokenizer_->TokenBytes(top.tokens[i])));
  }
}

void GenerateCall::ObserveToken(Completion& completion) {
  const TimePoint now = services_.clock.Now();
  if (!seen_token_) services_.metrics.time_to_first_token.Observe(now - arrival_);
  seen_token_ = true;
  if (completion.last_token) {
    services_.metrics.inter_token_latency.Observe(now - *completion.last_token);
  }
  completion.last_token = now;
}

void GenerateCall::SendPromptLocked() {
  if (!wants_prompt_) return;
  wants_prompt_ = false;
  outbox_.SetPrompt(std::move(prompt_));
}

v1::Summary GenerateCall::SummaryOf(const RequestEnd& end) const {
  v1::Summary summary;
  summary.set_request_id(request_id_);
  summary.mutable_finish_reasons()->Assign(finish_reasons_.begin(), finish_reasons_.end());
  summary.mutable_usage()->set_prompt_tokens(end.usage.prompt_tokens);
  summary.mutable_usage()->set_cached_tokens(end.usage.cached_tokens);
  summary.mutable_usage()->set_completion_tokens(end.usage.completion_tokens);
  summary.set_mean_effective_bits(end.mean_effective_bits);
  summary.mutable_timings()->set_queue_ms(ToMillis(end.timings.queue));
  summary.mutable_timings()->set_prefill_ms(ToMillis(end.timings.prefill));
  summary.mutable_timings()->set_decode_ms(ToMillis(end.timings.decode));
  summary.mutable_timings()->set_total_ms(ToMillis(services_.clock.Now() - arrival_));
  summary.set_seed(seed_);
  return summary;
}

absl::Status GenerateCall::FinalStatusLocked(const absl::Status& engine_status) const {
  if (overflowed_) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("the client reads too slowly: more than %d bytes were waiting for it",
                        services_.stream_limits.max_outbox_bytes));
  }
  // The engine says "cancelled", or was done just before; who ended the call knows why.
  const bool vague = absl::IsCancelled(engine_status) || (engine_status.ok() && broken_);
  if (!vague) return engine_status;
  return forced_status_.ok() ? absl::CancelledError("the client went away") : forced_status_;
}

void GenerateCall::CountEnd(const absl::Status& status, const RequestEnd* end) {
  Metrics& metrics = services_.metrics;
  metrics.RequestEnded(Method::kGenerate, status.code());
  for (const Completion& completion : completions_) {
    if (!completion.ended && end != nullptr) metrics.CompletionEnded(FinishReason::kCancelled);
  }
  if (!status.ok() || end == nullptr) return;
  metrics.request_latency.Observe(services_.clock.Now() - arrival_);
  metrics.queue_time.Observe(end->timings.queue);
  metrics.prefill_time.Observe(end->timings.prefill);
  metrics.decode_time.Observe(end->timings.decode);
}

void GenerateCall::Conclude(const absl::Status& status, const RequestEnd* end,
                            std::optional<v1::Summary> summary) {
  CountEnd(status, end);
  const Duration retry_after = absl::IsUnavailable(status)
                                   ? services_.stream_limits.retry_after_unavailable
                                   : services_.stream_limits.retry_after_overload;
  MutexLock lock(mutex_);
  if (status.ok() && !broken_) {
    SendPromptLocked();
    if (summary) outbox_.SetSummary(*std::move(summary));
  }
  final_status_ = ToGrpcStatus(WithRetry(status, retry_after));
  ScheduleLocked();
}

void GenerateCall::ScheduleLocked() {
  if (write_state_ != WriteState::kIdle) return;
  write_state_ = WriteState::kScheduled;
  services_.pump.Schedule(this);
}

void GenerateCall::WriteNext() {
  for (;;) {
    std::optional<grpc::Status> finish;
    bool write = false;
    {
      MutexLock lock(mutex_);
      write = !outbox_.empty();
      if (write) outbox_.TakeInto(writing_);
      finish = final_status_;
      write_state_ = write    ? WriteState::kWriting
                     : finish ? WriteState::kFinished
                              : WriteState::kIdle;
      write_started_ = services_.clock.Now();
    }
    // In each branch: once the wire has it, the call may be gone.
    if (write && finish) return WriteAndFinish(writing_, *finish);
    if (!write && finish) return Finish(*finish);
    if (!write || Write(writing_)) return;
  }
}

void GenerateCall::CancelEngine() {
  std::optional<RequestId> id;
  {
    MutexLock lock(mutex_);
    cancelled_ = true;
    id = engine_id_;
  }
  if (id) engine_->Cancel(*id);
}

}  // namespace mobi
