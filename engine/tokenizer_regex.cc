#include "engine/tokenizer_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "engine/tokenizer_utf8.h"

namespace mobi {
namespace {

constexpr size_t kMaxPatternBytes = 16 << 10;
// Backtracking steps of one match. The Llama-3 pattern takes about one a byte in long white space.
constexpr uint32_t kMatchLimit = 10'000'000;

// Unicode's White_Space. PCRE2's own \s has U+180E as well.
constexpr std::string_view kWhiteSpace =
    R"(\x{9}-\x{D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F})"
    R"(\x{3000})";
// Letters and numbers of Unicode 16, which the reference knows, that Unicode 14 (PCRE2 10.42)
// lacks.
constexpr std::string_view kLetters =
    R"(\p{L}\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3})"
    R"(\x{10D4A}-\x{10D65}\x{10D6F}-\x{10D85}\x{10EC2}-\x{10EC4}\x{1123F}-\x{11240})"
    R"(\x{11380}-\x{11389}\x{1138B}\x{1138E}\x{11390}-\x{113B5}\x{113B7}\x{113D1}\x{113D3})"
    R"(\x{11BC0}-\x{11BE0}\x{11F02}\x{11F04}-\x{11F10}\x{11F12}-\x{11F33}\x{1342F})"
    R"(\x{13441}-\x{13446}\x{13460}-\x{143FA}\x{16100}-\x{1611D}\x{16D40}-\x{16D6C})"
    R"(\x{18CFF}\x{1B132}\x{1B155}\x{1DF25}-\x{1DF2A}\x{1E030}-\x{1E06D}\x{1E4D0}-\x{1E4EB})"
    R"(\x{1E5D0}-\x{1E5ED}\x{1E5F0}\x{2B739}\x{2EBF0}-\x{2EE5D}\x{31350}-\x{323AF})";
constexpr std::string_view kNumbers =
    R"(\p{N}\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{11F50}-\x{11F59})"
    R"(\x{16130}-\x{16139}\x{16D70}-\x{16D79}\x{1CCF0}-\x{1CCF9}\x{1D2C0}-\x{1D2D3})"
    R"(\x{1E4F0}-\x{1E4F9}\x{1E5F1}-\x{1E5FA})";

class Translator {
 public:
  explicit Translator(std::string_view pattern) : rest_(pattern) {}

