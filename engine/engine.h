// The engine as the server sees it: requests in, tokens out, a precision target, a stats snapshot.
// One thread of the engine's own runs the walk: drain submits and cancels, read the precision
// target, schedule, one forward pass, sample, hand tokens to sinks. Every public method is
// thread-safe and returns without waiting for that thread, except where it says otherwise.
#ifndef MOBI_ENGINE_ENGINE_H_
#define MOBI_ENGINE_ENGINE_H_

#include <array>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/base/clock.h"
#include "engine/residency_policy.h"
#include "kernels/backend.h"

namespace mobi {

class Model;
class WeightSource;
struct ModelConfig;

using RequestId = uint64_t;

struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy
  float top_p = 1.0f;
  int top_k = 0;  // 0: off
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;  // over prompt and completion
  float presence_penalty = 0.0f;    // over the completion
  float frequency_penalty = 0.0f;   // over the completion
  uint64_t seed = 0;                // the caller draws one when the user gave none
  std::vector<std::pair<int32_t, float>> logit_bias;  // at most kMaxLogitBias, ids distinct
};

inline constexpr int kMaxLogitBias = 300;

// What precision a request accepts, in average bits. The engine's target is clamped into
// [min_bits, max_bits]; equal bounds pin it, and then neither load nor company changes a bit of it.
struct PrecisionBand {
  float min_bits = 2.0f;
  float max_bits = 8.0f;
  int level = 0;  // 1..4: read exactly this level everywhere, whatever the bits say; 0: routed
  bool pinned() const { return level != 0 || min_bits == max_bits; }
};

struct GenerationRequest {
  std::vector<int32_t> prompt;  // not empty, ids below vocab_size
  int max_new_tokens = 16;      // 0: only the prompt is read (scoring)
  int n = 1;                    // completions that share the prompt
  SamplingParams sampling;
  PrecisionBand precision;
  std::vector<int32_t> stop_ids;  // end a completion and are not part of it
  bool ignore_eos = false;
  int top_logprobs = 0;  // per completion token, 0..kMaxTopLogprobs
  bool prompt_logprobs = false;
  // Reads the prompt one token a step, routed as a decode is: scores text as decoding would.
  bool prompt_as_decodes = false;
  int prompt_top_logprobs = 0;  // per prompt token, with prompt_logprobs
  int priority = 0;             // higher goes first
  TimePoint deadline = TimePoint::max();
  std::string tenant;
  std::string cache_salt;
};

struct TokenEvent {
  int index = 0;  // completion, 0..n-1
  int32_t token = 0;
  float logprob = 0;
  const TopLogprobs* top = nullptr;  // top_logprobs entries, valid during the call
  float effective_bits = 0;          // average bits per weight that this token's step used for it
};

enum class FinishReason { kStop, kLength, kCancelled, kDeadline, kError };

struct Usage {
  int prompt_tokens = 0;
  int cached_tokens = 0;
  int completion_tokens = 0;  // over all n
};

struct Timings {
  Duration queue{};    // submit to first scheduled
  Duration prefill{};  // first scheduled to first token
  Duration decode{};   // first token to last
};

// Sent once per completion (kStop, kLength); a request's end is OnDone.
struct CompletionEnd {
  int index = 0;
  FinishReason reason = FinishReason::kStop;
  std::optional<int32_t> stop_id;
};

struct RequestEnd {
  absl::Status status;  // OK unless the request was ended before its completions were
  FinishReason reason = FinishReason::kStop;
  Usage usage;
  Timings timings;
  double mean_effective_bits = 0;  // over prompt and completion tokens computed for the request
};

// Receives one request's results on the engine's thread, in order; never blocks it. Must outlive
// OnDone, which is called exactly once, last.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  // log p(prompt[i] | prompt[..i-1]) for i = first, first + 1, ...; first >= 1.
  virtual void OnPromptLogprobs(int first, absl::Span<const float> logprobs) {
    (void)first, (void)logprobs;
  }
  // The most likely tokens there, prompt_top_logprobs entries each.
  virtual void OnPromptTopLogprobs(int first, absl::Span<const TopLogprobs> top) {
    (void)first, (void)top;
  }
  // False ends this completion here as kStop (a stop string matched); the token counts.
  virtual bool OnToken(const TokenEvent& event) = 0;
  virtual void OnCompletionEnd(const CompletionEnd& end) { (void)end; }
  virtual void OnDone(const RequestEnd& end) = 0;
};

// Work that needs prices of its own for the same bits: prompt tokens and decodes, which choose for
// themselves (people write otherwise than the model does), and decodes that share levels.
enum class Regime { kPrompt, kDecode, kCoherent };
inline constexpr Regime kRegimes[] = {Regime::kPrompt, Regime::kDecode, Regime::kCoherent};

template <typename T>
struct PerRegime {
  T values[std::size(kRegimes)] = {};
  T& operator[](Regime regime) { return values[static_cast<size_t>(regime)]; }
  const T& operator[](Regime regime) const { return values[static_cast<size_t>(regime)]; }
};

// What the controller asks of the data plane.
struct PrecisionTarget {
  float target_bits = 8.0f;
  // Corrections of the inner loop, added to log(price) at the target.
  PerRegime<float> log_price_trim = {};
  // The least that load may bring the target to: slices that this needs stay in memory.
  float floor_bits = 2.0f;
};

// Sums over `count` measurements of the bits that they used, and of the target and the trim that
// their steps used: both change between steps, and only the engine knows which step used which.
struct BitsCounters {
  double bits_sum = 0;
  double target_sum = 0;
  double trim_sum = 0;
  uint64_t count = 0;

  void Add(double weight, double bits, double target, double trim) {
    bits_sum += bits;
    target_sum += weight * target;
    trim_sum += weight * trim;
    count += static_cast<uint64_t>(weight);
  }
};

