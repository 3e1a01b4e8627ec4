#include "tests/server/scripted_engine.h"

#include <algorithm>
#include <utility>

namespace mobi {

ScriptedEngine::ScriptedEngine(Options options)
    : options_(std::move(options)), paused_(options_.paused), thread_([this] { Loop(); }) {}

ScriptedEngine::~ScriptedEngine() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    wake_.NotifyAll();
  }
  thread_.join();
}

absl::StatusOr<RequestId> ScriptedEngine::Submit(GenerationRequest spec, TokenSink* sink) {
  auto request = std::make_unique<Request>();
  request->sink = sink;
  request->arrival = std::chrono::steady_clock::now();
  for (int i = 0; i < spec.n; ++i) {
    request->completions.push_back({.tokens = options_.script(spec, i)});
  }
  MutexLock lock(mutex_);
  if (!refusal_.ok()) return refusal_;
  submitted_.push_back(spec);
  request->spec = std::move(spec);
  const RequestId id = next_id_++;
  incoming_.emplace(id, std::move(request));
  ++stats_.running_requests;
  wake_.NotifyAll();
  return id;
}

void ScriptedEngine::Cancel(RequestId id) {
  MutexLock lock(mutex_);
  cancelled_.push_back(id);
  wake_.NotifyAll();
}

void ScriptedEngine::SetPrecision(const PrecisionTarget& target) {
  MutexLock lock(mutex_);
  target_ = target;
}

EngineStats ScriptedEngine::stats() const {
  MutexLock lock(mutex_);
  EngineStats stats = stats_;
  stats.num_kv_blocks = 1000;
  stats.free_kv_blocks = 1000 - stats.running_requests;
  stats.target_bits = target_.target_bits;
  return stats;
}

void ScriptedEngine::Pause(bool paused) {
  MutexLock lock(mutex_);
  paused_ = paused;
  wake_.NotifyAll();
}

void ScriptedEngine::RefuseSubmits(absl::Status status) {
  MutexLock lock(mutex_);
  refusal_ = std::move(status);
}

void ScriptedEngine::GiveNonFiniteLogits() {
  MutexLock lock(mutex_);
  poisoned_ = true;
}

void ScriptedEngine::BreakDevice() {
  MutexLock lock(mutex_);
  broken_ = true;
  stats_.failed = true;
  wake_.NotifyAll();
}

PrecisionTarget ScriptedEngine::target() const {
  MutexLock lock(mutex_);
  return target_;
}

std::vector<GenerationRequest> ScriptedEngine::submitted() const {
  MutexLock lock(mutex_);
  return submitted_;
}

int ScriptedEngine::live() const {
  MutexLock lock(mutex_);
  return stats_.running_requests;
}

uint64_t ScriptedEngine::ended() const {
  MutexLock lock(mutex_);
  return ended_;
}

// False when the engine is to stop.
bool ScriptedEngine::WaitForWork() {
  MutexLock lock(mutex_);
  while (!stopping_ && incoming_.empty() && cancelled_.empty() && (running_.empty() || paused_) &&
         !(broken_ && !running_.empty())) {
    // Deadlines pass while it is paused.
    wake_.WaitFor(mutex_, std::chrono::milliseconds(2));
    if (!running_.empty()) break;
  }
  return !stopping_;
}

void ScriptedEngine::Loop() {
  bool go_on = true;
  while (go_on) {
    go_on = WaitForWork() && Step();
    if (options_.step_time > Duration::zero()) std::this_thread::sleep_for(options_.step_time);
  }
  MutexLock lock(mutex_);
  for (auto& [id, request] : incoming_) running_.emplace(id, std::move(request));
  RequestEnd end;
  end.status = absl::UnavailableError("the server is stopping");
  end.reason = FinishReason::kCancelled;
  for (auto& [id, request] : running_) request->sink->OnDone(end);
}

