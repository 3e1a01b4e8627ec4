#include "engine/tokenizer_file.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "engine/tokenizer_utf8.h"

namespace mobi {
namespace {

using nlohmann::json;

constexpr int64_t kMaxId = (1 << 24) - 1;
constexpr size_t kMaxAddedTokenBytes = 512;

std::string Quoted(std::string_view token) { return JsonExcerpt(json(token)); }

absl::StatusOr<BpeVocab> ParseVocab(const JsonObject& model) {
  MOBI_ASSIGN_OR_RETURN(const JsonObject object, model.Object("vocab"));
  BpeVocab vocab;
  vocab.reserve(object.value().size());
  for (auto entry = object.value().begin(); entry != object.value().end(); ++entry) {
    MOBI_ASSIGN_OR_RETURN(const int64_t id, object.Int(entry.key(), 0, kMaxId));
    vocab.emplace(entry.key(), static_cast<int32_t>(id));
  }
  if (vocab.empty()) return model.Error("vocab", "empty");
  return vocab;
}

absl::StatusOr<std::vector<AddedToken>> ParseAddedTokens(const JsonObject& root) {
  std::vector<AddedToken> tokens;
  if (!root.Has("added_tokens")) return tokens;
  MOBI_ASSIGN_OR_RETURN(const json* list, root.Array("added_tokens"));
  for (size_t i = 0; i < list->size(); ++i) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject object, root.Element("added_tokens", i));
    AddedToken token;
    MOBI_ASSIGN_OR_RETURN(const int64_t id, object.Int("id", 0, kMaxId));
    token.id = static_cast<int32_t>(id);
    MOBI_ASSIGN_OR_RETURN(token.content, object.String("content"));
    if (token.content.empty()) return object.Error("content", "empty");
    if (token.content.size() > kMaxAddedTokenBytes) {
      return object.Error("content", "longer than 512 bytes");
    }
    MOBI_ASSIGN_OR_RETURN(token.special, object.Bool("special"));
    MOBI_ASSIGN_OR_RETURN(token.normalized, object.Bool("normalized"));
    MOBI_ASSIGN_OR_RETURN(token.single_word, object.Bool("single_word"));
    MOBI_ASSIGN_OR_RETURN(token.lstrip, object.Bool("lstrip"));
    MOBI_ASSIGN_OR_RETURN(token.rstrip, object.Bool("rstrip"));
    tokens.push_back(std::move(token));
  }
  return tokens;
}

// Puts every token in its place: ids are 0..n-1, each once.
absl::Status PlaceTokens(const JsonObject& root, const BpeVocab& vocab,
                         absl::Span<const AddedToken> added, TokenizerPipeline& pipeline) {
  for (const AddedToken& token : added) {
    const auto in_vocab = vocab.find(token.content);
    if (in_vocab != vocab.end() && in_vocab->second != token.id) {
      return root.Error("added_tokens",
                        absl::StrFormat("%s has id %d here and %d in model.vocab",
                                        Quoted(token.content), token.id, in_vocab->second));
    }
    if (!pipeline.added_ids.emplace(token.content, token.id).second) {
      return root.Error("added_tokens", Quoted(token.content) + " is listed twice");
    }
  }
  const size_t beyond_vocab =
      static_cast<size_t>(std::count_if(added.begin(), added.end(), [&](const AddedToken& token) {
        return !vocab.contains(token.content);
      }));
  pipeline.tokens.resize(vocab.size() + beyond_vocab);
  const auto place = [&](std::string_view field, const std::string& text, int32_t id) {
    if (static_cast<size_t>(id) >= pipeline.tokens.size()) {
      return root.Error(field, absl::StrFormat("%s has id %d, but there are only %d tokens: the "
                                               "ids have holes",
                                               Quoted(text), id, pipeline.tokens.size()));
    }
    std::string& taken = pipeline.tokens[id].text;
    if (!taken.empty()) {
      return root.Error(field, absl::StrFormat("id %d belongs to both %s and %s", id, Quoted(taken),
                                               Quoted(text)));
    }
    taken = text;
    return absl::OkStatus();
  };
  for (const auto& [text, id] : vocab) {
    if (text.empty()) return root.Error("model.vocab", "an empty token");
    MOBI_RETURN_IF_ERROR(place("model.vocab", text, id));
  }
  for (const AddedToken& token : added) {
    if (!vocab.contains(token.content)) {
      MOBI_RETURN_IF_ERROR(place("added_tokens", token.content, token.id));
    }
    pipeline.tokens[token.id].special = token.special;
  }
  return absl::OkStatus();
}