  absl::StatusOr<std::string> Run() {
    while (!rest_.empty()) {
      const char c = rest_[0];
      if (c == '\\') {
        MOBI_RETURN_IF_ERROR(Escape());
      } else if (c == '[') {
        MOBI_RETURN_IF_ERROR(OpenClass());
      } else if (in_class_) {
        MOBI_RETURN_IF_ERROR(InClass());
      } else if (c == '(') {
        MOBI_RETURN_IF_ERROR(Group());
      } else if (c == '{') {
        MOBI_RETURN_IF_ERROR(Repeat());
      } else if (c == '^' || c == '$') {
        return Refuse(1);
      } else {
        Copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  absl::Status Refuse(size_t length) const {
    return absl::InvalidArgumentError(absl::StrFormat(
        "\"%s\" is not supported in a regex",
        absl::CHexEscape(absl::string_view(rest_.data(), std::min(length, rest_.size())))));
  }

  void Copy(size_t length) {
    out_ += rest_.substr(0, length);
    rest_.remove_prefix(length);
    after_set_ = false;
  }

  // A set of characters, by itself or as a part of a class.
  void AddSet(std::string_view set, bool negated) {
    if (in_class_) {
      out_ += set;
    } else {
      out_ += absl::StrFormat("[%s%s]", negated ? "^" : "", set);
    }
    after_set_ = true;
  }

  absl::Status OpenClass() {
    if (in_class_) return Refuse(1);  // a class in a class in Oniguruma, a literal in PCRE2
    in_class_ = true;
    Copy(rest_.substr(0, 2) == "[^" ? 2 : 1);
    return absl::OkStatus();
  }

  absl::Status InClass() {
    const char next = rest_.size() > 1 ? rest_[1] : '\0';
    if (rest_[0] == ']') {
      in_class_ = false;
    } else if (rest_[0] == '&' && next == '&') {
      return Refuse(2);
    } else if (rest_[0] == '-' && after_set_) {
      out_ += '\\';  // a literal; what the set was written as must not become a range
    } else if (rest_[0] == '-' && next == '\\' && rest_.size() > 2 &&
               std::string_view("sSpPdDwWhH").find(rest_[2]) != std::string_view::npos) {
      return Refuse(3);
    }
    Copy(1);
    return absl::OkStatus();
  }

  absl::Status Group() {
    if (rest_.size() < 2 || rest_[1] != '?') {
      Copy(1);
      return absl::OkStatus();
    }
    for (const std::string_view opening : {"(?i:", "(?:", "(?=", "(?!", "(?<=", "(?<!"}) {
      if (rest_.substr(0, opening.size()) != opening) continue;
      Copy(opening.size());
      return absl::OkStatus();
    }
    return Refuse(3);
  }

  // {n}, {n,} and {n,m}; with a suffix the two engines part.
  absl::Status Repeat() {
    size_t at = 1;
    while (at < rest_.size() && std::isdigit(static_cast<unsigned char>(rest_[at]))) ++at;
    if (at == 1) return Refuse(2);
    if (at < rest_.size() && rest_[at] == ',') ++at;
    while (at < rest_.size() && std::isdigit(static_cast<unsigned char>(rest_[at]))) ++at;
    if (at == rest_.size() || rest_[at] != '}') return Refuse(at);
    const char suffix = at + 1 < rest_.size() ? rest_[at + 1] : '\0';
    if (suffix == '?' || suffix == '+' || suffix == '*') return Refuse(at + 2);
    Copy(at + 1);
    return absl::OkStatus();
  }

  absl::Status Escape() {
    const char c = rest_.size() > 1 ? rest_[1] : '\0';
    if (c == 'p' || c == 'P') return Property(c == 'P');
    if (c == 's' || c == 'S') {
      if (c == 'S' && in_class_) return Refuse(2);
      AddSet(kWhiteSpace, c == 'S');
      rest_.remove_prefix(2);
      return absl::OkStatus();
    }
    const bool plain = c == 'r' || c == 'n' || c == 't' || c == 'f' ||
                       (c > ' ' && c < 0x7F && std::ispunct(static_cast<unsigned char>(c)));
    if (!plain) return Refuse(2);
    Copy(2);
    return absl::OkStatus();
  }

  absl::Status Property(bool negated) {
    const size_t close = rest_.find('}');
    if (rest_.size() < 3 || rest_[2] != '{' || close == rest_.npos) return Refuse(2);
    const std::string_view name = rest_.substr(3, close - 3);
    for (const char c : name) {
      if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_') return Refuse(close + 1);
    }
    if (name != "L" && name != "N") {
      Copy(close + 1);
      after_set_ = true;
      return absl::OkStatus();
    }
    if (negated && in_class_) return Refuse(close + 1);
    AddSet(name == "L" ? kLetters : kNumbers, negated);
    rest_.remove_prefix(close + 1);
    return absl::OkStatus();
  }

  std::string_view rest_;
  std::string out_;
  bool in_class_ = false;
  bool after_set_ = false;  // the last thing written was a set of characters
};

std::string ErrorText(int code) {
  char text[128] = {};
  pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(text), sizeof(text));
  return text;
}

}  // namespace

absl::StatusOr<std::string> TranslateOniguruma(std::string_view pattern) {
  return Translator(pattern).Run();
}

void SplitRegex::FreeCode::operator()(pcre2_real_code_8* code) const { pcre2_code_free(code); }

void SplitRegex::FreeContext::operator()(pcre2_real_match_context_8* context) const {
  pcre2_match_context_free(context);
}

absl::StatusOr<SplitRegex> SplitRegex::Compile(std::string_view pattern) {
  if (pattern.empty()) return absl::InvalidArgumentError("an empty regex");
  if (pattern.size() > kMaxPatternBytes) {
    return absl::InvalidArgumentError(
        absl::StrFormat("a regex of %u bytes, the limit is %u", pattern.size(), kMaxPatternBytes));
  }
  MOBI_ASSIGN_OR_RETURN(const std::string translated, TranslateOniguruma(pattern));
  int error = 0;
  PCRE2_SIZE offset = 0;
  SplitRegex regex;
  regex.code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()),
                                  translated.size(), PCRE2_UTF | PCRE2_UCP, &error, &offset,
                                  nullptr));
  if (regex.code_ == nullptr) {
    return absl::InvalidArgumentError(absl::StrFormat("not a regex: %s", ErrorText(error)));
  }
  // Without a JIT the interpreter gives the same matches, only slower.
  pcre2_jit_compile(regex.code_.get(), PCRE2_JIT_COMPLETE);
  regex.limits_.reset(pcre2_match_context_create(nullptr));
  if (regex.limits_ == nullptr) return absl::ResourceExhaustedError("no memory for a regex");
  pcre2_set_match_limit(regex.limits_.get(), kMatchLimit);
  return regex;
}

absl::Status SplitRegex::Split(std::string_view text,
                               absl::FunctionRef<absl::Status(std::string_view)> visit) const {
  struct FreeMatch {
    void operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }
  };
  const std::unique_ptr<pcre2_match_data, FreeMatch> match(
      pcre2_match_data_create_from_pattern(code_.get(), nullptr));
  if (match == nullptr) return absl::ResourceExhaustedError("no memory for a regex match");
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(match.get());
  size_t done = 0;  // everything before it was visited
  for (size_t at = 0; at < text.size();) {
    const int result = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()),
                                   text.size(), at, PCRE2_NO_UTF_CHECK, match.get(), limits_.get());
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "the pre-tokenizer's regex gave up at byte %u: %s", at, ErrorText(result)));
    }
    const size_t begin = bounds[0];
    const size_t end = bounds[1];
    if (begin > done) MOBI_RETURN_IF_ERROR(visit(text.substr(done, begin - done)));
    if (end > begin) MOBI_RETURN_IF_ERROR(visit(text.substr(begin, end - begin)));
    done = end;
    // An empty match is a cut and nothing else; the search goes on behind the next character.
    at = end > begin ? end : end < text.size() ? end + NextUtf8(text.substr(end)).length : end;
  }
  return done < text.size() ? visit(text.substr(done)) : absl::OkStatus();
}

}  // namespace mobi
