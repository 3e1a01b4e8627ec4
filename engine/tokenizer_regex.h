// The regex that a pre-tokenizer splits text with, through PCRE2. Hugging Face runs these patterns
// in Oniguruma; the pattern is translated so that it means the same here (white space, Unicode
// version), and what the two engines would read differently is refused by name. Immutable,
// thread-safe. A match that runs into PCRE2's limits is an error, never a hang.
#ifndef MOBI_ENGINE_TOKENIZER_REGEX_H_
#define MOBI_ENGINE_TOKENIZER_REGEX_H_

#include <memory>
#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

struct pcre2_real_code_8;
struct pcre2_real_match_context_8;

namespace mobi {

class SplitRegex {
 public:
  // INVALID_ARGUMENT: a construct that is not supported, or not a regex.
  static absl::StatusOr<SplitRegex> Compile(std::string_view pattern);

  // Calls `visit` for every match and for every stretch between matches, from left to right, none
  // of them empty; together they are `text`, which is valid UTF-8.
  absl::Status Split(std::string_view text,
                     absl::FunctionRef<absl::Status(std::string_view)> visit) const;

 private:
  struct FreeCode {
    void operator()(pcre2_real_code_8* code) const;
  };
  struct FreeContext {
    void operator()(pcre2_real_match_context_8* context) const;
  };
  SplitRegex() = default;

  std::unique_ptr<pcre2_real_code_8, FreeCode> code_;
  std::unique_ptr<pcre2_real_match_context_8, FreeContext> limits_;
};

// The same regex in PCRE2's terms.
absl::StatusOr<std::string> TranslateOniguruma(std::string_view pattern);

}  // namespace mobi

#endif  // MOBI_ENGINE_TOKENIZER_REGEX_H_
