// Chat messages to a prompt, as Hugging Face renders the templates of Llama 2, 3, 3.1 and 3.2 for
// conversations without tools. Sits between inference_service and the tokenizer. Control tokens
// come from here alone: the text of messages is encoded as plain text. Immutable, thread-safe. The
// family is recognised by what the model's own template holds; the Jinja text itself is never run.
#ifndef MOBI_ENGINE_CHAT_TEMPLATE_H_
#define MOBI_ENGINE_CHAT_TEMPLATE_H_

#include <chrono>
#include <cstdint>
#include <optional>
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
  kLlama31,  // as Llama 3, with a system block that names dates (3.1, 3.2, 3.3)
};

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};

struct ChatOptions {
  bool add_generation_prompt = true;  // Llama 2 has none
  // For templates that name the day (Llama 3.2), in local time; without it they name a fixed day.
  std::optional<std::chrono::system_clock::time_point> now;
};

class ChatTemplate {
 public:
  // FAILED_PRECONDITION: the model has no chat template, or one that we do not know.
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
  explicit ChatTemplate(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}
  // False: the text is of no family that we know.
  bool Recognise(std::string_view jinja);
  absl::Status FindControlTokens();
  absl::StatusOr<std::vector<PromptPart>> Parts(absl::Span<const ChatMessage> messages,
                                                const ChatOptions& options) const;
  absl::StatusOr<std::vector<PromptPart>> Llama2Parts(absl::Span<const ChatMessage> messages) const;
  std::vector<PromptPart> Llama3Parts(absl::Span<const ChatMessage> messages,
                                      const ChatOptions& options) const;
  void AddHeader(std::string_view role, std::vector<PromptPart>& parts) const;
  void AddMessage(std::string_view role, std::string_view content,
                  std::vector<PromptPart>& parts) const;

  const Tokenizer* tokenizer_;
  ChatFamily family_ = ChatFamily::kLlama3;
  bool always_prompts_ = false;  // adds the generation prompt whether asked or not
  bool dated_today_ = false;
  std::string fixed_date_;
  int32_t bos_ = 0;
  int32_t eos_ = 0;           // Llama 2
  int32_t start_header_ = 0;  // Llama 3
  int32_t end_header_ = 0;
  int32_t end_of_turn_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_CHAT_TEMPLATE_H_
