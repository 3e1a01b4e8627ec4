// UTF-8 as Rust's from_utf8_lossy and Python's errors="replace" read it: one U+FFFD for each
// maximal subpart of an ill-formed sequence (Unicode 3.9, table 3-8). And the two character classes
// that Hugging Face's added tokens look at. Pure functions, safe from any thread.
#ifndef MOBI_ENGINE_TOKENIZER_UTF8_H_
#define MOBI_ENGINE_TOKENIZER_UTF8_H_

#include <string>
#include <string_view>

namespace mobi {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

struct Utf8Step {
  enum Kind {
    kCharacter,
    kIllFormed,   // `length` bytes that no continuation can make a character
    kIncomplete,  // the whole text is the start of a character
  };
  Kind kind;
  char32_t code_point;  // of kCharacter
  size_t length;
};

// The first character of `text`, which is not empty.
Utf8Step NextUtf8(std::string_view text);

void AppendUtf8(char32_t code_point, std::string& out);
bool IsValidUtf8(std::string_view text);
std::string ReplaceIllFormedUtf8(std::string_view text);

// Unicode's White_Space property.
bool IsWhiteSpace(char32_t code_point);
// What \w is in Rust's regex: letters, marks, decimal and letter numbers, connectors, joiners.
bool IsWordCharacter(char32_t code_point);

}  // namespace mobi

#endif  // MOBI_ENGINE_TOKENIZER_UTF8_H_
