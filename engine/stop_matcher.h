// Finds stop strings in a stream of text and holds back what may be the start of one, so that no
// part of a stop string leaks. The stop string that is complete first wins; of several that end at
// the same byte, the longest. The result does not depend on how the text was cut into pieces.
// Linear in the text for a given set of stops (Knuth-Morris-Pratt). One thread at a time.
#ifndef MOBI_ENGINE_STOP_MATCHER_H_
#define MOBI_ENGINE_STOP_MATCHER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"

namespace mobi {

class StopMatcher {
 public:
  // Empty strings never match. Texts pushed and stops should be whole UTF-8 sequences; then so is
  // everything returned.
  explicit StopMatcher(absl::Span<const std::string> stops);

  // The text that can be passed on. Once a stop has matched: what came before it, then nothing.
  std::string Push(std::string_view text);
  // What was held back, unless a stop has matched. Call once, last.
  std::string Flush();
  // Index of the stop that ended the text.
  std::optional<int> matched() const { return matched_; }

 private:
  struct Stop {
    std::string text;
    std::vector<int32_t> border;  // border[i]: longest proper border of text[0..i]
    int32_t length = 0;           // bytes of it that the end of the stream matches
  };
  void Advance(Stop& stop, char byte);

  std::vector<Stop> stops_;
  std::string held_;
  std::optional<int> matched_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_STOP_MATCHER_H_
