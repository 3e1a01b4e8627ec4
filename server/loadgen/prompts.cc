#include "server/loadgen/prompts.h"

#include <algorithm>
#include <cstddef>
#include <random>
#include <utility>

namespace mobi {

Prompts::Prompts(PromptOptions options) : options_(std::move(options)) {
  Append(options_.seed, options_.shared_prefix_tokens, prefix_);
}

std::vector<int32_t> Prompts::Make(uint64_t request, int length) const {
  const auto shared = std::min<size_t>(prefix_.size(), static_cast<size_t>(length));
  std::vector<int32_t> prompt(prefix_.begin(), prefix_.begin() + static_cast<ptrdiff_t>(shared));
  prompt.reserve(static_cast<size_t>(length));
  std::seed_seq seed{options_.seed, request + 1};
  Append(std::mt19937_64(seed)(), length - static_cast<int>(shared), prompt);
  return prompt;
}

void Prompts::Append(uint64_t seed, int length, std::vector<int32_t>& prompt) const {
  std::mt19937_64 random(seed);
  const std::vector<int32_t>& text = options_.text;
  if (text.empty()) {
    const auto vocab_size = static_cast<uint64_t>(options_.vocab_size);
    for (int i = 0; i < length; ++i) prompt.push_back(static_cast<int32_t>(random() % vocab_size));
    return;
  }
  // The first id may be begin-of-text: it comes first or not at all.
  size_t position = text.size() > 1 ? 1 + random() % (text.size() - 1) : 0;
  for (int i = 0; i < length; ++i) {
    if (prompt.empty()) {
      prompt.push_back(text.front());
      continue;
    }
    prompt.push_back(text[position]);
    position = position + 1 < text.size() ? position + 1 : std::min<size_t>(1, text.size() - 1);
  }
}

}  // namespace mobi
