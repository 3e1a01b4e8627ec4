#include "engine/step_buffers.h"

#include <numeric>
#include <utility>

#include "engine/base/status_macros.h"

namespace mobi {
namespace {
constexpr size_t kAlignment = 256;
}

// Called twice for every array: once to measure, once with memory to hand out addresses.
template <typename T>
void StepBuffers::Place(StepArray<T>& array, size_t count) {
  if (device_.data() != nullptr) {
    array.host = reinterpret_cast<T*>(host_.data() + used_);
    array.device = reinterpret_cast<T*>(device_.As<std::byte>() + used_);
  }
  used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
}

absl::StatusOr<StepBuffers> StepBuffers::Create(const StepLimits& limits, Backend& backend) {
  StepBuffers b;
  b.block_table_stride = limits.max_blocks_per_seq;
  b.max_edits = limits.max_seqs * limits.max_edits_per_seq;
  const auto tokens = static_cast<size_t>(limits.max_tokens);
  const auto seqs = static_cast<size_t>(limits.max_seqs);
  const auto layout = [&] {
    b.used_ = 0;
    b.Place(b.token_ids, tokens);
    b.Place(b.positions, tokens);
    b.Place(b.slots, tokens);
    b.Place(b.price, tokens);
    b.Place(b.min_level, tokens);
    b.Place(b.max_level, tokens);
    b.Place(b.query_start, seqs + 1);
    b.Place(b.context_len, seqs);
    b.Place(b.logits_rows, seqs);
    b.Place(b.sampling, seqs);
    b.Place(b.logits_levels, seqs);
    b.block_table_offset_ = b.used_;
    b.Place(b.block_table, seqs * b.block_table_stride);
    b.Place(b.edits, static_cast<size_t>(b.max_edits));
    b.Place(b.row_ids, seqs);
    b.Place(b.score_rows, seqs);
    b.Place(b.score_ids, seqs);
    b.Place(b.score_levels, seqs);
    b.Place(b.level_tiles, tokens);
    b.Place(b.loaded_bytes, 1);
    b.Place(b.sampled, seqs);
    b.Place(b.top, seqs);
    b.Place(b.scores, seqs);
    b.Place(b.score_top, seqs);
  };
  layout();
  b.host_.resize(b.used_);
  MOBI_ASSIGN_OR_RETURN(b.device_, backend.Allocate(b.used_, "step inputs"));
  layout();
  std::iota(b.row_ids.host, b.row_ids.host + seqs, 0);
  backend.Upload(b.row_ids.host, seqs * sizeof(int32_t), b.row_ids.device);
  return b;
}

void StepBuffers::Upload(int num_seqs, int num_edits, Backend& backend) {
  const size_t table_bytes = sizeof(int32_t) * num_seqs * block_table_stride;
  backend.Upload(host_.data(), block_table_offset_ + table_bytes, device_.data());
  if (num_edits > 0) backend.Upload(edits.host, sizeof(LogitEdit) * num_edits, edits.device);
}

}  // namespace mobi
