// The normalizer, pre_tokenizer, post_processor and decoder of tokenizer.json. Each is null, one
// object with a "type", or a Sequence of such.
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "engine/tokenizer_file.h"
#include "engine/tokenizer_utf8.h"

namespace mobi {
namespace {

using nlohmann::json;

constexpr size_t kMaxSteps = 16;
constexpr size_t kMaxStepText = 64;  // bytes of a replacement or of what is replaced

// One step with its type, or all steps of a (nested) Sequence whose list is called `list`.
absl::Status Flatten(const JsonObject& step, std::string_view list, int depth,
                     std::vector<JsonObject>& steps) {
  MOBI_ASSIGN_OR_RETURN(const std::string type, step.String("type"));
  if (type != "Sequence") {
    if (steps.size() == kMaxSteps) return step.Error("type", "more than 16 steps");
    steps.push_back(step);
    return absl::OkStatus();
  }
  if (depth == 0) return step.Error(list, "a Sequence nested too deep");
  MOBI_ASSIGN_OR_RETURN(const json* elements, step.Array(list));
  for (size_t i = 0; i < elements->size(); ++i) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject element, step.Element(list, i));
    MOBI_RETURN_IF_ERROR(Flatten(element, list, depth - 1, steps));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<JsonObject>> Steps(const JsonObject& root, std::string_view key,
                                              std::string_view list) {
  std::vector<JsonObject> steps;
  if (!root.Has(key)) return steps;
  MOBI_ASSIGN_OR_RETURN(const JsonObject step, root.Object(key));
  MOBI_RETURN_IF_ERROR(Flatten(step, list, 4, steps));
  return steps;
}

absl::Status Unsupported(const JsonObject& step, std::string_view what, std::string_view known) {
  return step.Error("type", absl::StrFormat("%s %s is not supported (%s are)", what,
                                            JsonExcerpt(*step.Find("type")), known));
}

absl::StatusOr<std::string> ShortText(const JsonObject& step, std::string_view key,
                                      bool may_be_empty) {
  MOBI_ASSIGN_OR_RETURN(std::string text, step.String(key));
  if (text.empty() && !may_be_empty) return step.Error(key, "empty");
  if (text.size() > kMaxStepText) return step.Error(key, "longer than 64 bytes");
  return text;
}

absl::StatusOr<Replace> ParseReplace(const JsonObject& step) {
  MOBI_ASSIGN_OR_RETURN(const JsonObject pattern, step.Object("pattern"));
  if (!pattern.Has("String")) {
    return step.Error("pattern", "only {\"String\": ...} is supported in a Replace");
  }
  Replace replace;
  MOBI_ASSIGN_OR_RETURN(replace.pattern, ShortText(pattern, "String", false));
  MOBI_ASSIGN_OR_RETURN(replace.content, ShortText(step, "content", true));
  return replace;
}

absl::StatusOr<SplitRegex> ParseSplit(const JsonObject& step) {
  MOBI_ASSIGN_OR_RETURN(const std::string behavior, step.String("behavior"));
  if (behavior != "Isolated") {
    return step.Error("behavior",
                      JsonExcerpt(*step.Find("behavior")) + " is not supported (Isolated is)");
  }
  MOBI_ASSIGN_OR_RETURN(const bool invert, step.BoolOr("invert", false));
  if (invert) return step.Error("invert", "true is not supported");
  MOBI_ASSIGN_OR_RETURN(const JsonObject pattern, step.Object("pattern"));
  if (!pattern.Has("Regex")) return step.Error("pattern", "only {\"Regex\": ...} is supported");
  MOBI_ASSIGN_OR_RETURN(const std::string regex, pattern.String("Regex"));
  absl::StatusOr<SplitRegex> compiled = SplitRegex::Compile(regex);
  if (!compiled.ok()) return pattern.Error("Regex", std::string(compiled.status().message()));
  return compiled;
}

absl::Status ParseByteLevel(const JsonObject& step, std::vector<PreTokenizerStep>& steps) {
  MOBI_ASSIGN_OR_RETURN(const bool prefix_space, step.BoolOr("add_prefix_space", true));
  MOBI_ASSIGN_OR_RETURN(const bool use_regex, step.BoolOr("use_regex", true));
  if (prefix_space) steps.emplace_back(PrefixSpace{});
  if (use_regex) {
    MOBI_ASSIGN_OR_RETURN(SplitRegex regex, SplitRegex::Compile(ByteLevelPattern()));
    steps.emplace_back(std::move(regex));
  }
  steps.emplace_back(ByteLevel{});
  return absl::OkStatus();
}

absl::StatusOr<Metaspace> ParseMetaspace(const JsonObject& step) {
  Metaspace metaspace;
  MOBI_ASSIGN_OR_RETURN(metaspace.replacement, ShortText(step, "replacement", false));
  if (NextUtf8(metaspace.replacement).length != metaspace.replacement.size()) {
    return step.Error("replacement", "not one character");
  }
  MOBI_ASSIGN_OR_RETURN(metaspace.split, step.BoolOr("split", true));
  // Older files have add_prefix_space instead of prepend_scheme.
  MOBI_ASSIGN_OR_RETURN(const bool prefix_space, step.BoolOr("add_prefix_space", true));
  MOBI_ASSIGN_OR_RETURN(const std::string scheme,
                        step.StringOr("prepend_scheme", prefix_space ? "always" : "never"));
  if (scheme == "always") {
    metaspace.prepend = Metaspace::Prepend::kAlways;
  } else if (scheme == "first") {
    metaspace.prepend = Metaspace::Prepend::kFirst;
  } else if (scheme == "never") {
    metaspace.prepend = Metaspace::Prepend::kNever;
  } else {
    return step.Error("prepend_scheme", JsonExcerpt(*step.Find("prepend_scheme")) +
                                            " is not one of always, first, never");
  }
  if (!prefix_space && scheme != "never") {
    return step.Error("add_prefix_space", "false contradicts prepend_scheme");
  }
  return metaspace;
}

// The ids of one SpecialToken piece of a template.
absl::Status AppendSpecial(const JsonObject& processor, const std::string& name,
                           const TokenizerPipeline& pipeline, std::vector<int32_t>& ids) {
  MOBI_ASSIGN_OR_RETURN(const JsonObject specials, processor.Object("special_tokens"));
  MOBI_ASSIGN_OR_RETURN(const JsonObject special, specials.Object(name));
  MOBI_ASSIGN_OR_RETURN(const json* list, special.Array("ids"));
  for (const json& id : *list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= pipeline.tokens.size()) {
      return special.Error("ids", absl::StrFormat("%s is not an id of the vocabulary (0..%d)",
                                                  JsonExcerpt(id), pipeline.tokens.size() - 1));
    }
    ids.push_back(id.get<int32_t>());
  }
  return absl::OkStatus();
}

absl::Status ParseTemplate(const JsonObject& processor, TokenizerPipeline& pipeline) {
  MOBI_ASSIGN_OR_RETURN(const json* pieces, processor.Array("single"));
  if (pieces->size() > kMaxSteps) return processor.Error("single", "more than 16 pieces");
  int texts = 0;
  for (size_t i = 0; i < pieces->size(); ++i) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject piece, processor.Element("single", i));
    if (piece.Has("Sequence")) {
      MOBI_ASSIGN_OR_RETURN(const JsonObject sequence, piece.Object("Sequence"));
      MOBI_ASSIGN_OR_RETURN(const std::string id, sequence.String("id"));
      if (id != "A") return sequence.Error("id", "only A is supported in a single template");
      ++texts;
      continue;
    }
    MOBI_ASSIGN_OR_RETURN(const JsonObject special, piece.Object("SpecialToken"));
    MOBI_ASSIGN_OR_RETURN(const std::string name, special.String("id"));
    MOBI_RETURN_IF_ERROR(
        AppendSpecial(processor, name, pipeline, texts == 0 ? pipeline.prefix : pipeline.suffix));
  }
  if (texts != 1) return processor.Error("single", "must have the Sequence A once");
  return absl::OkStatus();
}