struct EngineOptions {
  int block_size = 16;
  int max_num_seqs = 64;               // sequences in one step
  int max_num_batched_tokens = 512;    // tokens in one step
  int max_model_len = 0;               // 0: the model's max_position_embeddings
  int num_kv_blocks = 0;               // 0: from kv_memory_bytes
  size_t kv_memory_bytes = 256 << 20;  // device memory given to KV blocks
  int max_waiting_requests = 256;
  int max_waiting_tokens = 1 << 18;  // prompt tokens in the queue
  // Requests that would wait longer, by the pace of those before them, are refused at once; those
  // that did wait max_queue_wait are ended.
  Duration max_expected_wait = std::chrono::seconds(2);
  Duration max_queue_wait = std::chrono::seconds(10);
  // A step takes at most so many times what its decodes alone would: prompts are cut to fit. Lower
  // is smoother for streams, higher reads prompts sooner; 1 or less: no limit.
  float max_decode_slowdown = 1.75f;
  // Decode tokens of a step share levels (memory-bound machines); off: every token for itself.
  bool coherent_decode = false;
  // A prompt reads one level everywhere, the lowest with the bits asked for (WholeLevel): where
  // arithmetic bounds prompts, several levels in one step cost more time than they save.
  bool whole_level_prompts = false;
  // The same of decodes: where a router costs more time than the bits between two levels save. A
  // step whose tokens all do routes nothing.
  bool whole_level_decodes = false;
  // Slices lend their memory to KV blocks while those are short.
  ResidencyOptions residency;
};

// Tokens by the level nearest to the bits that each used on average; a float model's are all at the
// highest.
using LevelTokens = std::array<uint64_t, kNumLevels>;
enum class Phase { kPrefill, kDecode };
using PhaseTokens = std::array<LevelTokens, 2>;

// Counters only grow; gauges are of the last step. Sums are over tokens computed (prompt and
// completion), so an average over any window is a difference of two snapshots.
struct EngineStats {
  int waiting_requests = 0;
  int64_t waiting_tokens = 0;
  double expected_wait_seconds = 0;  // of a request that came now, until it would start
  int running_requests = 0;
  int num_kv_blocks = 0;
  int free_kv_blocks = 0;
  uint64_t steps = 0;
  uint64_t prompt_tokens = 0;
  uint64_t generation_tokens = 0;
  uint64_t preemptions = 0;
  uint64_t prefix_cache_queries = 0;  // tokens looked up
  uint64_t prefix_cache_hits = 0;     // tokens found
  double effective_bits_sum = 0;      // over tokens; divide by effective_tokens
  uint64_t effective_tokens = 0;
  PhaseTokens tokens_by_level{};  // the same tokens
  // What the price alone decided, and so what the controller may correct: over tokens of requests
  // whose band holds the target, and over steps of the bits that a coherent step's decodes shared.
  // The target of these is the largest of theirs: a request with a floor above the engine's lifts
  // those that it shares with.
  PerRegime<BitsCounters> tracked = {};
  // Levels that are in memory, and what they take; blocks that the others' memory is lent as.
  int resident_levels = kNumLevels;
  size_t resident_slice_bytes = 0;
  int lent_kv_blocks = 0;
  uint64_t slice_drops = 0;
  uint64_t slice_restores = 0;
  double slice_change_seconds_sum = 0;  // from decision to effect
  double last_slice_change_seconds = 0;
  double loaded_bits_sum = 0;  // over steps: bits of weights moved, per weight; divide by steps
  double decode_loaded_bits_sum = 0;  // the same over steps without prompts
  uint64_t decode_steps = 0;
  double step_seconds_sum = 0;
  double last_step_seconds = 0;
  float target_bits = 8.0f;
  float price = 0;      // at the target, trim included
  bool failed = false;  // the backend reported a fault; no step runs any more
};

// What an engine of a model with this configuration has room for.
struct KvRoom {
  int max_model_len = 0;
  int num_blocks = 0;
  size_t block_bytes = 0;
};

// Needs no weights, so that a server can refuse before it moves them. `max_positions` is the
// model's; INVALID_ARGUMENT or RESOURCE_EXHAUSTED as Create.
absl::StatusOr<KvRoom> CheckEngineOptions(const EngineOptions& options, const ModelConfig& config,
                                          int max_positions, DType activation_dtype);

class Engine {
 public:
  // Allocates everything that serving needs: RESOURCE_EXHAUSTED says what does not fit.
  // `model`, `backend` and `clock` outlive the engine and belong to its thread from now on.
  // `source` is the model's; its price table is read now, and with residency its slices may be read
  // as long as the engine lives. Where slices cannot leave memory residency is off.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options, Model& model,
                                                        const WeightSource& source,
                                                        Backend& backend, const Clock& clock);
  // Ends what still runs as kCancelled with UNAVAILABLE, then joins the thread.
  virtual ~Engine() = default;

  // INVALID_ARGUMENT: the request can never run (too long, ids out of range).
  // RESOURCE_EXHAUSTED: the queue is full or would take too long. DEADLINE_EXCEEDED: the deadline
  // leaves no time for queue and prompt. UNAVAILABLE: the engine has failed or is stopping.
  // On an error the sink is never called.
  virtual absl::StatusOr<RequestId> Submit(GenerationRequest request, TokenSink* sink) = 0;
  // Takes effect before the next step; unknown ids are ignored. The sink hears OnDone.
  virtual void Cancel(RequestId id) = 0;
  virtual void SetPrecision(const PrecisionTarget& target) = 0;
  virtual EngineStats stats() const = 0;
  virtual int max_model_len() const = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_ENGINE_H_
