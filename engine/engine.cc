#include "engine/engine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <limits>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "engine/admission.h"
#include "engine/base/mutex.h"
#include "engine/base/status_macros.h"
#include "engine/block_allocator.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "engine/prefix_cache.h"
#include "engine/sampling.h"
#include "engine/scheduler.h"
#include "engine/slice_residency.h"
#include "engine/step_pace.h"
#include "engine/step_runner.h"

namespace mobi {
namespace {

// Between looks of an idle engine while slices are away, and between pieces of one that returns.
constexpr Duration kAwayWait = std::chrono::milliseconds(20);
constexpr Duration kRestoringWait = std::chrono::milliseconds(1);
// For restoring between two steps: half as long as the last one, within bounds.
constexpr Duration kLeastBudget = std::chrono::milliseconds(1);
constexpr Duration kMostBudget = std::chrono::milliseconds(50);
constexpr Duration kIdleBudget = std::chrono::milliseconds(20);

class EngineImpl final : public Engine {
 public:
  EngineImpl(const EngineOptions& options, int max_model_len, Model& model,
             const WeightSource& source, const Clock& clock, StepRunner runner)
      : options_(options),
        max_model_len_(max_model_len),
        model_(model),
        clock_(clock),
        runner_(std::move(runner)),
        allocator_(runner_.kv().num_blocks(), [this](int32_t block) { cache_.Evict(block); }),
        cache_(allocator_, options.block_size),
        scheduler_({options.block_size, options.max_num_seqs, options.max_num_batched_tokens},
                   allocator_, cache_),
        residency_(options.residency, model.slice_planes(), source, runner_.kv(), allocator_,
                   scheduler_, clock),
        pace_(options.max_decode_slowdown, options.max_num_seqs,
              std::max(1, options.max_num_batched_tokens / 2)),
        admission_(
            {options.max_waiting_requests, options.max_waiting_tokens, options.max_expected_wait}) {
    PublishStats();
    thread_ = std::thread([this] { Loop(); });
  }

  ~EngineImpl() override {
    {
      MutexLock lock(mutex_);
      stopping_ = true;
    }
    wake_.NotifyAll();
    thread_.join();
  }

  absl::StatusOr<RequestId> Submit(GenerationRequest request, TokenSink* sink) override;
  void Cancel(RequestId id) override;
  void SetPrecision(const PrecisionTarget& target) override;
  EngineStats stats() const override;
  int max_model_len() const override { return max_model_len_; }

 private:
  PrecisionTarget Target() const;
  absl::Status Validate(const GenerationRequest& request) const;

  // The engine's thread.
  void Loop();
  bool WaitForWork();
  void DrainQueues();
  void EndExpired(TimePoint now);
  Duration PrefillTime(const Request& request) const;
  void UpdateResidency();
  absl::Status Step();
  void CountCoherent(const StepResult& result, const PrecisionTarget& target);
  void LearnPace(absl::Span<const ScheduledChunk> plan, int started);
  void Commit(const ChunkResult& result, const PrecisionTarget& target, TimePoint now);
  void EmitToken(Sequence& sequence, const ChunkResult& result, TimePoint now);
  void EndCompletion(Sequence& sequence, FinishReason reason, std::optional<int32_t> stop_id);
  // Ends what is left of the request with `status`.
  void EndRequest(Request& request, FinishReason reason, absl::Status status);
  void FinishEnded(TimePoint now);
  void Fail(const absl::Status& status);
  void PublishStats();

  const EngineOptions options_;
  const int max_model_len_;
  Model& model_;
  const Clock& clock_;

  // Owned by the engine's thread.
  StepRunner runner_;
  BlockAllocator allocator_;
  PrefixCache cache_;
  Scheduler scheduler_;
  SliceResidency residency_;
  std::array<int, kNumLevels + 1> needing_{};  // requests by the levels that they need
  bool held_ = false;                          // all that waits, waits for slices
  absl::flat_hash_map<RequestId, std::unique_ptr<Request>> requests_;
  EngineStats counters_;
  StepPace pace_;
  int unstarted_ = 0;  // requests that the scheduler has not begun to serve

