#include "engine/chat_template.h"

#include <ctime>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "engine/tokenizer_utf8.h"

namespace mobi {
namespace {

// A Jinja text without what does not change its output: comments, space outside strings, the kind
// of quotes, whitespace control. Escapes in strings are resolved.
std::string Canonical(std::string_view jinja) {
  std::string out;
  char quote = '\0';
  for (size_t i = 0; i < jinja.size(); ++i) {
    const char c = jinja[i];
    const std::string_view rest = jinja.substr(i);
    if (quote != '\0') {
      if (c == '\\' && rest.size() > 1) {
        out += rest[1] == 'n' ? '\n' : rest[1];
        ++i;
      } else if (c == quote) {
        quote = '\0';
        out += '\'';
      } else {
        out += c;
      }
    } else if (rest.substr(0, 2) == "{#") {
      const size_t end = rest.find("#}");
      i += end == rest.npos ? rest.size() : end + 1;
    } else if (rest.substr(0, 3) == "{%-" || rest.substr(0, 3) == "{{-") {
      out += rest.substr(0, 2);
      i += 2;
    } else if (rest.substr(0, 3) == "-%}" || rest.substr(0, 3) == "-}}") {
      continue;
    } else if (c == '\'' || c == '"') {
      quote = c;
      out += '\'';
    } else if (c != ' ' && c != '\n' && c != '\t' && c != '\r') {
      out += c;
    }
  }
  return out;
}

bool Contains(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

bool ContainsAll(std::string_view text, absl::Span<const std::string_view> parts) {
  for (const std::string_view part : parts) {
    if (!Contains(text, part)) return false;
  }
  return true;
}

// Whether every string of a canonical template is one of `known`: a template that says more than
// its family does is another template.
bool SaysOnly(std::string_view canonical, absl::Span<const std::string_view> known) {
  for (size_t open; (open = canonical.find('\'')) != canonical.npos;) {
    const size_t close = canonical.find('\'', open + 1);
    if (close == canonical.npos) return false;
    const std::string_view text = canonical.substr(open + 1, close - open - 1);
    bool is_known = false;
    for (const std::string_view one : known) is_known = is_known || one == text;
    if (!is_known) return false;
    canonical.remove_prefix(close + 1);
  }
  return true;
}

// What a canonical template has between `before` and the next quote; empty when it has no `before`.
std::string_view StringAfter(std::string_view canonical, std::string_view before) {
  const size_t at = canonical.find(before);
  if (at == canonical.npos) return {};
  const std::string_view rest = canonical.substr(at + before.size());
  return rest.substr(0, rest.find('\''));
}

constexpr std::string_view kLlama3Message =
    "'<|start_header_id|>'+message['role']+'<|end_header_id|>\n\n'+message['content']|trim+"
    "'<|eot_id|>'";
constexpr std::string_view kLlama3Prompt =
    "{{'<|start_header_id|>assistant<|end_header_id|>\n\n'}}";

bool IsLlama2(std::string_view canonical) {
  const bool user = Contains(canonical, "{{bos_token+'[INST] '+content.strip()+' [/INST]'}}") ||
                    Contains(canonical, "{{bos_token+'[INST] '+content|trim+' [/INST]'}}");
  const bool assistant = Contains(canonical, "{{' '+content.strip()+' '+eos_token}}") ||
                         Contains(canonical, "{{' '+content|trim+' '+eos_token}}");
  return user && assistant &&
         ContainsAll(canonical, {"{%ifloop.index0==0andsystem_message!=false%}"
                                 "{%setcontent='<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+"
                                 "message['content']%}",
                                 "(message['role']=='user')!=(loop.index0%2==0)"}) &&
         SaysOnly(canonical, {"role", "content", "system", "user", "assistant", "<<SYS>>\n",
                              "\n<</SYS>>\n\n", "[INST] ", " [/INST]", " ",
                              "Conversation roles must alternate "
                              "user/assistant/user/assistant/..."});
}

bool IsLlama3(std::string_view canonical) {
  return ContainsAll(canonical,
                     {kLlama3Message, kLlama3Prompt,
                      "{%ifloop.index0==0%}{%setcontent=bos_token+content%}{%endif%}"}) &&
         SaysOnly(canonical, {"role", "content", "<|start_header_id|>", "<|end_header_id|>\n\n",
                              "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"});
}

bool IsLlama31(std::string_view canonical) {
  return ContainsAll(
      canonical,
      {"{{bos_token}}", "{%setsystem_message=messages[0]['content']|trim%}",
       "{{'<|start_header_id|>system<|end_header_id|>\n\n'}}",
       "{{'Cutting Knowledge Date: December 2023\n'}}"
       "{{'Today Date: '+date_string+'\n\n'}}",
       "{{system_message}}{{'<|eot_id|>'}}", kLlama3Message, kLlama3Prompt, "{%setdate_string='"});
}

// Python's str.strip, which is Jinja's trim.
std::string_view Strip(std::string_view text) {
  const auto is_space = [](char32_t c) { return IsWhiteSpace(c) || (c >= 0x1C && c <= 0x1F); };
  while (!text.empty()) {
    const Utf8Step step = NextUtf8(text);
    if (step.kind != Utf8Step::kCharacter || !is_space(step.code_point)) break;
    text.remove_prefix(step.length);
  }
  size_t end = text.size();
  for (size_t at = text.size(); at-- > 0;) {
    if ((static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) continue;
    const Utf8Step step = NextUtf8(text.substr(at, end - at));
    const bool whole = step.kind == Utf8Step::kCharacter && step.length == end - at;
    if (!whole || !is_space(step.code_point)) break;
    end = at;
  }
  return text.substr(0, end);
}

// As strftime("%d %b %Y") in the C locale.
std::string DateOf(std::chrono::system_clock::time_point now) {
  static constexpr const char* kMonths[] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                            "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  const std::time_t time = std::chrono::system_clock::to_time_t(now);
  std::tm local = {};
  localtime_r(&time, &local);
  return absl::StrFormat("%02d %s %d", local.tm_mday, kMonths[local.tm_mon], local.tm_year + 1900);
}

absl::Status MessageError(size_t index, std::string_view reason) {
  return absl::InvalidArgumentError(absl::StrFormat("messages[%d].role: %s", index, reason));
}

absl::Status CheckRoles(absl::Span<const ChatMessage> messages) {
  if (messages.empty()) return absl::InvalidArgumentError("messages: empty");
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role == "system" || role == "user" || role == "assistant") continue;
    return MessageError(i, absl::StrFormat("\"%s\" is not one of system, user, assistant",
                                           absl::CHexEscape(role.substr(0, 40))));
  }
  return absl::OkStatus();
}

PromptPart Text(std::string text) { return {std::nullopt, std::move(text)}; }
PromptPart Control(int32_t token) { return {token, {}}; }

}  // namespace

absl::StatusOr<ChatTemplate> ChatTemplate::Create(const Tokenizer& tokenizer) {
  if (tokenizer.chat_template().empty()) {
    return absl::FailedPreconditionError(
        "the model has no chat template (chat_template in tokenizer_config.json); send text");
  }
  ChatTemplate chat(tokenizer);
  if (!chat.Recognise(Canonical(tokenizer.chat_template()))) {
    return absl::FailedPreconditionError(
        "the model's chat template is not one of Llama 2, 3, 3.1, 3.2; send text");
  }
  MOBI_RETURN_IF_ERROR(chat.FindControlTokens());
  return chat;
}

bool ChatTemplate::Recognise(std::string_view canonical) {
  if (IsLlama2(canonical)) {
    family_ = ChatFamily::kLlama2;
    return true;
  }
  if (IsLlama31(canonical)) {
    family_ = ChatFamily::kLlama31;
    fixed_date_ = std::string(StringAfter(canonical, "{%setdate_string='"));
    dated_today_ = Contains(canonical, "{%setdate_string=strftime_now('%d %b %Y')%}");
  } else if (IsLlama3(canonical)) {
    family_ = ChatFamily::kLlama3;
  } else {
    return false;
  }
  always_prompts_ = !Contains(
      canonical, absl::StrCat("{%ifadd_generation_prompt%}",
                              absl::string_view(kLlama3Prompt.data(), kLlama3Prompt.size())));
  return true;
}

absl::Status ChatTemplate::FindControlTokens() {
  if (!tokenizer_->bos_id().has_value()) {
    return absl::InvalidArgumentError("tokenizer_config.json: bos_token: missing");
  }
  bos_ = *tokenizer_->bos_id();
  if (family_ == ChatFamily::kLlama2) {
    if (!tokenizer_->eos_id().has_value()) {
      return absl::InvalidArgumentError("tokenizer_config.json: eos_token: missing");
    }
    eos_ = *tokenizer_->eos_id();
    return absl::OkStatus();
  }
  const std::pair<const char*, int32_t*> controls[] = {{"<|start_header_id|>", &start_header_},
                                                       {"<|end_header_id|>", &end_header_},
                                                       {"<|eot_id|>", &end_of_turn_}};
  for (const auto& [token, id] : controls) {
    const std::optional<int32_t> found = tokenizer_->TokenId(token);
    if (!found.has_value() || !tokenizer_->IsSpecial(*found)) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "tokenizer.json: added_tokens: the chat template needs %s as a special token", token));
    }
    *id = *found;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> ChatTemplate::Encode(absl::Span<const ChatMessage> messages,
                                                          const ChatOptions& options) const {
  MOBI_ASSIGN_OR_RETURN(const std::vector<PromptPart> parts, Parts(messages, options));
  return tokenizer_->EncodeParts(parts);
}

