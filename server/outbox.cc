#include "server/outbox.h"

#include <utility>

namespace mobi {
namespace {

constexpr size_t kTokenBytes = 5;   // a varint id, and its share of the chunk's fields
constexpr size_t kChunkBytes = 16;  // index, bits, lengths

}  // namespace

v1::Chunk& Outbox::ChunkOf(int index) {
  empty_ = false;
  for (v1::Chunk& chunk : *pending_.mutable_chunks()) {  // at most n of them
    if (chunk.index() == index) return chunk;
  }
  v1::Chunk& chunk = *pending_.add_chunks();
  chunk.set_index(index);
  bytes_ += kChunkBytes;
  return chunk;
}

void Outbox::AddToken(int index, int32_t token, float effective_bits, const std::string& text) {
  v1::Chunk& chunk = ChunkOf(index);
  chunk.add_token_ids(token);
  const float mean = chunk.effective_bits();
  chunk.set_effective_bits(mean + (effective_bits - mean) / chunk.token_ids_size());
  chunk.mutable_text()->append(text);
  bytes_ += kTokenBytes + text.size();
}

void Outbox::AddLogprob(int index, v1::TokenLogprob logprob) {
  bytes_ += logprob.ByteSizeLong();
  *ChunkOf(index).add_logprobs() = std::move(logprob);
}

void Outbox::EndCompletion(int index, const std::string& text, v1::FinishReason reason,
                           const std::string* stop, const int32_t* stop_id) {
  v1::Chunk& chunk = ChunkOf(index);
  chunk.mutable_text()->append(text);
  chunk.set_finish_reason(reason);
  if (stop != nullptr) chunk.set_stop(*stop);
  if (stop_id != nullptr) chunk.set_stop_id(*stop_id);
  bytes_ += text.size();
}

void Outbox::SetSummary(v1::Summary summary) {
  empty_ = false;
  *pending_.mutable_summary() = std::move(summary);
}

void Outbox::TakeInto(v1::GenerateResponse& message) {
  message.Clear();
  message.Swap(&pending_);
  bytes_ = 0;
  empty_ = true;
}

void Outbox::Clear() {
  pending_.Clear();
  bytes_ = 0;
  empty_ = true;
}

}  // namespace mobi
