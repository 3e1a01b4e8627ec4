// Prompts of exact token lengths for a load test: cut from a tokenized text, or made of random ids.
// Immutable, safe from any thread; the same seed and request give the same prompt.
#ifndef MOBI_SERVER_LOADGEN_PROMPTS_H_
#define MOBI_SERVER_LOADGEN_PROMPTS_H_

#include <cstdint>
#include <vector>

namespace mobi {

struct PromptOptions {
  // A text's ids, begin-of-text first if the model has one; empty: random ids.
  std::vector<int32_t> text{};
  int vocab_size = 1;            // of random ids
  int shared_prefix_tokens = 0;  // every prompt begins with the same tokens
  uint64_t seed = 1;
};

class Prompts {
 public:
  explicit Prompts(PromptOptions options);

  // A longer prompt of the same request begins with the shorter one.
  std::vector<int32_t> Make(uint64_t request, int length) const;
  bool from_text() const { return !options_.text.empty(); }

 private:
  void Append(uint64_t seed, int length, std::vector<int32_t>& prompt) const;

  const PromptOptions options_;
  std::vector<int32_t> prefix_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_LOADGEN_PROMPTS_H_
