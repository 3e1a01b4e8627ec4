#include "engine/tokenizer.h"

#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_format.h"
#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"
#include "engine/detokenizer.h"
#include "engine/tokenizer_file.h"
#include "engine/tokenizer_utf8.h"

namespace mobi {
namespace {

constexpr size_t kMaxTextBytes = 256 << 20;
constexpr uint64_t kMaxTemplateBytes = 1 << 20;

// Empty when there is no such file.
absl::StatusOr<std::string> ReadOptional(const std::filesystem::path& path, uint64_t max_bytes) {
  const absl::StatusOr<MappedFile> file = MappedFile::Open(path.string(), max_bytes);
  if (absl::IsNotFound(file.status())) return std::string();
  MOBI_RETURN_IF_ERROR(file.status());
  return std::string(file->text());
}

// Encodes pieces of one prompt, one after the other.
class EncodeRun {
 public:
  EncodeRun(const TokenizerPipeline& pipeline, std::vector<int32_t>& ids)
      : pipeline_(pipeline), ids_(ids) {}

  // `text` is valid UTF-8; `at_start`: nothing of the prompt comes before it.
  absl::Status Add(std::string_view text, bool at_start, bool parse_special) {
    absl::Status status;
    pipeline_.raw_matcher.Split(text, parse_special, [&](const AddedTokenMatcher::Piece& piece) {
      if (piece.id.has_value()) {
        ids_.push_back(*piece.id);
      } else if (status.ok()) {
        status = AddRaw(text.substr(piece.begin, piece.end - piece.begin),
                        at_start && piece.begin == 0, parse_special);
      }
    });
    return status;
  }

 private:
  // A text without added tokens that are looked for before normalization.
  absl::Status AddRaw(std::string_view text, bool at_start, bool parse_special) {
    const std::string normalized = Normalize(pipeline_.normalizer, text);
    const std::string_view view = normalized;
    absl::Status status;
    pipeline_.normalized_matcher.Split(
        view, parse_special, [&](const AddedTokenMatcher::Piece& piece) {
          if (piece.id.has_value()) {
            ids_.push_back(*piece.id);
          } else if (status.ok()) {
            status = PreTokenize(pipeline_.pre_tokenizer,
                                 view.substr(piece.begin, piece.end - piece.begin),
                                 at_start && piece.begin == 0, [&](std::string_view word) {
                                   pipeline_.model->Tokenize(word, scratch_, ids_);
                                   return absl::OkStatus();
                                 });
          }
        });
    return status;
  }

  const TokenizerPipeline& pipeline_;
  std::vector<int32_t>& ids_;
  BpeScratch scratch_;
};

absl::Status CheckLength(size_t bytes) {
  if (bytes <= kMaxTextBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrFormat("a text of %u bytes, the limit is %u", bytes, kMaxTextBytes));
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<const TokenizerPipeline> pipeline)
    : pipeline_(std::move(pipeline)) {}

Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& path) {
  std::filesystem::path file = path;
  std::error_code error;
  if (std::filesystem::is_directory(file, error)) file /= "tokenizer.json";
  MOBI_ASSIGN_OR_RETURN(const MappedFile tokenizer,
                        MappedFile::Open(file.string(), kTokenizerJsonLimits.max_bytes));
  const std::filesystem::path folder = file.parent_path();
  const std::filesystem::path config = folder / "tokenizer_config.json";
  MOBI_ASSIGN_OR_RETURN(const std::string config_json,
                        ReadOptional(config, kTokenizerConfigLimits.max_bytes));
  MOBI_ASSIGN_OR_RETURN(
      std::unique_ptr<TokenizerPipeline> pipeline,
      ParseTokenizer(tokenizer.text(), file.string(), config_json, config.string()));
  // Where it exists it counts, not the config's.
  MOBI_ASSIGN_OR_RETURN(std::string chat_template,
                        ReadOptional(folder / "chat_template.jinja", kMaxTemplateBytes));
  if (!chat_template.empty()) pipeline->chat_template = std::move(chat_template);
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(pipeline)));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view tokenizer_json,
                                                            std::string_view file,
                                                            std::string_view config_json,
                                                            std::string_view config_file) {
  MOBI_ASSIGN_OR_RETURN(std::unique_ptr<TokenizerPipeline> pipeline,
                        ParseTokenizer(tokenizer_json, file, config_json, config_file));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(pipeline)));
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text,
                                                       const EncodeOptions& options) const {
  MOBI_RETURN_IF_ERROR(CheckLength(text.size()));
  std::vector<int32_t> ids;
  if (options.add_special_tokens) ids = pipeline_->prefix;
  EncodeRun run(*pipeline_, ids);
  if (IsValidUtf8(text)) {
    MOBI_RETURN_IF_ERROR(run.Add(text, true, options.parse_special));
  } else {
    MOBI_RETURN_IF_ERROR(run.Add(ReplaceIllFormedUtf8(text), true, options.parse_special));
  }
  if (options.add_special_tokens) {
    ids.insert(ids.end(), pipeline_->suffix.begin(), pipeline_->suffix.end());
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::EncodeParts(
    absl::Span<const PromptPart> parts) const {
  std::vector<int32_t> ids;
  EncodeRun run(*pipeline_, ids);
  std::string text;  // of neighbouring parts: a cut between them is not a cut in the text
  size_t bytes = 0;
  bool at_start = true;
  const auto flush = [&] {
    if (text.empty()) return absl::OkStatus();
    const absl::Status status = run.Add(ReplaceIllFormedUtf8(text), at_start, false);
    text.clear();
    at_start = false;
    return status;
  };
  for (const PromptPart& part : parts) {
    if (!part.token.has_value()) {
      bytes += part.text.size();
      MOBI_RETURN_IF_ERROR(CheckLength(bytes));
      text += part.text;
      continue;
    }
    if (*part.token < 0 || *part.token >= vocab_size()) {
      return absl::InvalidArgumentError(absl::StrFormat("token %d is not in the vocabulary (0..%d)",
                                                        *part.token, vocab_size() - 1));
    }
    MOBI_RETURN_IF_ERROR(flush());
    ids.push_back(*part.token);
    at_start = false;
  }
  MOBI_RETURN_IF_ERROR(flush());
  return ids;
}

std::string Tokenizer::Decode(absl::Span<const int32_t> ids, bool skip_special) const {
  Detokenizer detokenizer(*this, {.skip_special = skip_special});
  std::string text;
  for (const int32_t id : ids) text += detokenizer.Push(id);
  text += detokenizer.Flush();
  return text;
}

int Tokenizer::vocab_size() const { return static_cast<int>(pipeline_->tokens.size()); }

std::string_view Tokenizer::Token(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return {};
  return pipeline_->tokens[id].text;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return {};
  return pipeline_->tokens[id].bytes;
}

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && pipeline_->tokens[id].special;
}

std::optional<int32_t> Tokenizer::TokenId(std::string_view token) const {
  const auto added = pipeline_->added_ids.find(absl::string_view(token.data(), token.size()));
  if (added != pipeline_->added_ids.end()) return added->second;
  return pipeline_->model->Find(token);
}

std::optional<int32_t> Tokenizer::bos_id() const { return pipeline_->bos_id; }
std::optional<int32_t> Tokenizer::eos_id() const { return pipeline_->eos_id; }
std::string_view Tokenizer::chat_template() const { return pipeline_->chat_template; }

}  // namespace mobi
