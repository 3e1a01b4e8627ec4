// Files that lie: each is refused with one line that names file, field and reason.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/engine/tokenizer_test_data.h"

namespace mobi {
namespace {

using ::nlohmann::json;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// A tokenizer that is small enough to change by hand.
json Small() {
  return json::parse(R"({
    "version": "1.0",
    "added_tokens": [{"id": 5, "content": "<s>", "special": true, "normalized": false,
                      "single_word": false, "lstrip": false, "rstrip": false}],
    "normalizer": null,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
      {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": false},
      {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]},
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                 {"Sequence": {"id": "A", "type_id": 0}}],
      "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4},
              "merges": ["a b", ["ab", "c"]]}})");
}

absl::Status StatusOf(const json& file, const std::string& config = "") {
  return Tokenizer::Parse(file.dump(), "dir/tokenizer.json", config, "dir/tokenizer_config.json")
      .status();
}

TEST(TokenizerFile, TheSmallFileIsGood) {
  const auto tokenizer = MustParse(Small());
  ASSERT_NE(tokenizer, nullptr);
  const auto ids = tokenizer->Encode("abcab b");
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(*ids, (std::vector<int32_t>{5, 4, 3, 1}));  // the space has no token and no unk
}

struct Lie {
  const char* path;   // what is set, by JSON pointer
  const char* value;  // to what; nullptr: it is taken away
  const char* error;  // how the message goes on behind the file's name
};

