// Text to token ids and back, as Hugging Face `tokenizers` does it from tokenizer.json: byte-level
// BPE (Llama 3) and SentencePiece-style BPE with byte fallback (Llama 2). First and last step of
// the generate walk. Immutable after Load, so every method may be called from any thread. What a
// file asks for and we do not have (another model, normalizer, pre-tokenizer, decoder) is refused
// by name.
#ifndef MOBI_ENGINE_TOKENIZER_H_
#define MOBI_ENGINE_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace mobi {

struct TokenizerPipeline;

struct EncodeOptions {
  // What the file's post-processor adds: BOS for the Llama families.
  bool add_special_tokens = true;
  // False: the text of a control token is plain text. Only for text that nobody else wrote.
  bool parse_special = false;
};

// A piece of a prompt that a template put together: one control token, or plain text in which
// nothing is read as a control token.
struct PromptPart {
  std::optional<int32_t> token;
  std::string text;
};

class Tokenizer {
 public:
  // `path` is a model folder or a tokenizer.json; tokenizer_config.json and chat_template.jinja are
  // read from beside it when they exist. NOT_FOUND, INVALID_ARGUMENT: one line with file and field.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& path);
  // From memory. `config_json` may be empty. `file` and `config_file` are for messages.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Parse(std::string_view tokenizer_json,
                                                          std::string_view file,
                                                          std::string_view config_json = {},
                                                          std::string_view config_file = {});
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // O(n log n). Bytes that are not UTF-8 count as U+FFFD, one per maximal ill-formed subsequence.
  // INVALID_ARGUMENT when the file's pre-tokenizer regex gives up on this text.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              const EncodeOptions& options = {}) const;
  // The parts as one text. Adds no special tokens of its own. INVALID_ARGUMENT also for a token
  // that is not in the vocabulary.
  absl::StatusOr<std::vector<int32_t>> EncodeParts(absl::Span<const PromptPart> parts) const;

  // Always valid UTF-8. Ids without a token give nothing.
  std::string Decode(absl::Span<const int32_t> ids, bool skip_special) const;

  // One more than the largest id; a model's embedding may have more rows.
  int vocab_size() const;
  // The token as the file spells it; empty for an id without a token.
  std::string_view Token(int32_t id) const;
  // What the token stands for, not always UTF-8 by itself; empty for an id without a token.
  std::string_view TokenBytes(int32_t id) const;
  bool IsSpecial(int32_t id) const;
  std::optional<int32_t> TokenId(std::string_view token) const;

  // From tokenizer_config.json, else from the post-processor; nullopt when neither names one.
  std::optional<int32_t> bos_id() const;
  // From tokenizer_config.json.
  std::optional<int32_t> eos_id() const;
  // The Jinja text, empty when the model has none.
  std::string_view chat_template() const;

 private:
  friend class Detokenizer;
  explicit Tokenizer(std::unique_ptr<const TokenizerPipeline> pipeline);

  std::unique_ptr<const TokenizerPipeline> pipeline_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_TOKENIZER_H_
