// Runs one step of the walk: from the scheduler's plan to sampled tokens. Lays the plan out in the
// step buffers, uploads, runs model and sampler on the backend, and reads the results back. Belongs
// to the engine's thread.
#ifndef MOBI_ENGINE_STEP_RUNNER_H_
#define MOBI_ENGINE_STEP_RUNNER_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/engine.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "engine/precision.h"
#include "engine/scheduler.h"
#include "engine/step_buffers.h"

namespace mobi {

// What one chunk of the plan gave.
struct ChunkResult {
  ScheduledChunk chunk;
  float kv_bits = 8;              // bits that the chunk's tokens were asked to be computed at
  double effective_bits_sum = 0;  // over the chunk's tokens
  LevelTokens tokens_by_level{};
  float last_effective_bits = 0;  // of the chunk's last token
  bool tracked = false;           // the request's band holds the step's target: the price decided
  Regime regime = Regime::kPrompt;
  bool sampled = false;  // the chunk reached the end of the sequence
  Sampled token{};
  const TopLogprobs* top = nullptr;  // valid until the next step
  // log p of the chunk's prompt tokens given what precedes, from token `first_scored` on.
  int first_scored = 0;
  std::vector<float> prompt_logprobs;
  std::vector<TopLogprobs> prompt_top;
};

struct StepResult {
  std::vector<ChunkResult> chunks;  // in the order of the plan
  double loaded_bits = 0;           // bits per routed weight that the step moved
  float coherent_target_bits = 0;   // that the coherent chunks were asked to share
  int lm_head_level = 0;  // the highest at which logits to sample were read; 0: not in slices
};

class StepRunner {
 public:
  static absl::StatusOr<StepRunner> Create(const EngineOptions& options, int max_model_len,
                                           const Model& model, const Prices& prices, KvCache kv,
                                           Backend& backend);

  // No token reads a level above max_level; the target is none of more bits. INTERNAL: the device
  // has failed.
  absl::StatusOr<StepResult> Run(absl::Span<const ScheduledChunk> plan,
                                 const PrecisionTarget& target, int max_level = kNumLevels);

  const Prices& prices() const { return prices_; }
  KvCache& kv() { return kv_; }

 private:
  // One row of normalised hidden states whose logits score a prompt token.
  struct ScoredRow {
    int32_t row;
    int32_t target;
    int result;
  };
  struct Layout {
    StepKey key;
    int max_level = kNumLevels;
    int num_sampled = 0;
    int num_edits = 0;
    int max_query_len = 1;
    int top_logprobs = 0;
    int score_top = 0;
    std::vector<int> sampled_results;  // index into the result's chunks
    std::vector<int> first_row;        // of each chunk
    std::vector<ScoredRow> scored;
  };

  StepRunner(const Model& model, const Prices& prices, KvCache kv, Backend& backend)
      : model_(model), prices_(prices), kv_(std::move(kv)), backend_(backend) {}

  Layout LayOut(absl::Span<const ScheduledChunk> plan, const PrecisionTarget& target, int max_level,
                StepResult& result);
  void AddChunk(int index, const PrecisionTarget& target, ChunkResult& result, Layout& layout);
  void AddSampling(const Sequence& sequence, int row, int index, Layout& layout);
  void Pad(Layout& layout);
  void LayOutLogitsLevels(const Layout& layout, StepResult& result);
  // levels [count] of the rows of logits of the tokens `rows`.
  void ChooseLogitsLevels(const int32_t* rows, int count, int num_coherent, uint8_t* levels) const;
  StepTensors Tensors(const Layout& layout) const;
  void Enqueue(const Layout& layout);
  // What the step's routers have counted, or would have, to host memory.
  void CollectCounts(const Layout& layout);
  absl::Status Score(const Layout& layout, StepResult& result);
  void Collect(const Layout& layout, StepResult& result);

  const Model& model_;
  Prices prices_;
  KvCache kv_;
  Backend& backend_;
  EngineOptions options_;
  StepBuffers buffers_;
  Activations act_;
  Tensor gathered_;  // [max_num_seqs, hidden_size]
  Tensor logits_;    // [max_num_seqs, vocab_size] fp32, rows Model::logits_stride() apart
  std::vector<Buffer> memory_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_STEP_RUNNER_H_
