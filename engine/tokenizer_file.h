// tokenizer.json and tokenizer_config.json, read and checked, as what the tokenizer runs on. The
// files are hostile until proven otherwise: every field has its check, every error names file,
// field and reason, and whatever Hugging Face would do that we do not is refused by name.
#ifndef MOBI_ENGINE_TOKENIZER_FILE_H_
#define MOBI_ENGINE_TOKENIZER_FILE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/json.h"
#include "engine/tokenizer_added.h"
#include "engine/tokenizer_bpe.h"
#include "engine/tokenizer_steps.h"

namespace mobi {

// Limits of the files. The largest vocabularies in use take 35 MB.
inline constexpr JsonLimits kTokenizerJsonLimits = {.max_bytes = 64 << 20, .max_depth = 16};
inline constexpr JsonLimits kTokenizerConfigLimits = {.max_bytes = 16 << 20, .max_depth = 32};

// How tokens become text again.
struct Decoder {
  // Bytes of all tokens joined, ill-formed UTF-8 replaced at the end (ByteLevel). Otherwise tokens
  // are texts and only a run of byte tokens can be ill-formed (ByteFallback).
  bool byte_level = false;
  std::vector<Replace> replace;  // in every token
  bool byte_fallback = false;
  char strip = ' ';  // taken away at the start of the text, at most strip_left times
  int strip_left = 0;
};

struct TokenizerPipeline {
  struct Token {
    std::string text;   // as the file spells it
    std::string bytes;  // as the decoder spells it
    bool special = false;
    bool byte_token = false;  // one byte of a run that ByteFallback joins
  };

  std::vector<Token> tokens;  // by id, without holes
  absl::flat_hash_map<std::string, int32_t> added_ids;
  AddedTokenMatcher raw_matcher;
  AddedTokenMatcher normalized_matcher;
  std::vector<NormalizerStep> normalizer;
  std::vector<PreTokenizerStep> pre_tokenizer;
  std::unique_ptr<const BpeModel> model;
  std::vector<int32_t> prefix;  // what the post-processor puts before the text
  std::vector<int32_t> suffix;
  Decoder decoder;
  std::optional<int32_t> bos_id;
  std::optional<int32_t> eos_id;
  std::string chat_template;
};

// `config_json` may be empty: there is none.
absl::StatusOr<std::unique_ptr<TokenizerPipeline>> ParseTokenizer(std::string_view tokenizer_json,
                                                                  std::string_view file,
                                                                  std::string_view config_json,
                                                                  std::string_view config_file);

// Parts of the above; `root` is the whole of tokenizer.json.
absl::StatusOr<std::vector<NormalizerStep>> ParseNormalizer(const JsonObject& root);
absl::StatusOr<std::vector<PreTokenizerStep>> ParsePreTokenizer(const JsonObject& root);
absl::StatusOr<Decoder> ParseDecoder(const JsonObject& root);
// Fills prefix and suffix; `tokens` must be known.
absl::Status ParsePostProcessor(const JsonObject& root, TokenizerPipeline& pipeline);

}  // namespace mobi

#endif  // MOBI_ENGINE_TOKENIZER_FILE_H_