absl::Status ParseStrip(const JsonObject& step, Decoder& decoder) {
  MOBI_ASSIGN_OR_RETURN(const std::string content, step.String("content"));
  if (content.size() != 1) return step.Error("content", "only one ASCII character is supported");
  decoder.strip = content[0];
  MOBI_ASSIGN_OR_RETURN(const int64_t start, step.Int("start", 0, 1024));
  decoder.strip_left = static_cast<int>(start);
  MOBI_ASSIGN_OR_RETURN(const int64_t stop, step.Int("stop", 0, 1024));
  if (stop != 0) return step.Error("stop", "only 0 is supported");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<NormalizerStep>> ParseNormalizer(const JsonObject& root) {
  MOBI_ASSIGN_OR_RETURN(const std::vector<JsonObject> parts,
                        Steps(root, "normalizer", "normalizers"));
  std::vector<NormalizerStep> steps;
  for (const JsonObject& part : parts) {
    MOBI_ASSIGN_OR_RETURN(const std::string type, part.String("type"));
    if (type == "Prepend") {
      MOBI_ASSIGN_OR_RETURN(std::string text, ShortText(part, "prepend", true));
      steps.emplace_back(Prepend{std::move(text)});
    } else if (type == "Replace") {
      MOBI_ASSIGN_OR_RETURN(Replace replace, ParseReplace(part));
      steps.emplace_back(std::move(replace));
    } else {
      return Unsupported(part, "normalizer", "Prepend, Replace");
    }
  }
  return steps;
}

absl::StatusOr<std::vector<PreTokenizerStep>> ParsePreTokenizer(const JsonObject& root) {
  MOBI_ASSIGN_OR_RETURN(const std::vector<JsonObject> parts,
                        Steps(root, "pre_tokenizer", "pretokenizers"));
  std::vector<PreTokenizerStep> steps;
  for (const JsonObject& part : parts) {
    MOBI_ASSIGN_OR_RETURN(const std::string type, part.String("type"));
    if (type == "Split") {
      MOBI_ASSIGN_OR_RETURN(SplitRegex regex, ParseSplit(part));
      steps.emplace_back(std::move(regex));
    } else if (type == "ByteLevel") {
      MOBI_RETURN_IF_ERROR(ParseByteLevel(part, steps));
    } else if (type == "Metaspace") {
      MOBI_ASSIGN_OR_RETURN(Metaspace metaspace, ParseMetaspace(part));
      steps.emplace_back(std::move(metaspace));
    } else {
      return Unsupported(part, "pre_tokenizer", "Split, ByteLevel, Metaspace");
    }
  }
  return steps;
}

absl::StatusOr<Decoder> ParseDecoder(const JsonObject& root) {
  MOBI_ASSIGN_OR_RETURN(const std::vector<JsonObject> parts, Steps(root, "decoder", "decoders"));
  if (parts.empty()) return root.Error("decoder", "missing");
  Decoder decoder;
  bool fused = false;
  int stage = 0;  // Replace, ByteFallback, Fuse, Strip: each at most once, in this order
  for (const JsonObject& part : parts) {
    MOBI_ASSIGN_OR_RETURN(const std::string type, part.String("type"));
    int next = 0;
    if (type == "ByteLevel" && parts.size() == 1) {
      decoder.byte_level = true;
      return decoder;
    } else if (type == "Replace") {
      MOBI_ASSIGN_OR_RETURN(Replace replace, ParseReplace(part));
      decoder.replace.push_back(std::move(replace));
    } else if (type == "ByteFallback") {
      decoder.byte_fallback = true;
      next = 1;
    } else if (type == "Fuse") {
      fused = true;
      next = 2;
    } else if (type == "Strip" && fused) {
      MOBI_RETURN_IF_ERROR(ParseStrip(part, decoder));
      next = 3;
    } else {
      return Unsupported(part, "decoder",
                         "ByteLevel, or Replace, ByteFallback, Fuse, Strip in this order");
    }
    if (next < stage || (next == stage && next > 0)) {
      return part.Error("type",
                        "decoders other than in the order Replace, ByteFallback, Fuse, "
                        "Strip are not supported");
    }
    stage = next;
  }
  return decoder;
}

absl::Status ParsePostProcessor(const JsonObject& root, TokenizerPipeline& pipeline) {
  MOBI_ASSIGN_OR_RETURN(const std::vector<JsonObject> parts,
                        Steps(root, "post_processor", "processors"));
  bool templated = false;
  for (const JsonObject& part : parts) {
    MOBI_ASSIGN_OR_RETURN(const std::string type, part.String("type"));
    if (type == "ByteLevel") continue;  // only moves offsets
    if (type != "TemplateProcessing") {
      return Unsupported(part, "post_processor", "ByteLevel, TemplateProcessing");
    }
    if (templated) return part.Error("type", "a second TemplateProcessing");
    MOBI_RETURN_IF_ERROR(ParseTemplate(part, pipeline));
    templated = true;
  }
  return absl::OkStatus();
}

}  // namespace mobi