constexpr Lie kLies[] = {
    {"/version", R"("2.0")", "version: \"2.0\" is not supported"},
    {"/version", "1", "version: 1 is not a string"},
    {"/model", nullptr, "model: missing"},
    {"/model", R"("BPE")", "model: \"BPE\" is not an object"},
    {"/model/type", R"("WordPiece")", "model.type: \"WordPiece\" is not supported (BPE is)"},
    {"/model/dropout", "0.1", "model.dropout: only null and 0 are supported"},
    {"/model/continuing_subword_prefix", R"("##")", "model.continuing_subword_prefix: only"},
    {"/model/end_of_word_suffix", R"("</w>")", "model.end_of_word_suffix: only"},
    {"/model/byte_fallback", R"("yes")", "model.byte_fallback: \"yes\" is not true or false"},
    {"/model/unk_token", R"("?")", "model.unk_token: \"?\" is not in vocab"},
    {"/model/vocab", "[]", "model.vocab: a list is not an object"},
    {"/model/vocab", "{}", "model.vocab: empty"},
    {"/model/vocab/", "6", "model.vocab: an empty token"},
    {"/model/vocab/a", R"("0")", "model.vocab.a: \"0\" is not an integer"},
    {"/model/vocab/a", "0.5", "model.vocab.a: 0.5 is not an integer"},
    {"/model/vocab/a", "-1", "model.vocab.a: -1 is not in 0.."},
    {"/model/vocab/a", "9223372036854775808", "model.vocab.a: 9223372036854775808 is not in 0.."},
    {"/model/vocab/a", "1", "model.vocab: id 1 belongs to both"},
    {"/model/vocab/abc", "1000000",
     "model.vocab: \"abc\" has id 1000000, but there are only 6 tokens: the ids have holes"},
    {"/model/merges", nullptr, "model.merges: missing"},
    {"/model/merges", "{}", "model.merges: an object is not a list"},
    {"/model/merges/0", "7", "model.merges[0]: not a pair of tokens"},
    {"/model/merges/0", R"("a b c")", "model.merges[0]: not a pair of tokens"},
    {"/model/merges/0", R"("ab")", "model.merges[0]: not a pair of tokens"},
    {"/model/merges/1", R"(["", "a"])", "model.merges[1]: not a pair of tokens"},
    {"/model/merges/1", R"(["a"])", "model.merges[1]: not a pair of tokens"},
    {"/model/merges/1", R"(["a", 1])", "model.merges[1]: not a pair of tokens"},
    {"/model/merges/1", R"(["x", "a"])", "model.merges[1]: \"x\" is not in vocab"},
    {"/model/merges/1", R"("a x")", "model.merges[1]: \"x\" is not in vocab"},
    {"/model/merges/1", R"("b a")", "model.merges[1]: \"ba\" is not in vocab"},
    {"/added_tokens", "3", "added_tokens: 3 is not a list"},
    {"/added_tokens/0", R"("x")", "added_tokens[0]: \"x\" is not an object"},
    {"/added_tokens/0/lstrip", nullptr, "added_tokens[0].lstrip: missing"},
    {"/added_tokens/0/special", "1", "added_tokens[0].special: 1 is not true or false"},
    {"/added_tokens/0/content", R"("")", "added_tokens[0].content: empty"},
    {"/added_tokens/0/content", R"("a")", "added_tokens: \"a\" has id 5 here and 0 in model.vocab"},
    {"/added_tokens/0/id", "3", "added_tokens: id 3 belongs to both"},
    {"/added_tokens/0/id", "6", "added_tokens: \"<s>\" has id 6, but there are only 6 tokens"},
    {"/normalizer", R"({"type": "NFKC"})", "normalizer.type: normalizer \"NFKC\" is not supported"},
    {"/normalizer", R"("NFC")", "normalizer: \"NFC\" is not an object"},
    {"/normalizer", R"({"type": "Replace", "pattern": {"Regex": "x"}, "content": ""})",
     "normalizer.pattern: only {\"String\": ...} is supported"},
    {"/normalizer", R"({"type": "Replace", "pattern": {"String": ""}, "content": ""})",
     "normalizer.pattern.String: empty"},
    {"/pre_tokenizer", R"({"type": "BertPreTokenizer"})",
     "pre_tokenizer.type: pre_tokenizer \"BertPreTokenizer\" is not supported"},
    {"/pre_tokenizer/pretokenizers/0/type", nullptr,
     "pre_tokenizer.pretokenizers[0].type: missing"},
    {"/pre_tokenizer/pretokenizers/0/behavior", R"("Removed")",
     "pre_tokenizer.pretokenizers[0].behavior: \"Removed\" is not supported"},
    {"/pre_tokenizer/pretokenizers/0/invert", "true",
     "pre_tokenizer.pretokenizers[0].invert: true is not supported"},
    {"/pre_tokenizer/pretokenizers/0/pattern", R"({"String": " "})",
     "pre_tokenizer.pretokenizers[0].pattern: only {\"Regex\": ...} is supported"},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("a(")",
     "pre_tokenizer.pretokenizers[0].pattern.Regex: not a regex: missing closing parenthesis"},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("\\h")",
     "pre_tokenizer.pretokenizers[0].pattern.Regex: \"\\\\h\" is not supported in a regex"},
    {"/pre_tokenizer", R"({"type": "Metaspace", "replacement": "__"})",
     "pre_tokenizer.replacement: not one character"},
    {"/pre_tokenizer", R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "last"})",
     "pre_tokenizer.prepend_scheme: \"last\" is not one of always, first, never"},
    {"/pre_tokenizer",
     R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "first",
         "add_prefix_space": false})",
     "pre_tokenizer.add_prefix_space: false contradicts prepend_scheme"},
    {"/post_processor", R"({"type": "RobertaProcessing"})",
     "post_processor.type: post_processor \"RobertaProcessing\" is not supported"},
    {"/post_processor/single/1", R"({"SpecialToken": {"id": "<s>"}})",
     "post_processor.single: must have the Sequence A once"},
    {"/post_processor/single/1/Sequence/id", R"("B")",
     "post_processor.single[1].Sequence.id: only A is supported"},
    {"/post_processor/single/0", "{}", "post_processor.single[0].SpecialToken: missing"},
    {"/post_processor/single/0/SpecialToken/id", R"("<x>")",
     "post_processor.special_tokens.<x>: missing"},
    {"/post_processor/special_tokens/<s>/ids/0", "6",
     "post_processor.special_tokens.<s>.ids: 6 is not an id of the vocabulary (0..5)"},
    {"/post_processor/special_tokens/<s>/ids/0", R"("5")",
     "post_processor.special_tokens.<s>.ids: \"5\" is not an id"},
    {"/decoder", "null", "decoder: missing"},
    {"/decoder", R"({"type": "WordPiece"})", "decoder.type: decoder \"WordPiece\" is not"},
    {"/decoder",
     R"({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]})",
     "decoder.decoders[1].type: decoders other than in the order"},
    {"/decoder", R"({"type": "Strip", "content": " ", "start": 1, "stop": 0})",
     "decoder.type: decoder \"Strip\" is not supported"},
    {"/decoder",
     R"({"type": "Sequence", "decoders": [{"type": "Fuse"},
         {"type": "Strip", "content": " ", "start": 0, "stop": 1}]})",
     "decoder.decoders[1].stop: only 0 is supported"},
    {"/decoder",
     R"({"type": "Sequence", "decoders": [{"type": "Fuse"},
         {"type": "Strip", "content": " ", "start": -1, "stop": 0}]})",
     "decoder.decoders[1].start: -1 is not in 0..1024"},
};

void ExpectRefused(const json& file, const std::string& error) {
  const absl::Status status = StatusOf(file);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << error;
  const std::string message(status.message());
  EXPECT_THAT(message, StartsWith("dir/tokenizer.json: " + error));
  EXPECT_EQ(message.find('\n'), message.npos) << error;
}

TEST(TokenizerFile, LiesAreNamed) {
  for (const Lie& lie : kLies) {
    json file = Small();
    const json::json_pointer path(lie.path);
    if (lie.value == nullptr) {
      file[path.parent_pointer()].erase(path.back());
    } else {
      file[path] = json::parse(lie.value);
    }
    ExpectRefused(file, lie.error);
  }
}

