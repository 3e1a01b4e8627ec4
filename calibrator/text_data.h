// Text files as calibration and evaluation read them: checked UTF-8, brought into the layout that a
// corpus asks for, tokenized, cut into windows. Pure but for reading the file.
#ifndef MOBI_CALIBRATOR_TEXT_DATA_H_
#define MOBI_CALIBRATOR_TEXT_DATA_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/tokenizer.h"

namespace mobi {

enum class TextLayout {
  kPlain,      // the file as it is
  kWikiText,   // rows as the wikitext-2-raw-v1 dataset has them: a blank line becomes the empty
               // string, any other keeps its line feed, rows are joined by "\n\n"
  kDocuments,  // documents parted by a line <|endoftext|>, joined by "\n\n"
};

// "plain", "wikitext", "documents".
absl::StatusOr<TextLayout> ParseTextLayout(std::string_view name);

// INVALID_ARGUMENT names the file and the offset of the first byte that is not UTF-8.
absl::StatusOr<std::string> ReadText(const std::string& path, TextLayout layout);
std::string ApplyLayout(std::string_view text, TextLayout layout);

// Offset of the first byte that does not belong to well-formed UTF-8; npos when there is none.
size_t FirstInvalidUtf8(std::string_view text);

// `count` windows of `length` tokens, one after another: drawn without overlap from all texts by
// `seed`; every fourth one opens with BOS (when `bos` is not negative), as a prompt does.
// INVALID_ARGUMENT when the texts are too short.
absl::StatusOr<std::vector<int32_t>> DrawWindows(const std::vector<std::vector<int32_t>>& texts,
                                                 int64_t count, int64_t length, int32_t bos,
                                                 uint64_t seed);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_TEXT_DATA_H_
