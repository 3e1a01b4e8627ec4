// Token ids of one completion to text, as they come: gives only text that no later token can
// change, never part of a UTF-8 sequence. Everything pushed and then flushed equals
// Tokenizer::Decode of the whole, replacement characters included. One thread at a time.
#ifndef MOBI_ENGINE_DETOKENIZER_H_
#define MOBI_ENGINE_DETOKENIZER_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "engine/tokenizer.h"

namespace mobi {

struct DetokenizerOptions {
  bool skip_special = true;
  // The text goes on from a prompt, so a Llama-2 style decoder keeps the first token's space.
  bool continuation = false;
};

class Detokenizer {
 public:
  // `tokenizer` outlives this.
  explicit Detokenizer(const Tokenizer& tokenizer, const DetokenizerOptions& options = {});

  // The text that this token made certain; often empty in the middle of a character.
  std::string Push(int32_t id);
  // What was held back. Call once, last.
  std::string Flush();

 private:
  void EndByteRun(std::string& out);
  void Emit(std::string_view text, std::string& out);

  const TokenizerPipeline& pipeline_;
  const bool skip_special_;
  int strip_left_;           // leading spaces that the decoder would still take away
  bool run_broken_ = false;  // the current run of byte tokens is known not to be UTF-8
  std::string pending_;      // bytes whose text is not certain yet
};

}  // namespace mobi

#endif  // MOBI_ENGINE_DETOKENIZER_H_
