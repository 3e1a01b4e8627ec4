// Finds added tokens (control tokens and others) in text before the model sees it, as Hugging
// Face's AddedVocabulary does: leftmost match, longest of those, with its rules for single words
// and for space beside a token. One matcher looks at raw text, another at normalized text. Time is
// linear in the text times the longest token that it nearly spells. Immutable, thread-safe.
#ifndef MOBI_ENGINE_TOKENIZER_ADDED_H_
#define MOBI_ENGINE_TOKENIZER_ADDED_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"

namespace mobi {

struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool special = false;
  bool normalized = false;
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // swallows white space before it
  bool rstrip = false;       // swallows white space after it
};

class AddedTokenMatcher {
 public:
  AddedTokenMatcher() = default;
  // Of equal contents the first counts. Contents are not empty.
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  // One piece of a split text: an added token, or what lies between two, never empty.
  struct Piece {
    std::optional<int32_t> id;
    size_t begin;
    size_t end;
  };
  // Calls `visit` from left to right. Special tokens are plain text unless parse_special.
  void Split(std::string_view text, bool parse_special,
             absl::FunctionRef<void(const Piece&)> visit) const;

 private:
  struct Match {
    int token;
    size_t end;
  };
  std::optional<Match> LongestAt(std::string_view text, size_t begin) const;

  std::vector<AddedToken> tokens_;
  // A trie: node 0 is the root, an edge is (node << 8 | byte) to a node.
  absl::flat_hash_map<uint64_t, int32_t> edges_;
  std::vector<int> token_at_;  // by node, -1: none ends here
  std::array<bool, 256> starts_{};
};

}  // namespace mobi

#endif  // MOBI_ENGINE_TOKENIZER_ADDED_H_
