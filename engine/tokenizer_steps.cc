#include "engine/tokenizer_steps.h"

#include <array>
#include <cstdint>

#include "absl/types/span.h"
#include "engine/base/status_macros.h"
#include "engine/tokenizer_utf8.h"

namespace mobi {
namespace {

std::string ReplaceAll(std::string_view text, const Replace& replace) {
  std::string out;
  out.reserve(text.size());
  for (size_t found; (found = text.find(replace.pattern)) != text.npos;) {
    out += text.substr(0, found);
    out += replace.content;
    text.remove_prefix(found + replace.pattern.size());
  }
  out += text;
  return out;
}

// Printable Latin-1 stands for itself, the other bytes for U+0100 onwards (GPT-2's table).
constexpr std::array<char32_t, 256> kByteLevelCharacters = [] {
  std::array<char32_t, 256> characters{};
  char32_t other = 0x100;
  for (size_t b = 0; b < characters.size(); ++b) {
    const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    characters[b] = printable ? static_cast<char32_t>(b) : other++;
  }
  return characters;
}();

// By character, -1 for those that stand for no byte.
constexpr std::array<int16_t, 0x144> kByteLevelBytes = [] {
  std::array<int16_t, 0x144> bytes{};
  bytes.fill(-1);
  for (size_t b = 0; b < kByteLevelCharacters.size(); ++b) {
    bytes[kByteLevelCharacters[b]] = static_cast<int16_t>(b);
  }
  return bytes;
}();

using Visit = absl::FunctionRef<absl::Status(std::string_view)>;

// The steps that are left, applied to one piece after the other.
class PreTokenizerRun {
 public:
  PreTokenizerRun(absl::Span<const PreTokenizerStep> steps, Visit visit)
      : steps_(steps), visit_(visit) {}

  absl::Status Apply(size_t step, std::string_view text, bool at_start) {
    if (text.empty()) return absl::OkStatus();
    if (step == steps_.size()) return visit_(text);
    return std::visit([&](const auto& which) { return Apply(which, step + 1, text, at_start); },
                      steps_[step]);
  }

 private:
  absl::Status Apply(const PrefixSpace&, size_t next, std::string_view text, bool at_start) {
    if (text[0] == ' ') return Apply(next, text, at_start);
    std::string prefixed = " ";
    prefixed += text;
    return Apply(next, prefixed, at_start);
  }

  absl::Status Apply(const SplitRegex& regex, size_t next, std::string_view text, bool at_start) {
    return regex.Split(text, [&](std::string_view piece) {
      return Apply(next, piece, at_start && piece.data() == text.data());
    });
  }

  absl::Status Apply(const ByteLevel&, size_t next, std::string_view text, bool at_start) {
    std::string spelled;
    spelled.reserve(text.size() * 2);
    for (const char c : text) {
      AppendUtf8(kByteLevelCharacters[static_cast<uint8_t>(c)], spelled);
    }
    return Apply(next, spelled, at_start);
  }

  absl::Status Apply(const Metaspace& metaspace, size_t next, std::string_view text,
                     bool at_start) {
    const std::string& mark = metaspace.replacement;
    std::string marked = ReplaceAll(text, {" ", mark});
    const bool prepend = metaspace.prepend == Metaspace::Prepend::kAlways ||
                         (metaspace.prepend == Metaspace::Prepend::kFirst && at_start);
    if (prepend && std::string_view(marked).substr(0, mark.size()) != mark) {
      marked.insert(0, mark);
    }
    if (!metaspace.split) return Apply(next, marked, at_start);
    std::string_view rest = marked;
    while (!rest.empty()) {
      const std::string_view piece = rest.substr(0, rest.find(mark, 1));
      MOBI_RETURN_IF_ERROR(Apply(next, piece, at_start));
      rest.remove_prefix(piece.size());
      at_start = false;
    }
    return absl::OkStatus();
  }

  absl::Span<const PreTokenizerStep> steps_;
  Visit visit_;
};

}  // namespace

std::string Normalize(const std::vector<NormalizerStep>& steps, std::string_view text) {
  std::string normalized(text);
  for (const NormalizerStep& step : steps) {
    if (const Prepend* prepend = std::get_if<Prepend>(&step)) {
      if (!normalized.empty()) normalized.insert(0, prepend->text);
    } else {
      normalized = ReplaceAll(normalized, std::get<Replace>(step));
    }
  }
  return normalized;
}

absl::Status PreTokenize(const std::vector<PreTokenizerStep>& steps, std::string_view text,
                         bool at_start, absl::FunctionRef<absl::Status(std::string_view)> visit) {
  return PreTokenizerRun(steps, visit).Apply(0, text, at_start);
}

std::string_view ByteLevelPattern() {
  return R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
}

std::string ByteLevelBytes(std::string_view token) {
  std::string bytes;
  for (std::string_view rest = token; !rest.empty();) {
    const Utf8Step step = NextUtf8(rest);
    if (step.code_point >= kByteLevelBytes.size()) return std::string(token);
    const int16_t byte = kByteLevelBytes[step.code_point];
    if (byte < 0) return std::string(token);
    bytes += static_cast<char>(byte);
    rest.remove_prefix(step.length);
  }
  return bytes;
}

}  // namespace mobi
