#include "calibrator/text_data.h"

#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr std::string_view kDocumentEnd = "<|endoftext|>";

// Bytes of the well-formed sequence at `at`, 0 when there is none (Unicode, table 3-7).
size_t SequenceLength(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) -> unsigned {
    return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0u;
  };
  const auto tail = [&](size_t i) { return (byte(i) & 0xC0) == 0x80; };
  const unsigned b = byte(0);
  if (b < 0x80) return 1;
  if (b >= 0xC2 && b <= 0xDF) return tail(1) ? 2 : 0;
  if (b >= 0xE0 && b <= 0xEF) {
    const bool ok =
        tail(1) && tail(2) && !(b == 0xE0 && byte(1) < 0xA0) && !(b == 0xED && byte(1) >= 0xA0);
    return ok ? 3 : 0;
  }
  if (b >= 0xF0 && b <= 0xF4) {
    const bool ok = tail(1) && tail(2) && tail(3) && !(b == 0xF0 && byte(1) < 0x90) &&
                    !(b == 0xF4 && byte(1) >= 0x90);
    return ok ? 4 : 0;
  }
  return 0;
}

std::vector<std::string_view> Lines(std::string_view text) {
  std::vector<std::string_view> lines;
  size_t at = 0;
  while (at < text.size()) {
    const size_t end = std::min(text.find('\n', at), text.size());
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

bool IsBlank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

void Trim(std::string& text) {
  text.erase(0, std::min(text.find_first_not_of('\n'), text.size()));
  text.erase(text.find_last_not_of('\n') + 1);
}

std::string JoinDocuments(std::string_view text) {
  std::string joined, document;
  const auto finish = [&] {
    Trim(document);
    if (!document.empty()) {
      if (!joined.empty()) joined += "\n\n";
      joined += document;
    }
    document.clear();
  };
  for (const std::string_view line : Lines(text)) {
    if (line == kDocumentEnd) {
      finish();
    } else {
      document.append(line);
      document += '\n';
    }
  }
  finish();
  return joined;
}

std::string JoinRows(std::string_view text) {
  std::string joined;
  bool first = true;
  for (const std::string_view line : Lines(text)) {
    if (!first) joined += "\n\n";
    first = false;
    if (IsBlank(line)) continue;
    joined.append(line);
    joined += '\n';
  }
  return joined;
}

}  // namespace

absl::StatusOr<TextLayout> ParseTextLayout(std::string_view name) {
  if (name == "plain") return TextLayout::kPlain;
  if (name == "wikitext") return TextLayout::kWikiText;
  if (name == "documents") return TextLayout::kDocuments;
  return absl::InvalidArgumentError(
      absl::StrCat("layout \"", std::string(name), "\" is not plain, wikitext or documents"));
}

size_t FirstInvalidUtf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const size_t length = SequenceLength(text, at);
    if (length == 0) return at;
    at += length;
  }
  return std::string_view::npos;
}

std::string ApplyLayout(std::string_view text, TextLayout layout) {
  switch (layout) {
    case TextLayout::kWikiText:
      return JoinRows(text);
    case TextLayout::kDocuments:
      return JoinDocuments(text);
    case TextLayout::kPlain:
      break;
  }
  return std::string(text);
}

absl::StatusOr<std::string> ReadText(const std::string& path, TextLayout layout) {
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()),
                              file.bytes().size());
  if (text.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": the file is empty"));
  const size_t bad = FirstInvalidUtf8(text);
  if (bad != std::string_view::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": not UTF-8 text (byte at offset ", bad, ")"));
  }
  return ApplyLayout(text, layout);
}

absl::StatusOr<std::vector<int32_t>> DrawWindows(const std::vector<std::vector<int32_t>>& texts,
                                                 int64_t count, int64_t length, int32_t bos,
                                                 uint64_t seed) {
  std::mt19937_64 random(seed);
  struct Window {
    size_t text;
    int64_t begin;
  };
  std::vector<Window> windows;
  int64_t tokens = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    const auto size = static_cast<int64_t>(texts[i].size());
    tokens += size;
    if (size < length) continue;
    const int64_t phase = static_cast<int64_t>(random() % static_cast<uint64_t>(size % length + 1));
    for (int64_t at = phase; at + length <= size; at += length) windows.push_back({i, at});
  }
  if (static_cast<int64_t>(windows.size()) < count) {
    return absl::InvalidArgumentError(absl::StrCat(
        "calibration text is too short: ", tokens, " tokens hold ", windows.size(), " windows of ",
        length, ", ", count, " are needed; give more text, fewer samples or a shorter seq-len"));
  }
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    std::swap(windows[i], windows[i + static_cast<int64_t>(random() % (windows.size() - i))]);
    const auto begin = texts[windows[i].text].begin() + windows[i].begin;
    ids.insert(ids.end(), begin, begin + length);
    if (bos >= 0 && i % 4 == 0) ids[i * length] = bos;
  }
  return ids;
}

}  // namespace mobi
