// An engine whose output is written by the test: load patterns and faults must be exact, which no
// model gives. It keeps the contract of engine.h: one thread, sinks in order, OnDone exactly once,
// cancels and deadlines looked at every step.
#ifndef MOBI_TESTS_SERVER_SCRIPTED_ENGINE_H_
#define MOBI_TESTS_SERVER_SCRIPTED_ENGINE_H_

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "engine/base/mutex.h"
#include "engine/engine.h"

namespace mobi {

class ScriptedEngine final : public Engine {
 public:
  // The tokens that a request's completion `index` will consist of. When they end before
  // max_new_tokens the completion stops at kScriptedEos.
  using Script = std::function<std::vector<int32_t>(const GenerationRequest& request, int index)>;

  struct Options {
    Script script;
    int max_model_len = 1 << 20;
    Duration step_time{};  // 0: as fast as it goes
    bool paused = false;
  };

  explicit ScriptedEngine(Options options);
  ~ScriptedEngine() override;

  absl::StatusOr<RequestId> Submit(GenerationRequest request, TokenSink* sink) override;
  void Cancel(RequestId id) override;
  void SetPrecision(const PrecisionTarget& target) override;
  EngineStats stats() const override;
  int max_model_len() const override { return options_.max_model_len; }

  // What the test does to it.
  void Pause(bool paused);
  void RefuseSubmits(absl::Status status);  // OK: takes them again
  // The next token of every request is not finite, once.
  void GiveNonFiniteLogits();
  void BreakDevice();

  // What the test sees of it.
  PrecisionTarget target() const;
  std::vector<GenerationRequest> submitted() const;
  int live() const;
  uint64_t ended() const;

 private:
  struct Completion {
    std::vector<int32_t> tokens;
    size_t next = 0;
    bool finished = false;
  };
  struct Request {
    GenerationRequest spec;
    TokenSink* sink;
    std::vector<Completion> completions;
    TimePoint arrival;
    TimePoint first_token;
    TimePoint last_token;
    int generated = 0;
    bool scored = false;
  };

  void Loop();
  bool Step();
  // True when the request is over; `end` then says how.
  bool Advance(Request& request, bool poisoned, RequestEnd& end);
  void EmitToken(Request& request, int index);
  bool WaitForWork();

  const Options options_;
  mutable Mutex mutex_;
  CondVar wake_;
  std::map<RequestId, std::unique_ptr<Request>> incoming_ ABSL_GUARDED_BY(mutex_);
  std::vector<RequestId> cancelled_ ABSL_GUARDED_BY(mutex_);
  std::vector<GenerationRequest> submitted_ ABSL_GUARDED_BY(mutex_);
  absl::Status refusal_ ABSL_GUARDED_BY(mutex_);
  PrecisionTarget target_ ABSL_GUARDED_BY(mutex_);
  EngineStats stats_ ABSL_GUARDED_BY(mutex_);
  RequestId next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  uint64_t ended_ ABSL_GUARDED_BY(mutex_) = 0;
  bool paused_ ABSL_GUARDED_BY(mutex_);
  bool poisoned_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<RequestId, std::unique_ptr<Request>> running_;  // of the engine's thread
  std::thread thread_;
};

inline constexpr int32_t kScriptedEos = 277;

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_SCRIPTED_ENGINE_H_
