// Files that lie: each is refused with one line that names file, field and reason.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>

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
  const char* what;
  std::function<void(json&)> tell;
  const char* message;  // after the file's name
};

json Step(const char* text) { return json::parse(text); }

// Values by path: what is set there, and what the error says.
std::vector<Lie> Lies() {
  const auto set = [](const char* path, json value) {
    return [path, value](json& file) { file[json::json_pointer(path)] = value; };
  };
  const auto erase = [](const char* parent, const char* key) {
    return [parent, key](json& file) { file[json::json_pointer(parent)].erase(key); };
  };
  return {
      {"version", set("/version", "2.0"), "version: \"2.0\" is not supported"},
      {"version type", set("/version", 1), "version: 1 is not a string"},
      {"no model", erase("", "model"), "model: missing"},
      {"model type", set("/model", "BPE"), "model: \"BPE\" is not an object"},
      {"WordPiece", set("/model/type", "WordPiece"),
       "model.type: \"WordPiece\" is not supported (BPE is)"},
      {"dropout", set("/model/dropout", 0.1), "model.dropout: only null and 0 are supported"},
      {"prefix", set("/model/continuing_subword_prefix", "##"),
       "model.continuing_subword_prefix: only"},
      {"suffix", set("/model/end_of_word_suffix", "</w>"), "model.end_of_word_suffix: only"},
      {"flag type", set("/model/byte_fallback", "yes"),
       "model.byte_fallback: \"yes\" is not true or false"},
      {"unk unknown", set("/model/unk_token", "?"), "model.unk_token: \"?\" is not in vocab"},
      {"vocab list", set("/model/vocab", json::array()), "model.vocab: a list is not an object"},
      {"vocab empty", set("/model/vocab", json::object()), "model.vocab: empty"},
      {"empty token", set("/model/vocab/", 6), "model.vocab: an empty token"},
      {"id type", set("/model/vocab/a", "0"), "model.vocab.a: \"0\" is not an integer"},
      {"id float", set("/model/vocab/a", 0.5), "model.vocab.a: 0.5 is not an integer"},
      {"id negative", set("/model/vocab/a", -1), "model.vocab.a: -1 is not in 0.."},
      {"id giant", set("/model/vocab/a", uint64_t{1} << 63), "model.vocab.a: "},
      {"id twice", set("/model/vocab/a", 1), "model.vocab: id 1 belongs to both"},
      {"hole", set("/model/vocab/abc", 1000000),
       "model.vocab: \"abc\" has id 1000000, but there are only 6 tokens: the ids have holes"},
      {"merges missing", erase("/model", "merges"), "model.merges: missing"},
      {"merges object", set("/model/merges", json::object()), "model.merges: an object is not a"},
      {"merge number", set("/model/merges/0", 7), "model.merges[0]: not a pair of tokens"},
      {"merge of three", set("/model/merges/0", "a b c"), "model.merges[0]: not a pair of tokens"},
      {"merge of one", set("/model/merges/0", "ab"), "model.merges[0]: not a pair of tokens"},
      {"merge empty side", set("/model/merges/1", {"", "a"}), "model.merges[1]: not a pair"},
      {"merge list of one", set("/model/merges/1", json::array({"a"})),
       "model.merges[1]: not a pair of tokens"},
      {"merge unknown left", set("/model/merges/1", {"x", "a"}),
       "model.merges[1]: \"x\" is not in vocab"},
      {"merge unknown right", set("/model/merges/1", "a x"),
       "model.merges[1]: \"x\" is not in vocab"},
      {"merge unknown result", set("/model/merges/1", "b a"),
       "model.merges[1]: \"ba\" is not in vocab"},
      {"added not a list", set("/added_tokens", 3), "added_tokens: 3 is not a list"},
      {"added not objects", set("/added_tokens/0", "x"), "added_tokens[0]: \"x\" is not an object"},
      {"added field", erase("/added_tokens/0", "lstrip"), "added_tokens[0].lstrip: missing"},
      {"added flag", set("/added_tokens/0/special", 1), "added_tokens[0].special: 1 is not true"},
      {"added empty", set("/added_tokens/0/content", ""), "added_tokens[0].content: empty"},
      {"added long", set("/added_tokens/0/content", std::string(600, 'x')),
       "added_tokens[0].content: longer than 512 bytes"},
      {"added other id", set("/added_tokens/0/content", "a"),
       "added_tokens: \"a\" has id 5 here and 0 in model.vocab"},
      {"added taken id", set("/added_tokens/0/id", 3), "added_tokens: id 3 belongs to both"},
      {"added hole", set("/added_tokens/0/id", 6), "added_tokens: \"<s>\" has id 6, but there are"},
      {"added twice", [](json& f) { f["added_tokens"].push_back(f["added_tokens"][0]); },
       "added_tokens: \"<s>\" is listed twice"},
      {"normalizer", set("/normalizer", Step(R"({"type": "NFKC"})")),
       "normalizer.type: normalizer \"NFKC\" is not supported"},
      {"normalizer type", set("/normalizer", "NFC"), "normalizer: \"NFC\" is not an object"},
      {"normalizer regex",
       set("/normalizer", Step(R"({"type": "Replace", "pattern": {"Regex": "x"}, "content": ""})")),
       "normalizer.pattern: only {\"String\": ...} is supported"},
      {"normalizer empty pattern",
       set("/normalizer", Step(R"({"type": "Replace", "pattern": {"String": ""}, "content": ""})")),
       "normalizer.pattern.String: empty"},
      {"normalizer bomb",
       set("/normalizer", {{"type", "Prepend"}, {"prepend", std::string(1000, 'x')}}),
       "normalizer.prepend: longer than 64 bytes"},
      {"too many steps",
       [](json& f) {
         f["normalizer"] = {{"type", "Sequence"}, {"normalizers", json::array()}};
         for (int i = 0; i < 17; ++i) {
           f["normalizer"]["normalizers"].push_back({{"type", "Prepend"}, {"prepend", "x"}});
         }
       },
       "normalizer.normalizers[16].type: more than 16 steps"},
      {"nested steps",
       [](json& f) {
         json step = {{"type", "Prepend"}, {"prepend", "x"}};
         for (int i = 0; i < 6; ++i) step = {{"type", "Sequence"}, {"normalizers", {step}}};
         f["normalizer"] = step;
       },
       "normalizer.normalizers[0].normalizers[0].normalizers[0].normalizers[0].normalizers: a "
       "Sequence nested too deep"},
      {"pre_tokenizer", set("/pre_tokenizer", Step(R"({"type": "BertPreTokenizer"})")),
       "pre_tokenizer.type: pre_tokenizer \"BertPreTokenizer\" is not supported"},
      {"no type", erase("/pre_tokenizer/pretokenizers/0", "type"),
       "pre_tokenizer.pretokenizers[0].type: missing"},
      {"behavior", set("/pre_tokenizer/pretokenizers/0/behavior", "Removed"),
       "pre_tokenizer.pretokenizers[0].behavior: \"Removed\" is not supported"},
      {"invert", set("/pre_tokenizer/pretokenizers/0/invert", true),
       "pre_tokenizer.pretokenizers[0].invert: true is not supported"},
      {"string pattern", set("/pre_tokenizer/pretokenizers/0/pattern", Step(R"({"String": " "})")),
       "pre_tokenizer.pretokenizers[0].pattern: only {\"Regex\": ...} is supported"},
      {"bad regex", set("/pre_tokenizer/pretokenizers/0/pattern/Regex", "a("),
       "pre_tokenizer.pretokenizers[0].pattern.Regex: not a regex: missing closing parenthesis"},
      {"other regex", set("/pre_tokenizer/pretokenizers/0/pattern/Regex", "\\h"),
       "pre_tokenizer.pretokenizers[0].pattern.Regex: \"\\\\h\" is not supported in a regex"},
      {"metaspace of two",
       set("/pre_tokenizer", Step(R"({"type": "Metaspace", "replacement": "__"})")),
       "pre_tokenizer.replacement: not one character"},
      {"metaspace scheme",
       set("/pre_tokenizer",
           Step(R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "last"})")),
       "pre_tokenizer.prepend_scheme: \"last\" is not one of always, first, never"},
      {"metaspace contradiction",
       set("/pre_tokenizer", Step(R"({"type": "Metaspace", "replacement": "_",
                                      "prepend_scheme": "first", "add_prefix_space": false})")),
       "pre_tokenizer.add_prefix_space: false contradicts prepend_scheme"},
      {"post_processor", set("/post_processor", Step(R"({"type": "RobertaProcessing"})")),
       "post_processor.type: post_processor \"RobertaProcessing\" is not supported"},
      {"template without text", [](json& f) { f["post_processor"]["single"].erase(1); },
       "post_processor.single: must have the Sequence A once"},
      {"template with B", set("/post_processor/single/1/Sequence/id", "B"),
       "post_processor.single[1].Sequence.id: only A is supported"},
      {"template piece", set("/post_processor/single/0", json::object()),
       "post_processor.single[0].SpecialToken: missing"},
      {"template unknown", set("/post_processor/single/0/SpecialToken/id", "<x>"),
       "post_processor.special_tokens.<x>: missing"},
      {"template id", set("/post_processor/special_tokens/<s>/ids/0", 6),
       "post_processor.special_tokens.<s>.ids: 6 is not an id of the vocabulary (0..5)"},
      {"template id type", set("/post_processor/special_tokens/<s>/ids/0", "5"),
       "post_processor.special_tokens.<s>.ids: \"5\" is not an id"},
      {"no decoder", set("/decoder", nullptr), "decoder: missing"},
      {"decoder", set("/decoder", Step(R"({"type": "WordPiece"})")),
       "decoder.type: decoder \"WordPiece\" is not supported"},
      {"decoder order", set("/decoder", Step(R"({"type": "Sequence", "decoders": [
         {"type": "Fuse"}, {"type": "ByteFallback"}]})")),
       "decoder.decoders[1].type: decoders other than in the order"},
      {"strip before fuse",
       set("/decoder", Step(R"({"type": "Strip", "content": " ", "start": 1, "stop": 0})")),
       "decoder.type: decoder \"Strip\" is not supported"},
      {"strip at the end",
       set("/decoder", Step(R"({"type": "Sequence", "decoders": [{"type": "Fuse"},
         {"type": "Strip", "content": " ", "start": 0, "stop": 1}]})")),
       "decoder.decoders[1].stop: only 0 is supported"},
      {"strip number", set("/decoder", Step(R"({"type": "Sequence", "decoders": [{"type": "Fuse"},
         {"type": "Strip", "content": " ", "start": -1, "stop": 0}]})")),
       "decoder.decoders[1].start: -1 is not in 0..1024"},
  };
}

