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
  // Byte-level: the complete characters of pending_.
  void EmitCharacters(std::string& out);
  // Byte fallback: a run of tokens that are bytes.
  void AddToRun(std::string_view byte, std::string& out);
  void EndRun(std::string& out);
  void EmitBroken(std::string& out);
  void Emit(std::string_view text, std::string& out);

  const TokenizerPipeline& pipeline_;
  const bool skip_special_;
  int strip_left_;           // characters that the decoder would still take away at the start
  std::string pending_;      // bytes whose text is not certain yet
  size_t run_checked_ = 0;   // of a run: bytes of pending_ that are whole characters
  bool run_broken_ = false;  // the run is known not to be UTF-8
};

}  // namespace mobi

#endif  // MOBI_ENGINE_DETOKENIZER_H_