// "left right" or ["left", "right"].
std::optional<std::pair<std::string, std::string>> SplitMerge(const json& merge) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    return std::pair(merge[0].get<std::string>(), merge[1].get<std::string>());
  }
  if (!merge.is_string()) return std::nullopt;
  const std::string text = merge.get<std::string>();
  const size_t space = text.find(' ');
  if (space == text.npos || text.find(' ', space + 1) != text.npos) return std::nullopt;
  return std::pair(text.substr(0, space), text.substr(space + 1));
}

absl::StatusOr<std::vector<BpeMerge>> ParseMerges(const JsonObject& model, const BpeVocab& vocab,
                                                  const TokenizerPipeline& pipeline) {
  MOBI_ASSIGN_OR_RETURN(const json* list, model.Array("merges"));
  std::vector<BpeMerge> merges;
  merges.reserve(list->size());
  for (size_t i = 0; i < list->size(); ++i) {
    const json& entry = (*list)[i];
    if (entry.is_string() && absl::StartsWith(entry.get_ref<const std::string&>(), "#version")) {
      continue;
    }
    const std::string field = absl::StrFormat("merges[%d]", i);
    const auto parts = SplitMerge(entry);
    if (!parts.has_value() || parts->first.empty() || parts->second.empty()) {
      return model.Error(field, "not a pair of tokens");
    }
    const std::string texts[] = {parts->first, parts->second, parts->first + parts->second};
    int32_t ids[3];
    for (int t = 0; t < 3; ++t) {
      const auto found = vocab.find(texts[t]);
      if (found == vocab.end()) return model.Error(field, Quoted(texts[t]) + " is not in vocab");
      ids[t] = found->second;
    }
    // Plain text must never spell a control token.
    if (!pipeline.tokens[ids[2]].special) merges.push_back({ids[0], ids[1], ids[2]});
  }
  return merges;
}