TEST(TokenizerFile, LiesAreNamed) {
  for (const Lie& lie : Lies()) {
    json file = Small();
    lie.tell(file);
    const absl::Status status = StatusOf(file);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << lie.what;
    const std::string message(status.message());
    EXPECT_THAT(message, StartsWith(std::string("dir/tokenizer.json: ") + lie.message)) << lie.what;
    EXPECT_EQ(message.find('\n'), message.npos) << lie.what;
  }
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

// Whatever is done to the bytes of a file, it is refused or it makes a tokenizer that works.
TEST(TokenizerFile, DamagedFilesNeverCrash) {
  std::mt19937 random(17);
  const std::string whole = Small().dump();
  const std::string llama2 = ReadText(SourcePath("tests/testdata/tokenizer_llama2.json"));
  int refused = 0;
  constexpr int kRounds = 4000;
  for (int round = 0; round < kRounds; ++round) {
    std::string text = round % 40 == 0 ? llama2 : whole;
    std::uniform_int_distribution<size_t> at(0, text.size() - 1);
    for (int n = std::uniform_int_distribution<int>(1, 3)(random); n > 0; --n) {
      const size_t begin = std::min(at(random), text.size() - 1);
      const size_t length = std::min(text.size() - begin, at(random) % 12);
      switch (std::uniform_int_distribution<int>(0, 3)(random)) {
        case 0:
          text[begin] = static_cast<char>(at(random));
          break;
        case 1:
          text.erase(begin, length);
          break;
        case 2:
          text.insert(begin, text.substr(at(random) % text.size(), length));
          break;
        default:
          text[begin] = "0123456789-{}[],:\"\\eE."[at(random) % 22];
      }
    }
    const auto tokenizer = Tokenizer::Parse(text, "t.json");
    if (!tokenizer.ok()) {
      ++refused;
      EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(tokenizer.status().message()), StartsWith("t.json: "));
      continue;
    }
    const auto ids = (*tokenizer)->Encode("abc ab<s>c \xC3\xA9 the", {.parse_special = true});
    if (ids.ok()) (*tokenizer)->Decode(*ids, false);
  }
  EXPECT_GT(refused, kRounds / 2);
  EXPECT_LT(refused, kRounds);
}

// A vocabulary of the size of Llama 3's loads within a second or so.
TEST(TokenizerFile, LargeVocabulariesLoadFast) {
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
  const auto begin = std::chrono::steady_clock::now();
  const auto tokenizer = Tokenizer::Parse(text, "t.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto elapsed = std::chrono::steady_clock::now() - begin;
  EXPECT_LT(std::chrono::duration<double>(elapsed).count(), 10.0);
  EXPECT_EQ((*tokenizer)->vocab_size(), 128001);
}

}  // namespace
}  // namespace mobi