  // The crossings.
  std::atomic<RequestId> next_id_{1};
  mutable Mutex mutex_;
  CondVar wake_;
  std::deque<std::unique_ptr<Request>> submitted_ ABSL_GUARDED_BY(mutex_);
  std::vector<RequestId> cancelled_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool failed_ ABSL_GUARDED_BY(mutex_) = false;
  PrecisionTarget precision_ ABSL_GUARDED_BY(mutex_);
  // Requests accepted but not scheduled yet, wherever they are.
  Admission admission_ ABSL_GUARDED_BY(mutex_);
  EngineStats published_ ABSL_GUARDED_BY(mutex_);

  std::thread thread_;
};

absl::Status EngineImpl::Validate(const GenerationRequest& request) const {
  const auto& spec = request;
  if (spec.prompt.empty()) return absl::InvalidArgumentError("prompt: empty");
  const int vocab_size = model_.config().vocab_size;
  for (size_t i = 0; i < spec.prompt.size(); ++i) {
    if (spec.prompt[i] < 0 || spec.prompt[i] >= vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("prompt: token ", i, " is ", spec.prompt[i],
                                                     ", the vocabulary has ", vocab_size));
    }
  }
  // At least one token must be left to generate, if any is asked for.
  const int room = max_model_len_ - (spec.max_new_tokens > 0 ? 1 : 0);
  if (static_cast<int64_t>(spec.prompt.size()) > room) {
    return absl::InvalidArgumentError(absl::StrCat("prompt: ", spec.prompt.size(),
                                                   " tokens, the context holds ", max_model_len_));
  }
  if (spec.n < 1 || spec.max_new_tokens < 0 || spec.top_logprobs < 0 ||
      spec.top_logprobs > kMaxTopLogprobs || spec.prompt_top_logprobs < 0 ||
      spec.prompt_top_logprobs > kMaxTopLogprobs ||
      spec.sampling.logit_bias.size() > kMaxLogitBias) {
    return absl::InvalidArgumentError("n, max_new_tokens, top_logprobs or logit_bias out of range");
  }
  for (const auto& [token, bias] : spec.sampling.logit_bias) {
    if (token < 0 || token >= vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("logit_bias: token ", token));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<RequestId> EngineImpl::Submit(GenerationRequest spec, TokenSink* sink) {
  MOBI_RETURN_IF_ERROR(Validate(spec));
  auto request = std::make_unique<Request>();
  const RequestId id = next_id_.fetch_add(1);
  request->id = id;
  request->spec = std::move(spec);
  request->sink = sink;
  request->arrival = clock_.Now();
  request->usage.prompt_tokens = request->prompt_length();
  request->needed_levels = NeededLevels(request->spec.precision);
  for (int i = 0; i < request->spec.n; ++i) {
    Sequence& sequence = request->sequences.emplace_back();
    sequence.request = request.get();
    sequence.index = i;
    sequence.tokens = request->spec.prompt;
  }
  {
    MutexLock lock(mutex_);
    if (failed_) return absl::UnavailableError("the device has failed");
    if (stopping_) return absl::UnavailableError("the engine is stopping");
    const GenerationRequest& accepted = request->spec;
    MOBI_RETURN_IF_ERROR(admission_.Check(accepted.priority, request->prompt_length(),
                                          accepted.deadline - request->arrival));
    admission_.Enter(accepted.priority, request->prompt_length());
    submitted_.push_back(std::move(request));
  }
  wake_.NotifyOne();
  return id;
}

void EngineImpl::Cancel(RequestId id) {
  {
    MutexLock lock(mutex_);
    cancelled_.push_back(id);
  }
  wake_.NotifyOne();
}

void EngineImpl::SetPrecision(const PrecisionTarget& target) {
  MutexLock lock(mutex_);
  precision_ = target;
}

PrecisionTarget EngineImpl::Target() const {
  MutexLock lock(mutex_);
  return precision_;
}

EngineStats EngineImpl::stats() const {
  MutexLock lock(mutex_);
  EngineStats stats = published_;
  stats.waiting_requests = admission_.waiting_requests();
  stats.expected_wait_seconds = ToSeconds(admission_.ExpectedWait(std::numeric_limits<int>::min()));
  stats.waiting_tokens = admission_.waiting_tokens();
  return stats;
}

void EngineImpl::Loop() {
  while (WaitForWork()) {
    DrainQueues();
    EndExpired(clock_.Now());
    UpdateResidency();
    if (!scheduler_.idle()) {
      const absl::Status status = Step();
      if (!status.ok()) Fail(status);
    }
    FinishEnded(clock_.Now());
    PublishStats();
  }
  DrainQueues();
  for (auto& [id, request] : requests_) {
    if (!request->ended) {
      EndRequest(*request, FinishReason::kCancelled,
                 absl::UnavailableError("the server is stopping"));
    }
  }
  FinishEnded(clock_.Now());
  PublishStats();
}

// False when the engine is to stop.
bool EngineImpl::WaitForWork() {
  MutexLock lock(mutex_);
  if (!residency_.settled()) {
    const bool work = stopping_ || !submitted_.empty() || !cancelled_.empty();
    if (!work && (scheduler_.idle() || held_)) {
      wake_.WaitFor(mutex_, residency_.restoring() ? kRestoringWait : kAwayWait);
    }
    return !stopping_;
  }
  while (!stopping_ && submitted_.empty() && cancelled_.empty() && scheduler_.idle()) {
    wake_.Wait(mutex_);
  }
  return !stopping_;
}

void EngineImpl::DrainQueues() {
  std::deque<std::unique_ptr<Request>> submitted;
  std::vector<RequestId> cancelled;
  {
    MutexLock lock(mutex_);
    submitted.swap(submitted_);
    cancelled.swap(cancelled_);
  }
  for (auto& request : submitted) {
    scheduler_.Add(*request);
    ++needing_[request->needed_levels];
    ++unstarted_;
    requests_.emplace(request->id, std::move(request));
  }
  for (const RequestId id : cancelled) {
    const auto found = requests_.find(id);
    if (found != requests_.end() && !found->second->ended) {
      EndRequest(*found->second, FinishReason::kCancelled, absl::CancelledError("cancelled"));
    }
  }
}

void EngineImpl::EndExpired(TimePoint now) {
  for (auto& [id, request] : requests_) {
    if (request->ended) continue;
    if (now >= request->spec.deadline) {
      EndRequest(*request, FinishReason::kDeadline,
                 absl::DeadlineExceededError("the request's deadline has passed"));
    } else if (!request->first_scheduled && now + PrefillTime(*request) >= request->spec.deadline) {
      EndRequest(*request, FinishReason::kDeadline,
                 absl::DeadlineExceededError("the deadline leaves no time to read the prompt"));
    } else if (!request->first_scheduled && now - request->arrival > options_.max_queue_wait &&
               !residency_.Awaits(request->needed_levels)) {
      EndRequest(*request, FinishReason::kError,
                 absl::ResourceExhaustedError(absl::StrCat(
                     "waited ", ToSeconds(options_.max_queue_wait), " s without being served")));
    }
  }
}

// What reading the request's prompt will take at least, from the pace of past prompts.
Duration EngineImpl::PrefillTime(const Request& request) const {
  return std::chrono::duration_cast<Duration>(
      std::chrono::duration<double>(pace_.seconds_per_prompt_token() * request.prompt_length()));
}

void EngineImpl::UpdateResidency() {
  int needed = NeededLevels(Target().floor_bits);
  for (int level = needed + 1; level <= kNumLevels; ++level) {
    if (needing_[level] > 0) needed = level;
  }
  const auto half_a_step = std::chrono::duration_cast<Duration>(
      std::chrono::duration<double>(counters_.last_step_seconds / 2));
  residency_.Update(needed, scheduler_.idle() || held_
                                ? kIdleBudget
                                : std::clamp(half_a_step, kLeastBudget, kMostBudget));
}

absl::Status EngineImpl::Step() {
  const TimePoint begin = clock_.Now();
  const std::vector<ScheduledChunk> plan = scheduler_.Schedule(begin, &pace_);
  held_ = plan.empty();
  if (plan.empty()) return absl::OkStatus();
  int started = 0;
  for (const ScheduledChunk& chunk : plan) {
    Request& request = *chunk.sequence->request;
    if (request.first_scheduled) continue;
    request.first_scheduled = begin;
    ++started;
    --unstarted_;
    MutexLock lock(mutex_);
    admission_.Leave(request.spec.priority, request.prompt_length());
  }
  PrecisionTarget target = Target();
  const auto most_bits = static_cast<float>(BitsOfLevel(residency_.resident_levels()));
  target.target_bits = std::min(target.target_bits, most_bits);
  MOBI_ASSIGN_OR_RETURN(StepResult result, runner_.Run(plan, target, residency_.resident_levels()));
  const TimePoint now = clock_.Now();
  for (const ChunkResult& chunk : result.chunks) Commit(chunk, target, now);
  CountCoherent(result, target);
  ++counters_.steps;
  counters_.loaded_bits_sum += result.loaded_bits;
  if (std::all_of(plan.begin(), plan.end(), [](const auto& chunk) { return chunk.decode; })) {
    counters_.decode_loaded_bits_sum += result.loaded_bits;
    ++counters_.decode_steps;
  }
  counters_.last_step_seconds = ToSeconds(now - begin);
  counters_.step_seconds_sum += counters_.last_step_seconds;
  LearnPace(plan, started);
  return absl::OkStatus();
}

// The decodes of a coherent step share levels, so any of them that a price decides tells its bits.
void EngineImpl::CountCoherent(const StepResult& result, const PrecisionTarget& target) {
  const auto priced = std::find_if(
      result.chunks.begin(), result.chunks.end(),
      [](const auto& chunk) { return chunk.regime == Regime::kCoherent && chunk.tracked; });
  if (priced == result.chunks.end()) return;
  counters_.tracked[Regime::kCoherent].Add(1, priced->last_effective_bits,
                                           result.coherent_target_bits,
                                           target.log_price_trim[Regime::kCoherent]);
}

void EngineImpl::LearnPace(absl::Span<const ScheduledChunk> plan, int started) {
  int decodes = 0;
  int prompt_tokens = 0;
  for (const ScheduledChunk& chunk : plan) {
    decodes += chunk.decode ? 1 : 0;
    prompt_tokens += chunk.decode ? 0 : chunk.count;
  }
  pace_.Observe(decodes, prompt_tokens, counters_.last_step_seconds);
  StepLoad load;
  load.seconds = counters_.last_step_seconds;
  load.running = static_cast<int>(requests_.size()) - unstarted_;
  load.started = started;
  load.others_wait = unstarted_ > 0;
  load.full = scheduler_.full();
  MutexLock lock(mutex_);
  admission_.StepEnded(load, pace_.seconds_per_prompt_token());
}

void EngineImpl::Commit(const ChunkResult& result, const PrecisionTarget& target, TimePoint now) {
  Sequence& sequence = *result.chunk.sequence;
  Request& request = *sequence.request;
  scheduler_.Computed(result.chunk, result.kv_bits);
  request.effective_bits_sum += result.effective_bits_sum;
  request.effective_tokens += result.chunk.count;
  counters_.effective_bits_sum += result.effective_bits_sum;
  counters_.effective_tokens += static_cast<uint64_t>(result.chunk.count);
  const Phase phase = result.chunk.decode ? Phase::kDecode : Phase::kPrefill;
  LevelTokens& counted = counters_.tokens_by_level[static_cast<int>(phase)];
  for (int i = 0; i < kNumLevels; ++i) counted[i] += result.tokens_by_level[i];
  if (result.tracked && result.regime != Regime::kCoherent) {
    counters_.tracked[result.regime].Add(result.chunk.count, result.effective_bits_sum,
                                         target.target_bits, target.log_price_trim[result.regime]);
  }
  if (!result.chunk.decode) {
    counters_.prompt_tokens += static_cast<uint64_t>(result.chunk.count);
  }
  if (request.ended) return;
  if (!result.prompt_logprobs.empty()) {
    request.sink->OnPromptLogprobs(result.first_scored, result.prompt_logprobs);
    if (!result.prompt_top.empty()) {
      request.sink->OnPromptTopLogprobs(result.first_scored, result.prompt_top);
    }
  }
  if (result.sampled) {
    EmitToken(sequence, result, now);
  } else if (sequence.uncomputed() == 0) {
    EndCompletion(sequence, FinishReason::kLength, std::nullopt);  // only scored
  }
}

void EngineImpl::EmitToken(Sequence& sequence, const ChunkResult& result, TimePoint now) {
  Request& request = *sequence.request;
  const GenerationRequest& spec = request.spec;
  const int32_t token = result.token.token;
  if (token == kNonFiniteLogits) {
    EndRequest(request, FinishReason::kError,
               absl::DataLossError("the model gave logits that are not finite"));
    return;
  }
  const auto is = [token](const auto& ids) {
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  if (is(spec.stop_ids) || (!spec.ignore_eos && is(model_.eos_token_ids()))) {
    EndCompletion(sequence, FinishReason::kStop, token);
    return;
  }
  if (!request.first_token) request.first_token = now;
  request.last_token = now;
  ++request.usage.completion_tokens;
  ++counters_.generation_tokens;
  sequence.tokens.push_back(token);
  if (HasPenalties(spec.sampling)) ++sequence.generated_counts[token];
  TokenEvent event;
  event.index = sequence.index;
  event.token = token;
  event.logprob = result.token.logprob;
  event.top = spec.top_logprobs > 0 ? result.top : nullptr;
  event.effective_bits = result.last_effective_bits;
  if (!request.sink->OnToken(event)) {
    EndCompletion(sequence, FinishReason::kStop, std::nullopt);
  } else if (sequence.length() - request.prompt_length() >= spec.max_new_tokens ||
             sequence.length() >= max_model_len_) {
    EndCompletion(sequence, FinishReason::kLength, std::nullopt);
  }
}

void EngineImpl::EndCompletion(Sequence& sequence, FinishReason reason,
                               std::optional<int32_t> stop_id) {
  Request& request = *sequence.request;
  scheduler_.Remove(sequence);
  request.sink->OnCompletionEnd({sequence.index, reason, stop_id});
  const bool done = std::all_of(request.sequences.begin(), request.sequences.end(),
                                [](const Sequence& s) { return s.finished; });
  if (done) EndRequest(request, reason, absl::OkStatus());
}

void EngineImpl::EndRequest(Request& request, FinishReason reason, absl::Status status) {
  for (Sequence& sequence : request.sequences) {
    if (!sequence.finished) scheduler_.Remove(sequence);
  }
  request.ended = std::move(status);
  request.end_reason = reason;
}

// Tells the sinks and forgets. Apart from ending, so that a request never dies while a step's
// results are being handed out.
void EngineImpl::FinishEnded(TimePoint now) {
  std::vector<std::unique_ptr<Request>> ended;
  for (auto it = requests_.begin(); it != requests_.end();) {
    if (it->second->ended) {
      ended.push_back(std::move(it->second));
      requests_.erase(it++);
    } else {
      ++it;
    }
  }
  for (const auto& request : ended) {
    --needing_[request->needed_levels];
    if (!request->first_scheduled) {
      --unstarted_;
      MutexLock lock(mutex_);
      admission_.Leave(request->spec.priority, request->prompt_length());
    }
    if (request->first_scheduled) {
      MutexLock lock(mutex_);
      admission_.Finished(ToSeconds(now - *request->first_scheduled));
    }
    RequestEnd end;
    end.status = *request->ended;
    end.reason = request->end_reason;
    end.usage = request->usage;
    const TimePoint scheduled = request->first_scheduled.value_or(now);
    end.timings.queue = scheduled - request->arrival;
    end.timings.prefill = request->first_token.value_or(now) - scheduled;
    if (request->first_token) end.timings.decode = request->last_token - *request->first_token;
    if (request->effective_tokens > 0) {
      end.mean_effective_bits =
          request->effective_bits_sum / static_cast<double>(request->effective_tokens);
    }
    request->sink->OnDone(end);
  }
}

void EngineImpl::Fail(const absl::Status& status) {
  counters_.failed = true;
  {
    MutexLock lock(mutex_);
    failed_ = true;
  }
  DrainQueues();
  for (auto& [id, request] : requests_) {
    if (!request->ended) EndRequest(*request, FinishReason::kError, status);
  }
}

void EngineImpl::PublishStats() {
  const PrecisionTarget target = Target();
  counters_.running_requests = 0;
  for (const auto& [id, request] : requests_)
    counters_.running_requests += !!request->first_scheduled;
  counters_.num_kv_blocks = allocator_.num_blocks();
  counters_.free_kv_blocks = allocator_.num_free();
  residency_.FillStats(counters_);
  counters_.preemptions = scheduler_.preemptions();
  counters_.prefix_cache_queries = scheduler_.prefix_queries();
  counters_.prefix_cache_hits = scheduler_.prefix_hits();
  counters_.target_bits = target.target_bits;
  counters_.price = runner_.prices().Resolve({}, target, Regime::kDecode).price;
  MutexLock lock(mutex_);
  published_ = counters_;
}

// What the pool may grow to when slices leave.
int MostBlocks(const EngineOptions& options, const KvRoom& room, Model& model) {
  const SlicePlanes& planes = model.slice_planes();
  int num_blocks = room.num_blocks;
  if (!options.residency.enabled || !planes.can_drop().ok()) return num_blocks;
  for (int level = options.residency.min_levels + 1; level <= kNumLevels; ++level) {
    num_blocks += static_cast<int>(planes.plane_bytes(level) / room.block_bytes);
  }
  return num_blocks;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options, Model& model,
                                                       const WeightSource& source, Backend& backend,
                                                       const Clock& clock) {
  MOBI_ASSIGN_OR_RETURN(const KvRoom room,
                        CheckEngineOptions(options, model.config(), model.max_positions(),
                                           backend.activation_dtype()));
  MOBI_ASSIGN_OR_RETURN(
      KvCache kv, KvCache::Create(model.config(), room.num_blocks, options.block_size, backend,
                                  MostBlocks(options, room, model)));
  const auto token = source.price_table();
  // A checkpoint without a table for shared levels is priced by the other; the inner loop corrects.
  const auto coherent =
      source.coherent_price_table().empty() ? token : source.coherent_price_table();
  const Prices prices{PriceTable({token.begin(), token.end()}),
                      PriceTable({coherent.begin(), coherent.end()}),
                      std::max(1, source.coherent_batch())};
  MOBI_ASSIGN_OR_RETURN(StepRunner runner, StepRunner::Create(options, room.max_model_len, model,
                                                              prices, std::move(kv), backend));
  return std::make_unique<EngineImpl>(options, room.max_model_len, model, source, clock,
                                      std::move(runner));
}

}  // namespace mobi
