#include <cstdlib>

#include "engine/detokenizer.h"
#include "engine/tokenizer.h"
#include "engine/tokenizer_utf8.h"
#include "tests/fuzz/fuzz_target.h"

namespace {

void Require(bool condition) {
  if (!condition) abort();
}

// What a tokenizer promises whatever its file says.
void CheckPromises(const mobi::Tokenizer& tokenizer) {
  Require(tokenizer.vocab_size() > 0);
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) Require(!tokenizer.Token(id).empty());
  for (const bool parse_special : {false, true}) {
    const auto ids = tokenizer.Encode("ab<s> c\xC3\xA9\n\xFF  b<0x0A>a", {true, parse_special});
    if (!ids.ok()) continue;
    mobi::Detokenizer detokenizer(tokenizer, {.skip_special = false});
    std::string text;
    for (const int32_t id : *ids) {
      Require(id >= 0 && id < tokenizer.vocab_size());
      text += detokenizer.Push(id);
      Require(mobi::IsValidUtf8(text));
    }
    text += detokenizer.Flush();
    Require(text == tokenizer.Decode(*ids, false));
    Require(mobi::IsValidUtf8(text));
  }
}

}  // namespace

namespace mobi {

bool FuzzOne(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto tokenizer = Tokenizer::Parse(text, "fuzz");
  if (!tokenizer.ok()) {
    Require(tokenizer.status().message().find('\n') == absl::string_view::npos);
    return false;
  }
  CheckPromises(**tokenizer);
  return true;
}

std::vector<std::string> FuzzSeeds() {
  return {
      R"({"version": "1.0",
          "added_tokens": [{"id": 5, "content": "<s>", "special": true, "normalized": false,
                            "single_word": false, "lstrip": false, "rstrip": true}],
          "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": " ?\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)|[^\\s\\r]"},
             "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": true, "use_regex": true}]},
          "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}},
          "decoder": {"type": "ByteLevel"},
          "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4},
                    "merges": ["a b", ["ab", "c"]], "ignore_merges": true}})",
      R"({"added_tokens": [{"id": 0, "content": "?", "special": true, "normalized": true,
                            "single_word": true, "lstrip": true, "rstrip": false}],
          "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "_"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "_"}]},
          "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
          "model": {"type": "BPE", "unk_token": "?", "fuse_unk": true, "byte_fallback": true,
                    "vocab": {"?": 0, "<0xC3>": 1, "<0xA9>": 2, "_": 3, "a": 4, "b": 5, "_a": 6,
                              "ab": 7, "_ab": 8},
                    "merges": ["_ a", "a b", "_a b", "_ ab"]}})",
      R"({"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first",
                            "split": true},
          "decoder": {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
          "model": {"type": "BPE", "vocab": {"_": 0, "a": 1, "_a": 2}, "merges": ["_ a"]}})"};
}

}  // namespace mobi