TEST(TokenizerFile, BombsAreNamed) {
  json file = Small();
  file["added_tokens"][0]["content"] = std::string(600, 'x');
  ExpectRefused(file, "added_tokens[0].content: longer than 512 bytes");

  file = Small();
  file["added_tokens"].push_back(file["added_tokens"][0]);
  ExpectRefused(file, "added_tokens: \"<s>\" is listed twice");

  file = Small();
  file["normalizer"] = {{"type", "Prepend"}, {"prepend", std::string(1000, 'x')}};
  ExpectRefused(file, "normalizer.prepend: longer than 64 bytes");

  json step = {{"type", "Prepend"}, {"prepend", "x"}};
  file["normalizer"] = {{"type", "Sequence"}, {"normalizers", std::vector<json>(17, step)}};
  ExpectRefused(file, "normalizer.normalizers[16].type: more than 16 steps");

  for (int i = 0; i < 6; ++i) step = {{"type", "Sequence"}, {"normalizers", {step}}};
  file["normalizer"] = step;
  ExpectRefused(file,
                "normalizer.normalizers[0].normalizers[0].normalizers[0].normalizers[0]"
                ".normalizers: a Sequence nested too deep");
}

TEST(TokenizerFile, ConfigsThatLieAreNamed) {
  const std::pair<const char*, const char*> configs[] = {
      {"[]", "a list is not an object"},
      {"{", "not valid JSON"},
      {R"({"bos_token": 1})", "bos_token: 1 is not a string"},
      {R"({"bos_token": "<x>"})", "bos_token: \"<x>\" is not in the vocabulary"},
      {R"({"eos_token": {"content": "<x>"}})", "eos_token: \"<x>\" is not in the vocabulary"},
      {R"({"eos_token": {}})", "eos_token.content: missing"},
      {R"({"chat_template": 1})", "chat_template: 1 is not a string"},
      {R"({"chat_template": [{"name": "default"}]})", "chat_template[0].template: missing"},
  };
  for (const auto& [config, message] : configs) {
    const absl::Status status = StatusOf(Small(), config);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << config;
    EXPECT_THAT(std::string(status.message()), StartsWith("dir/tokenizer_config.json: "));
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
  const auto named = MustParse(Small(), R"({"bos_token": null, "chat_template": [
      {"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]})");
  ASSERT_NE(named, nullptr);
  EXPECT_EQ(named->chat_template(), "d");
  EXPECT_EQ(named->bos_id(), 5);  // from the post-processor
  EXPECT_EQ(named->eos_id(), std::nullopt);
}

TEST(TokenizerFile, TextThatIsNoJsonIsRefused) {
  for (const std::string& text :
       {std::string(""), std::string("{"), std::string("\xFF"), std::string("nul"),
        std::string("{\"a\": 1, \"a\": 2}"), std::string("\0", 1), std::string(100000, '['),
        std::string("{\"model\": \"\xC3\"}"), std::string("1e999")}) {
    const absl::Status status = Tokenizer::Parse(text, "t.json").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text.substr(0, 40);
    EXPECT_THAT(std::string(status.message()), StartsWith("t.json: "));
    EXPECT_LT(status.message().size(), 300u);
  }
}

TEST(TokenizerFile, MissingAndOddPathsAreRefused) {
  EXPECT_EQ(Tokenizer::Load("/no/such/folder").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(Tokenizer::Load(SourcePath("tests")).status().message()),
              HasSubstr("tests/tokenizer.json"));
  EXPECT_EQ(Tokenizer::Load("/dev/zero").status().code(), absl::StatusCode::kInvalidArgument);
}

// A vocabulary of the size of Llama 3's loads within a second or so.
TEST(TokenizerFile, LargeVocabulariesLoad) {
  json file = Small();
  json vocab = json::object();
  json merges = json::array();
  for (char c = 'a'; c <= 'z'; ++c) vocab[std::string(1, c)] = vocab.size();
  std::vector<std::string> tokens;
  for (const auto& [token, id] : vocab.items()) tokens.push_back(token);
  for (size_t i = 0; vocab.size() < 128000; ++i) {
    for (char c = 'a'; c <= 'z' && vocab.size() < 128000; ++c) {
      const std::string token = tokens[i] + c;
      vocab[token] = vocab.size();
      merges.push_back({tokens[i], std::string(1, c)});
      tokens.push_back(token);
    }
  }
  file["model"]["vocab"] = vocab;
  file["model"]["merges"] = merges;
  file["added_tokens"][0]["id"] = vocab.size();
  file["post_processor"]["special_tokens"]["<s>"]["ids"][0] = vocab.size();
  const std::string text = file.dump();
  // Time quadratic in the vocabulary would run into the test's own limit.
  const auto tokenizer = Tokenizer::Parse(text, "t.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->vocab_size(), 128001);
}

}  // namespace
}  // namespace mobi
