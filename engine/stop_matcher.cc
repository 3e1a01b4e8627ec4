#include "engine/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace mobi {

StopMatcher::StopMatcher(absl::Span<const std::string> stops) {
  stops_.reserve(stops.size());
  for (const std::string& text : stops) {
    Stop stop{text, std::vector<int32_t>(text.size(), 0), 0};
    for (size_t i = 1; i < text.size(); ++i) {
      int32_t border = stop.border[i - 1];
      while (border > 0 && text[border] != text[i]) border = stop.border[border - 1];
      stop.border[i] = text[border] == text[i] ? border + 1 : 0;
    }
    stops_.push_back(std::move(stop));
  }
}

void StopMatcher::Advance(Stop& stop, char byte) {
  while (stop.length > 0 && stop.text[stop.length] != byte) {
    stop.length = stop.border[stop.length - 1];
  }
  if (stop.text[stop.length] == byte) ++stop.length;
}

std::string StopMatcher::Push(std::string_view text) {
  if (matched_.has_value()) return {};
  for (size_t i = 0; i < text.size(); ++i) {
    size_t longest = 0;
    for (size_t s = 0; s < stops_.size(); ++s) {
      Stop& stop = stops_[s];
      if (stop.text.empty()) continue;
      Advance(stop, text[i]);
      const bool complete = static_cast<size_t>(stop.length) == stop.text.size();
      if (complete && stop.text.size() > longest) {
        longest = stop.text.size();
        matched_ = static_cast<int>(s);
      }
    }
    if (matched_.has_value()) {
      held_ += text.substr(0, i + 1);
      held_.resize(held_.size() - longest);
      return std::exchange(held_, {});
    }
  }
  size_t hold = 0;
  for (const Stop& stop : stops_) hold = std::max(hold, static_cast<size_t>(stop.length));
  held_ += text;
  std::string out = held_.substr(0, held_.size() - hold);
  held_.erase(0, out.size());
  return out;
}

std::string StopMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace mobi
