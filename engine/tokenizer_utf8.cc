#include "engine/tokenizer_utf8.h"

#include <utf8proc.h>

#include <cstdint>

namespace mobi {
namespace {

// Bytes that may follow a lead byte first; later ones are 80..BF.
struct Lead {
  int continuation;
  uint8_t first_low;
  uint8_t first_high;
};

Lead LeadOf(uint8_t byte) {
  if (byte >= 0xC2 && byte <= 0xDF) return {1, 0x80, 0xBF};
  if (byte == 0xE0) return {2, 0xA0, 0xBF};
  if (byte == 0xED) return {2, 0x80, 0x9F};  // no surrogates
  if (byte >= 0xE1 && byte <= 0xEF) return {2, 0x80, 0xBF};
  if (byte == 0xF0) return {3, 0x90, 0xBF};
  if (byte >= 0xF1 && byte <= 0xF3) return {3, 0x80, 0xBF};
  if (byte == 0xF4) return {3, 0x80, 0x8F};  // up to U+10FFFF
  return {0, 0, 0};
}

}  // namespace

Utf8Step NextUtf8(std::string_view text) {
  const uint8_t first = static_cast<uint8_t>(text[0]);
  if (first < 0x80) return {Utf8Step::kCharacter, first, 1};
  const Lead lead = LeadOf(first);
  if (lead.continuation == 0) return {Utf8Step::kIllFormed, 0, 1};
  char32_t code_point = first & (0x3F >> lead.continuation);
  for (int i = 1; i <= lead.continuation; ++i) {
    const size_t at = static_cast<size_t>(i);
    if (at == text.size()) return {Utf8Step::kIncomplete, 0, at};
    const uint8_t byte = static_cast<uint8_t>(text[at]);
    const uint8_t low = i == 1 ? lead.first_low : 0x80;
    const uint8_t high = i == 1 ? lead.first_high : 0xBF;
    if (byte < low || byte > high) return {Utf8Step::kIllFormed, 0, at};
    code_point = (code_point << 6) | (byte & 0x3F);
  }
  return {Utf8Step::kCharacter, code_point, static_cast<size_t>(lead.continuation) + 1};
}

void AppendUtf8(char32_t code_point, std::string& out) {
  if (code_point < 0x80) {
    out += static_cast<char>(code_point);
    return;
  }
  const int continuation = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
  const uint8_t marker = continuation == 1 ? 0xC0 : continuation == 2 ? 0xE0 : 0xF0;
  out += static_cast<char>(marker | (code_point >> (6 * continuation)));
  for (int i = continuation - 1; i >= 0; --i) {
    out += static_cast<char>(0x80 | ((code_point >> (6 * i)) & 0x3F));
  }
}

bool IsValidUtf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Step step = NextUtf8(text);
    if (step.kind != Utf8Step::kCharacter) return false;
    text.remove_prefix(step.length);
  }
  return true;
}

std::string ReplaceIllFormedUtf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Step step = NextUtf8(text);
    out += step.kind == Utf8Step::kCharacter ? text.substr(0, step.length) : kReplacementCharacter;
    text.remove_prefix(step.length);
  }
  return out;
}

bool IsWhiteSpace(char32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool IsWordCharacter(char32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      break;
  }
  // Symbols with Other_Alphabetic (circled and squared letters), and Join_Control.
  return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
         (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189) || c == 0x200C ||
         c == 0x200D;
}

}  // namespace mobi