bool ScriptedEngine::Step() {
  std::vector<RequestId> cancelled;
  bool paused = false;
  bool poisoned = false;
  bool broken = false;
  float bits = 0;
  {
    MutexLock lock(mutex_);
    for (auto& [id, request] : incoming_) running_.emplace(id, std::move(request));
    incoming_.clear();
    cancelled.swap(cancelled_);
    paused = paused_;
    poisoned = std::exchange(poisoned_, false);
    broken = broken_;
    bits = target_.target_bits;
    if (!paused) ++stats_.steps;
  }
  uint64_t generated = 0;
  for (auto it = running_.begin(); it != running_.end();) {
    Request& request = *it->second;
    const int before = request.generated;
    RequestEnd end;
    bool over = true;
    if (std::find(cancelled.begin(), cancelled.end(), it->first) != cancelled.end()) {
      end.status = absl::CancelledError("cancelled");
      end.reason = FinishReason::kCancelled;
    } else if (std::chrono::steady_clock::now() >= request.spec.deadline) {
      end.status = absl::DeadlineExceededError("the request's deadline has passed");
      end.reason = FinishReason::kDeadline;
    } else if (broken) {
      end.status = absl::InternalError("the device has failed");
      end.reason = FinishReason::kError;
    } else {
      over = !paused && Advance(request, poisoned, end);
    }
    generated += request.generated - before;
    if (!over) {
      ++it;
      continue;
    }
    end.usage.prompt_tokens = static_cast<int>(request.spec.prompt.size());
    end.usage.completion_tokens = request.generated;
    end.mean_effective_bits = bits;
    request.sink->OnDone(end);
    it = running_.erase(it);
    MutexLock lock(mutex_);
    --stats_.running_requests;
    ++ended_;
  }
  MutexLock lock(mutex_);
  stats_.generation_tokens += generated;
  stats_.effective_tokens += generated;
  stats_.effective_bits_sum += bits * static_cast<double>(generated);
  stats_.loaded_bits_sum += bits;
  return true;
}

bool ScriptedEngine::Advance(Request& request, bool poisoned, RequestEnd& end) {
  if (poisoned) {
    end.status = absl::DataLossError("the model gave logits that are not finite");
    end.reason = FinishReason::kError;
    return true;
  }
  const auto prompt = static_cast<int>(request.spec.prompt.size());
  if (request.spec.prompt_logprobs && !std::exchange(request.scored, true)) {
    std::vector<float> logprobs;
    for (int i = 1; i < prompt; ++i) logprobs.push_back(-0.5f * static_cast<float>(i));
    request.sink->OnPromptLogprobs(1, logprobs);
  }
  bool over = true;
  for (int i = 0; i < request.spec.n; ++i) {
    if (!request.completions[i].finished) EmitToken(request, i);
    over = over && request.completions[i].finished;
  }
  if (!over) return false;
  end.reason = FinishReason::kStop;
  end.timings.decode = request.last_token - request.first_token;
  return true;
}

void ScriptedEngine::EmitToken(Request& request, int index) {
  Completion& completion = request.completions[index];
  const auto finish = [&](FinishReason reason, std::optional<int32_t> stop_id) {
    completion.finished = true;
    request.sink->OnCompletionEnd({index, reason, stop_id});
  };
  if (request.spec.max_new_tokens == 0) return finish(FinishReason::kLength, std::nullopt);
  const int32_t token = completion.next < completion.tokens.size()
                            ? completion.tokens[completion.next]
                            : kScriptedEos;
  const auto& stop_ids = request.spec.stop_ids;
  const bool stops = std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end();
  if (stops || token == kScriptedEos) return finish(FinishReason::kStop, token);
  ++completion.next;
  ++request.generated;
  request.last_token = std::chrono::steady_clock::now();
  if (request.generated == 1) request.first_token = request.last_token;
  TopLogprobs top;
  for (int i = 0; i < kMaxTopLogprobs; ++i) {
    top.tokens[i] = (token + i) % 256;
    top.logprobs[i] = -0.25f - static_cast<float>(i);
  }
  TokenEvent event{.index = index, .token = token, .logprob = -0.25f};
  event.top = request.spec.top_logprobs > 0 ? &top : nullptr;
  {
    MutexLock lock(mutex_);
    event.effective_bits = std::clamp(target_.target_bits, request.spec.precision.min_bits,
                                      request.spec.precision.max_bits);
  }
  if (!request.sink->OnToken(event)) {
    finish(FinishReason::kStop, std::nullopt);
  } else if (completion.next == static_cast<size_t>(request.spec.max_new_tokens)) {
    finish(FinishReason::kLength, std::nullopt);
  }
}

}  // namespace mobi
