// What a call has for its client but has not written yet, merged into one message: a slow reader
// gets fewer, longer chunks instead of a queue. Not thread-safe; the call guards it.
#ifndef MOBI_SERVER_OUTBOX_H_
#define MOBI_SERVER_OUTBOX_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "mobi/v1/inference.pb.h"

namespace mobi {

class Outbox {
 public:
  void SetPrompt(v1::Prompt prompt) { *pending_.mutable_prompt() = std::move(prompt); }
  // `text` may be empty: it lags behind tokens.
  void AddToken(int index, int32_t token, float effective_bits, const std::string& text);
  void AddLogprob(int index, v1::TokenLogprob logprob);
  // The completion's last chunk. At most one of `stop` and `stop_id` is given (null otherwise).
  void EndCompletion(int index, const std::string& text, v1::FinishReason reason,
                     const std::string* stop, const int32_t* stop_id);
  void SetSummary(v1::Summary summary);

  bool empty() const { return empty_ && !pending_.has_prompt(); }
  // About what the chunks take on the wire; the prompt and the summary, which come once, are not
  // counted.
  size_t bytes() const { return bytes_; }
  // Moves everything into `message`, whose memory is reused.
  void TakeInto(v1::GenerateResponse& message);
  void Clear();

 private:
  v1::Chunk& ChunkOf(int index);

  v1::GenerateResponse pending_;
  size_t bytes_ = 0;
  bool empty_ = true;
};

}  // namespace mobi

#endif  // MOBI_SERVER_OUTBOX_H_
