// What the engine knows of one request while it lives, and of each of its completions. Plain data
// of the engine's thread: the scheduler moves it through its states, the engine fills it.
#ifndef MOBI_ENGINE_SEQUENCE_H_
#define MOBI_ENGINE_SEQUENCE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/engine.h"

namespace mobi {

struct Request;

// One completion: prompt and generated tokens, and the KV blocks of those computed so far.
struct Sequence {
  Request* request = nullptr;
  int index = 0;
  std::vector<int32_t> tokens;  // prompt, then generated
  int num_computed = 0;         // tokens whose KV is in `blocks`
  std::vector<int32_t> blocks;
  // How far full blocks are known to the prefix cache.
  uint64_t chain = 0;
  int chained_blocks = 0;
  float kv_bits = 8.0f;  // fewest bits that any of its KV was computed at
  bool finished = false;
  bool preempted = false;  // has run before and waits to be computed again
  int aged_priority = 0;   // the request's priority, raised by its wait until it last started
  // Occurrences in the completion, kept only for requests that have penalties.
  absl::flat_hash_map<int32_t, int> generated_counts;

  int length() const { return static_cast<int>(tokens.size()); }
  int uncomputed() const { return length() - num_computed; }
};

struct Request {
  RequestId id = 0;
  GenerationRequest spec;
  TokenSink* sink = nullptr;
  int needed_levels = 1;            // that must be in memory for it to run, see NeededLevels
  std::vector<Sequence> sequences;  // spec.n of them
  TimePoint arrival;
  std::optional<TimePoint> first_scheduled;
  std::optional<TimePoint> first_token;
  TimePoint last_token;
  Usage usage;
  double effective_bits_sum = 0;
  int64_t effective_tokens = 0;
  // Set when the request is to end before its completions have.
  std::optional<absl::Status> ended;
  FinishReason end_reason = FinishReason::kStop;

  int prompt_length() const { return static_cast<int>(spec.prompt.size()); }
};

}  // namespace mobi

#endif  // MOBI_ENGINE_SEQUENCE_H_
