// The arrays that one step reads and writes: host copies to fill, device copies at addresses that
// never change (a captured step replays with them), one upload for all. Belongs to the engine's
// thread.
#ifndef MOBI_ENGINE_STEP_BUFFERS_H_
#define MOBI_ENGINE_STEP_BUFFERS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace mobi {

struct StepLimits {
  int max_tokens = 0;
  int max_seqs = 0;
  int max_blocks_per_seq = 0;
  int max_edits_per_seq = 0;
};

template <typename T>
struct StepArray {
  T* host = nullptr;
  T* device = nullptr;
};

class StepBuffers {
 public:
  static absl::StatusOr<StepBuffers> Create(const StepLimits& limits, Backend& backend);

  // Sends inputs to the device: every per-token and per-sequence array, the block table's first
  // `num_seqs` rows, and the first `num_edits` edits.
  void Upload(int num_seqs, int num_edits, Backend& backend);

  // Inputs, per token.
  StepArray<int32_t> token_ids, positions, slots;
  StepArray<float> price;
  StepArray<uint8_t> min_level, max_level;
  // Inputs, per sequence.
  StepArray<int32_t> query_start, context_len, logits_rows;
  StepArray<SamplingRow> sampling;
  StepArray<uint8_t> logits_levels;  // of a sliced lm_head
  StepArray<int32_t> block_table;    // [max_seqs, block_table_stride]
  StepArray<LogitEdit> edits;
  int block_table_stride = 0;
  int max_edits = 0;
  StepArray<int32_t> row_ids;  // 0, 1, ...: every row of the logits
  // Scoring, in pieces of max_seqs rows.
  StepArray<int32_t> score_rows, score_ids;
  StepArray<uint8_t> score_levels;
  // Outputs.
  StepArray<uint32_t> level_tiles;   // [max_tokens]
  StepArray<uint64_t> loaded_bytes;  // [1]
  StepArray<Sampled> sampled;        // [max_seqs]
  StepArray<TopLogprobs> top;        // [max_seqs]
  StepArray<float> scores;           // [max_seqs]
  StepArray<TopLogprobs> score_top;  // [max_seqs]

 private:
  template <typename T>
  void Place(StepArray<T>& array, size_t count);

  size_t used_ = 0;  // bytes placed so far, while laying out
  size_t block_table_offset_ = 0;
  std::vector<std::byte> host_;
  Buffer device_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_STEP_BUFFERS_H_