absl::StatusOr<std::string> ChatTemplate::Render(absl::Span<const ChatMessage> messages,
                                                 const ChatOptions& options) const {
  MOBI_ASSIGN_OR_RETURN(const std::vector<PromptPart> parts, Parts(messages, options));
  std::string text;
  for (const PromptPart& part : parts) {
    text += part.token.has_value() ? tokenizer_->Token(*part.token) : std::string_view(part.text);
  }
  return text;
}

absl::StatusOr<std::vector<PromptPart>> ChatTemplate::Parts(absl::Span<const ChatMessage> messages,
                                                            const ChatOptions& options) const {
  MOBI_RETURN_IF_ERROR(CheckRoles(messages));
  if (family_ == ChatFamily::kLlama2) return Llama2Parts(messages);
  return Llama3Parts(messages, options);
}

absl::StatusOr<std::vector<PromptPart>> ChatTemplate::Llama2Parts(
    absl::Span<const ChatMessage> messages) const {
  std::vector<PromptPart> parts;
  const bool has_system = messages[0].role == "system";
  const size_t first = has_system ? 1 : 0;
  if (messages.size() == first) {
    return absl::InvalidArgumentError("messages: a user message must follow the system message");
  }
  for (size_t i = first; i < messages.size(); ++i) {
    const bool user = (i - first) % 2 == 0;
    if (messages[i].role != (user ? "user" : "assistant")) {
      return MessageError(i, absl::StrFormat("%s where %s must follow: after one optional system "
                                             "message, user and assistant take turns",
                                             messages[i].role, user ? "user" : "assistant"));
    }
    if (user) {
      std::string content = messages[i].content;
      if (i == first && has_system) {
        content = absl::StrCat("<<SYS>>\n", messages[0].content, "\n<</SYS>>\n\n", content);
      }
      parts.push_back(Control(bos_));
      parts.push_back(Text("[INST] " + std::string(Strip(content)) + " [/INST]"));
    } else {
      parts.push_back(Text(" " + std::string(Strip(messages[i].content)) + " "));
      parts.push_back(Control(eos_));
    }
  }
  return parts;
}

