#include "engine/tokenizer_added.h"

#include <algorithm>
#include <utility>

#include "engine/tokenizer_utf8.h"

namespace mobi {
namespace {

uint64_t EdgeKey(int32_t node, char byte) {
  return static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(byte);
}

// Start of the character that ends at `end`, not before `limit`.
size_t PreviousCharacter(std::string_view text, size_t end, size_t limit) {
  size_t begin = end - 1;
  while (begin > limit && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
  return begin;
}

bool TouchesWord(std::string_view text, size_t begin, size_t end) {
  if (begin > 0) {
    const size_t previous = PreviousCharacter(text, begin, 0);
    if (IsWordCharacter(NextUtf8(text.substr(previous)).code_point)) return true;
  }
  return end < text.size() && IsWordCharacter(NextUtf8(text.substr(end)).code_point);
}

size_t SkipSpaceBack(std::string_view text, size_t from, size_t limit) {
  while (from > limit) {
    const size_t previous = PreviousCharacter(text, from, limit);
    if (!IsWhiteSpace(NextUtf8(text.substr(previous)).code_point)) break;
    from = previous;
  }
  return from;
}

size_t SkipSpace(std::string_view text, size_t from) {
  while (from < text.size()) {
    const Utf8Step step = NextUtf8(text.substr(from));
    if (!IsWhiteSpace(step.code_point)) break;
    from += step.length;
  }
  return from;
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  token_at_.push_back(-1);
  for (size_t i = 0; i < tokens_.size(); ++i) {
    int32_t node = 0;
    for (const char byte : tokens_[i].content) {
      const auto [edge, added] =
          edges_.try_emplace(EdgeKey(node, byte), static_cast<int32_t>(token_at_.size()));
      if (added) token_at_.push_back(-1);
      node = edge->second;
    }
    if (token_at_[node] < 0) token_at_[node] = static_cast<int>(i);
    starts_[static_cast<uint8_t>(tokens_[i].content[0])] = true;
  }
}

std::optional<AddedTokenMatcher::Match> AddedTokenMatcher::LongestAt(std::string_view text,
                                                                     size_t begin) const {
  std::optional<Match> longest;
  int32_t node = 0;
  for (size_t at = begin; at < text.size(); ++at) {
    const auto edge = edges_.find(EdgeKey(node, text[at]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (token_at_[node] >= 0) longest = Match{token_at_[node], at + 1};
  }
  return longest;
}

void AddedTokenMatcher::Split(std::string_view text, bool parse_special,
                              absl::FunctionRef<void(const Piece&)> visit) const {
  size_t done = 0;  // everything before it was visited
  for (size_t at = 0; at < text.size();) {
    if (!starts_[static_cast<uint8_t>(text[at])]) {
      ++at;
      continue;
    }
    const std::optional<Match> match = LongestAt(text, at);
    if (!match.has_value()) {
      ++at;
      continue;
    }
    // The search goes on behind the match even where the match is not taken.
    size_t begin = std::exchange(at, match->end);
    size_t end = match->end;
    const AddedToken& token = tokens_[match->token];
    if (token.special && !parse_special) continue;
    if (token.single_word && TouchesWord(text, begin, end)) continue;
    if (token.lstrip) begin = std::max(SkipSpaceBack(text, begin, std::min(done, begin)), done);
    if (token.rstrip) end = SkipSpace(text, end);
    if (done < begin) visit({std::nullopt, done, begin});
    visit({token.id, begin, end});
    done = end;
  }
  if (done < text.size()) visit({std::nullopt, done, text.size()});
}

}  // namespace mobi
