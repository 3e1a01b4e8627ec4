// One Generate call, from its first byte to its last. Four parties meet here: the gRPC handler
// parses and submits, the engine's thread delivers tokens (TokenSink), the write pump starts
// writes, and gRPC's threads report what became of them. The engine never waits: its results go
// into the outbox, and at any time exactly one party owns the write side (see WriteState).
//
// What it writes is a mobi.v1.GenerateResponse; the services derive a class that puts it on their
// wire. The call is deleted in gRPC's OnDone. That comes only after the finish, and the finish only
// after the engine's OnDone (or without a submit), so neither party can meet a dead call.
#ifndef MOBI_SERVER_GENERATE_CALL_H_
#define MOBI_SERVER_GENERATE_CALL_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "engine/detokenizer.h"
#include "engine/engine.h"
#include "engine/stop_matcher.h"
#include "grpcpp/server_context.h"
#include "mobi/v1/inference.pb.h"
#include "server/access_control.h"
#include "server/call_registry.h"
#include "server/controller.h"
#include "server/generate_request.h"
#include "server/limits.h"
#include "server/metrics.h"
#include "server/outbox.h"
#include "server/seed_source.h"
#include "server/serving_state.h"
#include "server/write_pump.h"

namespace mobi {

// What every call borrows; outlives all of them.
struct CallServices {
  const AccessControl& access;
  const RequestLimits& limits;
  const StreamLimits& stream_limits;
  const ServingState& state;
  const Controller& controller;
  const Clock& clock;
  Metrics& metrics;
  CallRegistry& registry;
  WritePump& pump;
  SeedSource& seeds;
};

class GenerateCall : public TokenSink, public WritePump::Source, public CallRegistry::Call {
 public:
  // Checks and submits; from now on the call looks after itself. A request that is an error
  // already ends with it.
  void Start(const absl::StatusOr<v1::GenerateRequest>& request);

  // TokenSink, on the engine's thread.
  void OnPromptLogprobs(int first, absl::Span<const float> logprobs) override;
  void OnPromptTopLogprobs(int first, absl::Span<const TopLogprobs> top) override;
  bool OnToken(const TokenEvent& event) override;
  void OnCompletionEnd(const CompletionEnd& end) override;
  void OnDone(const RequestEnd& end) override;

  void Pump() override;
  void Sweep(TimePoint now) override;
  void End(const absl::Status& status) override;

 protected:
  GenerateCall(const CallServices& services, grpc::CallbackServerContext* context)
      : services_(services), context_(context), arrival_(services.clock.Now()) {}
  ~GenerateCall() override = default;

  // The wire. Called by the owner of the write side, one at a time; the call may be gone when they
  // return. `message` lives until Written.
  // False: nothing of this message goes on the wire, and Written is not called.
  virtual bool Write(v1::GenerateResponse& message) = 0;
  virtual void WriteAndFinish(v1::GenerateResponse& message, const grpc::Status& status) = 0;
  virtual void Finish(const grpc::Status& status) = 0;
  // A refused request's status, with fields named as on this wire.
  virtual absl::Status OnThisWire(absl::Status status) const { return status; }

  // What gRPC reports, on its threads, concurrently.
  void Written(bool ok);
  void Cancelled();
  void Gone();  // deletes the call

  grpc::CallbackServerContext& context() { return *context_; }
  int prompt_tokens() const { return prompt_tokens_; }

 private:
  // Who may start the next write or the finish.
  enum class WriteState {
    kIdle,       // the next party with output: it schedules the pump
    kScheduled,  // the pump
    kWriting,    // gRPC: Written
    kFinished,   // nobody
  };

  // The text of one completion; of the engine's thread.
  struct Completion {
    Completion(const Tokenizer& tokenizer, bool continuation, const std::vector<std::string>& stops)
        : detokenizer(tokenizer, {.skip_special = true, .continuation = continuation}),
          matcher(stops) {}
    Detokenizer detokenizer;
    StopMatcher matcher;
    std::optional<TimePoint> last_token;
    bool ended = false;
  };

  absl::Status Submit(const absl::StatusOr<v1::GenerateRequest>& request);
  TimePoint Deadline() const;
  void SetUpCompletions(const v1::GenerateRequest& request, const ParsedRequest& parsed,
                        const Tokenizer& tokenizer);
  v1::TokenLogprob LogprobOf(const TokenEvent& event) const;
  void AddTop(const TopLogprobs& top, int count, v1::TokenLogprob& logprob) const;
  void ObserveToken(Completion& completion);
  // Puts the prompt into the first message, if it was asked for and has not been.
  void SendPromptLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  v1::Summary SummaryOf(const RequestEnd& end) const;
  absl::Status FinalStatusLocked(const absl::Status& engine_status) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CountEnd(const absl::Status& status, const RequestEnd* end);
  // Makes `status` the call's end; what is in the outbox goes first.
  void Conclude(const absl::Status& status, const RequestEnd* end,
                std::optional<v1::Summary> summary);
  void ScheduleLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Writes what there is, finishes, or goes idle. Only for the owner of the write side; the call
  // may be gone afterwards.
  void WriteNext();
  void CancelEngine();

  const CallServices services_;
  grpc::CallbackServerContext* const context_;
  const TimePoint arrival_;

  // Set before Submit, then of the engine's thread.
  Engine* engine_ = nullptr;
  const Tokenizer* tokenizer_ = nullptr;
  std::vector<std::string> stops_;
  std::vector<Completion> completions_;
  std::vector<v1::FinishReason> finish_reasons_;
  int prompt_tokens_ = 0;
  v1::Prompt prompt_;
  bool wants_prompt_ = false;
  bool wants_logprobs_ = false;
  int top_logprobs_ = 0;
  int prompt_top_logprobs_ = 0;
  std::string request_id_;
  uint64_t seed_ = 0;
  bool seen_token_ = false;

  v1::GenerateResponse writing_;  // of the write side's owner

  Mutex mutex_;
  Outbox outbox_ ABSL_GUARDED_BY(mutex_);
  WriteState write_state_ ABSL_GUARDED_BY(mutex_) = WriteState::kIdle;
  TimePoint write_started_ ABSL_GUARDED_BY(mutex_);
  std::optional<RequestId> engine_id_ ABSL_GUARDED_BY(mutex_);
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;      // by client, deadline or End
  bool overflowed_ ABSL_GUARDED_BY(mutex_) = false;     // the client reads too slowly
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;         // nothing can be written any more
  absl::Status forced_status_ ABSL_GUARDED_BY(mutex_);  // of End and OnCancel
  std::optional<grpc::Status> final_status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mobi

#endif  // MOBI_SERVER_GENERATE_CALL_H_