std::vector<PromptPart> ChatTemplate::Llama3Parts(absl::Span<const ChatMessage> messages,
                                                  const ChatOptions& options) const {
  std::vector<PromptPart> parts = {Control(bos_)};
  if (family_ == ChatFamily::kLlama31) {
    std::string_view system;
    if (messages[0].role == "system") {
      system = Strip(messages[0].content);
      messages.remove_prefix(1);
    }
    const std::string date =
        dated_today_ && options.now.has_value() ? DateOf(*options.now) : fixed_date_;
    AddHeader("system", parts);
    parts.push_back(Text("\n\nCutting Knowledge Date: December 2023\nToday Date: " + date + "\n\n" +
                         std::string(system)));
    parts.push_back(Control(end_of_turn_));
  }
  for (const ChatMessage& message : messages) AddMessage(message.role, message.content, parts);
  if (options.add_generation_prompt || always_prompts_) {
    AddHeader("assistant", parts);
    parts.push_back(Text("\n\n"));
  }
  return parts;
}

void ChatTemplate::AddHeader(std::string_view role, std::vector<PromptPart>& parts) const {
  parts.push_back(Control(start_header_));
  parts.push_back(Text(std::string(role)));
  parts.push_back(Control(end_header_));
}

void ChatTemplate::AddMessage(std::string_view role, std::string_view content,
                              std::vector<PromptPart>& parts) const {
  AddHeader(role, parts);
  parts.push_back(Text("\n\n" + std::string(Strip(content))));
  parts.push_back(Control(end_of_turn_));
}

}  // namespace mobi
