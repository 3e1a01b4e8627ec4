// What happens to text before the BPE model sees it: normalizer, then pre-tokenizer, each a list of
// steps as tokenizer.json names them. Between the added tokens (tokenizer_added.h) and the model
// (tokenizer_bpe.h). Immutable, thread-safe. Text is valid UTF-8 on the way in and out.
#ifndef MOBI_ENGINE_TOKENIZER_STEPS_H_
#define MOBI_ENGINE_TOKENIZER_STEPS_H_

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "engine/tokenizer_regex.h"

namespace mobi {

// Puts `text` before what is not empty.
struct Prepend {
  std::string text;
};
struct Replace {
  std::string pattern;  // not empty
  std::string content;
};
using NormalizerStep = std::variant<Prepend, Replace>;

// ByteLevel's add_prefix_space: " " before a piece that does not start with one.
struct PrefixSpace {};
// Every byte becomes the character that byte-level vocabularies spell it with.
struct ByteLevel {};
// " " becomes `replacement`.
struct Metaspace {
  enum class Prepend { kAlways, kFirst, kNever };
  std::string replacement;
  Prepend prepend = Prepend::kAlways;  // a replacement before the piece if it has none
  bool split = true;                   // before every replacement
};
using PreTokenizerStep = std::variant<PrefixSpace, SplitRegex, ByteLevel, Metaspace>;

std::string Normalize(const std::vector<NormalizerStep>& steps, std::string_view text);

// `at_start`: the piece is where the whole text begins. Visits the pieces for the model.
absl::Status PreTokenize(const std::vector<PreTokenizerStep>& steps, std::string_view text,
                         bool at_start, absl::FunctionRef<absl::Status(std::string_view)> visit);

// The regex of a ByteLevel pre-tokenizer with use_regex.
std::string_view ByteLevelPattern();
// The bytes that a byte-level token spells; the token itself if it has other characters.
std::string ByteLevelBytes(std::string_view token);

}  // namespace mobi

#endif  // MOBI_ENGINE_TOKENIZER_STEPS_H_