absl::StatusOr<BpeOptions> ParseBpeOptions(const JsonObject& model, const BpeVocab& vocab) {
  MOBI_ASSIGN_OR_RETURN(const std::string type, model.String("type"));
  if (type != "BPE") {
    return model.Error("type", JsonExcerpt(*model.Find("type")) + " is not supported (BPE is)");
  }
  MOBI_ASSIGN_OR_RETURN(const double dropout, model.NumberOr("dropout", 0, 1, 0));
  if (dropout != 0) return model.Error("dropout", "only null and 0 are supported");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    MOBI_ASSIGN_OR_RETURN(const std::string affix, model.StringOr(key, ""));
    if (!affix.empty()) return model.Error(key, "only null and \"\" are supported");
  }
  BpeOptions options;
  if (model.Has("unk_token")) {
    MOBI_ASSIGN_OR_RETURN(const std::string unk, model.String("unk_token"));
    const auto found = vocab.find(unk);
    if (found == vocab.end()) return model.Error("unk_token", Quoted(unk) + " is not in vocab");
    options.unk_id = found->second;
  }
  MOBI_ASSIGN_OR_RETURN(options.fuse_unk, model.BoolOr("fuse_unk", false));
  MOBI_ASSIGN_OR_RETURN(options.byte_fallback, model.BoolOr("byte_fallback", false));
  MOBI_ASSIGN_OR_RETURN(options.ignore_merges, model.BoolOr("ignore_merges", false));
  return options;
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The byte of "<0xNN>", or -1.
int ByteOfToken(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  const int high = HexDigit(token[3]);
  const int low = HexDigit(token[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

void SpellTokens(TokenizerPipeline& pipeline) {
  for (TokenizerPipeline::Token& token : pipeline.tokens) {
    if (pipeline.decoder.byte_level) {
      token.bytes = ByteLevelBytes(token.text);
      continue;
    }
    token.bytes = token.text;
    for (const Replace& replace : pipeline.decoder.replace) {
      token.bytes = Normalize({replace}, token.bytes);
    }
    const int byte = pipeline.decoder.byte_fallback ? ByteOfToken(token.bytes) : -1;
    token.byte_token = byte >= 0;
    if (token.byte_token) token.bytes.assign(1, static_cast<char>(byte));
  }
}

void BuildMatchers(std::vector<AddedToken> added, TokenizerPipeline& pipeline) {
  std::vector<AddedToken> raw;
  std::vector<AddedToken> normalized;
  for (AddedToken& token : added) {
    if (!token.normalized) {
      raw.push_back(std::move(token));
      continue;
    }
    // Looked for in normalized text, so as its normalized self.
    token.content = Normalize(pipeline.normalizer, token.content);
    if (!token.content.empty()) normalized.push_back(std::move(token));
  }
  pipeline.raw_matcher = AddedTokenMatcher(std::move(raw));
  pipeline.normalized_matcher = AddedTokenMatcher(std::move(normalized));
}

absl::Status ParseModel(const JsonObject& root, absl::Span<const AddedToken> added,
                        TokenizerPipeline& pipeline) {
  MOBI_ASSIGN_OR_RETURN(const JsonObject model, root.Object("model"));
  MOBI_ASSIGN_OR_RETURN(BpeVocab vocab, ParseVocab(model));
  MOBI_ASSIGN_OR_RETURN(const BpeOptions options, ParseBpeOptions(model, vocab));
  MOBI_RETURN_IF_ERROR(PlaceTokens(root, vocab, added, pipeline));
  MOBI_ASSIGN_OR_RETURN(const std::vector<BpeMerge> merges, ParseMerges(model, vocab, pipeline));
  for (const AddedToken& token : added) {
    if (token.special) vocab.erase(token.content);
  }
  pipeline.model = std::make_unique<BpeModel>(std::move(vocab), merges, options);
  return absl::OkStatus();
}

// The id of a token that the config names by its text or as {"content": text}.
absl::Status ParseNamedToken(const JsonObject& config, std::string_view key,
                             const TokenizerPipeline& pipeline, std::optional<int32_t>& id) {
  if (!config.Has(key)) return absl::OkStatus();
  std::string text;
  if (config.Find(key)->is_object()) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject token, config.Object(key));
    MOBI_ASSIGN_OR_RETURN(text, token.String("content"));
  } else {
    MOBI_ASSIGN_OR_RETURN(text, config.String(key));
  }
  if (const auto added = pipeline.added_ids.find(text); added != pipeline.added_ids.end()) {
    id = added->second;
  } else {
    id = pipeline.model->Find(text);
  }
  if (!id.has_value()) return config.Error(key, Quoted(text) + " is not in the vocabulary");
  return absl::OkStatus();
}

// A text, or a list of {"name", "template"} of which "default" counts.
absl::Status ParseChatTemplate(const JsonObject& config, std::string& chat_template) {
  constexpr std::string_view kKey = "chat_template";
  if (!config.Has(kKey)) return absl::OkStatus();
  if (!config.Find(kKey)->is_array()) {
    MOBI_ASSIGN_OR_RETURN(chat_template, config.String(kKey));
    return absl::OkStatus();
  }
  for (size_t i = 0; i < config.Find(kKey)->size(); ++i) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject named, config.Element(kKey, i));
    MOBI_ASSIGN_OR_RETURN(const std::string name, named.String("name"));
    if (name != "default") continue;
    MOBI_ASSIGN_OR_RETURN(chat_template, named.String("template"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenizerPipeline>> ParseTokenizer(std::string_view tokenizer_json,
                                                                  std::string_view file,
                                                                  std::string_view config_json,
                                                                  std::string_view config_file) {
  MOBI_ASSIGN_OR_RETURN(const json document, ParseJson(tokenizer_json, file, kTokenizerJsonLimits));
  MOBI_ASSIGN_OR_RETURN(const JsonObject root, JsonObject::Of(document, file));
  MOBI_ASSIGN_OR_RETURN(const std::string version, root.StringOr("version", "1.0"));
  if (version != "1.0")
    return root.Error("version", Quoted(version) + " is not supported (1.0 is)");

  auto pipeline = std::make_unique<TokenizerPipeline>();
  MOBI_ASSIGN_OR_RETURN(std::vector<AddedToken> added, ParseAddedTokens(root));
  MOBI_RETURN_IF_ERROR(ParseModel(root, added, *pipeline));
  MOBI_ASSIGN_OR_RETURN(pipeline->normalizer, ParseNormalizer(root));
  MOBI_ASSIGN_OR_RETURN(pipeline->pre_tokenizer, ParsePreTokenizer(root));
  MOBI_ASSIGN_OR_RETURN(pipeline->decoder, ParseDecoder(root));
  MOBI_RETURN_IF_ERROR(ParsePostProcessor(root, *pipeline));
  SpellTokens(*pipeline);
  BuildMatchers(std::move(added), *pipeline);

  if (pipeline->prefix.size() == 1) pipeline->bos_id = pipeline->prefix[0];
  if (config_json.empty()) return pipeline;
  MOBI_ASSIGN_OR_RETURN(const json config_document,
                        ParseJson(config_json, config_file, kTokenizerConfigLimits));
  MOBI_ASSIGN_OR_RETURN(const JsonObject config, JsonObject::Of(config_document, config_file));
  MOBI_RETURN_IF_ERROR(ParseNamedToken(config, "bos_token", *pipeline, pipeline->bos_id));
  MOBI_RETURN_IF_ERROR(ParseNamedToken(config, "eos_token", *pipeline, pipeline->eos_id));
  MOBI_RETURN_IF_ERROR(ParseChatTemplate(config, pipeline->chat_template));
  return pipeline;
}

}  // namespace mobi
