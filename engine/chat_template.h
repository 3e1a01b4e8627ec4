// Chat messages to a prompt, as Hugging Face renders the templates of Llama 2, 3, 3.1 and 3.2.
// Sits between inference_service and the tokenizer. Control tokens come from here alone: the text
// of messages is encoded as plain text. Immutable, thread-safe. The family is recognised by what
// the model's own template holds; the Jinja text itself is never run.
#ifndef MOBI_ENGINE_CHAT_TEMPLATE_H_
#define MOBI_ENGINE_CHAT_TEMPLATE_H_

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/tokenizer.h"

namespace mobi {

enum class ChatFamily {
  kLlama2,   // [INST] ... [/INST], system in <<SYS>>
  kLlama3,   // <|start_header_id|>role<|end_header_id|>
  kLlama31,  // as Llama 3, with a system block that names dates
};

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};

struct ChatOptions {
  bool add_generation_prompt = true;
  // Today for templates that ask for it (Llama 3.2); the others name a fixed day.
  std::chrono::system_clock::time_point now{};
};

class ChatTemplate {
 public:
  // FAILED_PRECONDITION: the model has no chat template, or one of no family that we know.
  // INVALID_ARGUMENT: its vocabulary lacks a control token of its family. `tokenizer` outlives
  // this.
  static absl::StatusOr<ChatTemplate> Create(const Tokenizer& tokenizer);

  ChatFamily family() const { return family_; }
  // The ids to generate from, BOS included. INVALID_ARGUMENT names the message at fault.
  absl::StatusOr<std::vector<int32_t>> Encode(absl::Span<const ChatMessage> messages,
                                              const ChatOptions& options = {}) const;
  // The same as text, for people; control tokens are spelled out.
  absl::StatusOr<std::string> Render(absl::Span<const ChatMessage> messages,
                                     const ChatOptions& options = {}) const;

 private:
  ChatTemplate(const Tokenizer& tokenizer, ChatFamily family)
      : tokenizer_(&tokenizer), family_(family) {}
  absl::StatusOr<std::vector<PromptPart>> Parts(absl::Span<const ChatMessage> messages,
                                                const ChatOptions& options) const;
  absl::StatusOr<std::vector<PromptPart>> Llama2Parts(absl::Span<const ChatMessage> messages) const;
  std::vector<PromptPart> Llama3Parts(absl::Span<const ChatMessage> messages,
                                      const ChatOptions& options) const;
  PromptPart Control(std::string_view token) const;

  const Tokenizer* tokenizer_;
  ChatFamily family_;
  bool dated_today_ = false;  // the template calls strftime_now
};

}  // namespace mobi

#endif  // MOBI_ENGINE_CHAT_TEMPLATE_H_
