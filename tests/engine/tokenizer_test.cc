#include "engine/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cctype>
#include <chrono>

#include "engine/tokenizer_bpe.h"
#include "engine/tokenizer_regex.h"
#include "engine/tokenizer_utf8.h"
#include "tests/engine/sanitized.h"
#include "tests/engine/tokenizer_test_data.h"

namespace mobi {
namespace {

using ::nlohmann::json;
using ::testing::HasSubstr;

constexpr EncodeOptions kParsed = {.add_special_tokens = false, .parse_special = true};
constexpr EncodeOptions kPlain = {.add_special_tokens = false, .parse_special = false};

std::vector<int32_t> MustEncode(const Tokenizer& tokenizer, std::string_view text,
                                const EncodeOptions& options) {
  const auto ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *ids : std::vector<int32_t>();
}

void ExpectGolden(const Tokenizer& tokenizer, const json& golden) {
  const std::string text = golden["text"];
  const std::vector<int32_t> ids = Ids(golden["ids"]);
  EXPECT_EQ(MustEncode(tokenizer, text, kParsed), ids) << golden["text"];
  EXPECT_EQ(MustEncode(tokenizer, text, kPlain),
            golden.contains("plain") ? Ids(golden["plain"]) : ids)
      << golden["text"];
  EXPECT_EQ(tokenizer.Decode(ids, false), golden["decoded"].get<std::string>()) << golden["text"];
  EXPECT_EQ(tokenizer.Decode(ids, true), golden["decoded_skip"].get<std::string>())
      << golden["text"];
}

void ExpectDecodes(const Tokenizer& tokenizer, const json& golden) {
  const std::vector<int32_t> ids = Ids(golden["ids"]);
  EXPECT_EQ(tokenizer.Decode(ids, false), golden["decoded"].get<std::string>()) << golden["ids"];
  EXPECT_EQ(tokenizer.Decode(ids, true), golden["decoded_skip"].get<std::string>())
      << golden["ids"];
}

// The lists that came with the reference models: ids with and without BOS, both decodings.
void ExpectReferenceList(const Tokenizer& tokenizer, const json& goldens) {
  ASSERT_EQ(goldens.size(), 268u);
  for (const json& golden : goldens) {
    const std::string text = golden["text"];
    EXPECT_EQ(MustEncode(tokenizer, text, kParsed), Ids(golden["ids"])) << golden["text"];
    EXPECT_EQ(MustEncode(tokenizer, text, {.add_special_tokens = true, .parse_special = true}),
              Ids(golden["ids_bos"]))
        << golden["text"];
    EXPECT_EQ(
        tokenizer.Decode(Ids(golden["ids_bos"]), false),
        std::string(tokenizer.Token(*tokenizer.bos_id())) + golden["decoded"].get<std::string>());
    EXPECT_EQ(tokenizer.Decode(Ids(golden["ids"]), false), golden["decoded"].get<std::string>());
    EXPECT_EQ(tokenizer.Decode(Ids(golden["ids"]), true),
              golden["decoded_skip"].get<std::string>());
  }
}

TEST(TokenizerGolden, DemoModel) {
  const auto tokenizer = MustLoad(DemoModel());
  ASSERT_NE(tokenizer, nullptr);
  ExpectReferenceList(*tokenizer, TestData("tokenizer_stories_llama_goldens.json"));
}

TEST(TokenizerGolden, WikiLlama) {
  const std::string folder = SourcePath("../shared/data/wiki-llama");
  const std::string goldens = SourcePath("../shared/data/goldens/wiki-llama_tokenizer.json");
  if (!std::filesystem::exists(folder) || !std::filesystem::exists(goldens)) {
    GTEST_SKIP() << "the wiki-llama tokenizer is not here";
  }
  const auto tokenizer = MustLoad(folder + "/tokenizer.json");
  ASSERT_NE(tokenizer, nullptr);
  ExpectReferenceList(*tokenizer, json::parse(ReadText(goldens)));
}

TEST(TokenizerGolden, ByteLevel) {
  const auto tokenizer = MustLoad(DemoModel());
  ASSERT_NE(tokenizer, nullptr);
  const json goldens = TestData("tokenizer_byte_level_goldens.json");
  for (const json& golden : goldens["strings"]) ExpectGolden(*tokenizer, golden);
  for (const json& golden : goldens["id_lists"]) ExpectDecodes(*tokenizer, golden);
}

TEST(TokenizerGolden, Llama2AndVariants) {
  const json base = TestData("tokenizer_llama2.json");
  const json goldens = TestData("tokenizer_llama2_goldens.json");
  ASSERT_GE(goldens["variants"].size(), 16u);
  for (const auto& [name, variant] : goldens["variants"].items()) {
    SCOPED_TRACE(name);
    const auto tokenizer = MustParse(ApplyPatch(base, variant["patch"]));
    ASSERT_NE(tokenizer, nullptr);
    for (const json& golden : variant["strings"]) ExpectGolden(*tokenizer, golden);
    for (const json& golden : variant["id_lists"]) ExpectDecodes(*tokenizer, golden);
  }
}

TEST(TokenizerGolden, InvalidUtf8CountsAsReplacementCharacters) {
  const auto tokenizer = MustParse(TestData("tokenizer_llama2.json"));
  ASSERT_NE(tokenizer, nullptr);
  const json goldens = TestData("tokenizer_llama2_goldens.json");
  for (const json& golden : goldens["invalid_utf8"]) {
    const auto bytes = golden["bytes"].get<std::vector<uint8_t>>();
    const std::string text(bytes.begin(), bytes.end());
    EXPECT_FALSE(IsValidUtf8(text));
    EXPECT_EQ(ReplaceIllFormedUtf8(text), golden["decoded"].get<std::string>());
    EXPECT_EQ(MustEncode(*tokenizer, text, kPlain), Ids(golden["ids"])) << golden["bytes"];
  }
}

BpeModel ModelOf(const json& golden) {
  BpeVocab vocab;
  for (const auto& [token, id] : golden["vocab"].items()) vocab[token] = id.get<int32_t>();
  std::vector<BpeMerge> merges;
  for (const json& merge : golden["merges"]) {
    const std::string left = merge[0];
    const std::string right = merge[1];
    merges.push_back({vocab.at(left), vocab.at(right), vocab.at(left + right)});
  }
  return BpeModel(vocab, merges, {});
}

TEST(BpeModel, FollowsTheReferenceWhereMergesCompete) {
  BpeScratch scratch;
  const json goldens = TestData("tokenizer_llama2_goldens.json");
  for (const json& golden : goldens["bpe"]) {
    const BpeModel model = ModelOf(golden);
    for (const json& c : golden["cases"]) {
      std::vector<int32_t> ids;
      model.Tokenize(c["text"].get<std::string>(), scratch, ids);
      EXPECT_EQ(ids, Ids(c["ids"])) << golden["merges"] << " " << c["text"];
    }
  }
}

// The definition: merge the pair of the lowest rank, leftmost first, until none is left.
std::vector<int32_t> NaiveBpe(std::vector<int32_t> ids, const std::vector<BpeMerge>& merges) {
  while (true) {
    size_t best_rank = merges.size();
    size_t best_at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank].left == ids[i] && merges[rank].right == ids[i + 1]) {
          best_rank = rank;
          best_at = i;
        }
      }
    }
    if (best_rank == merges.size()) return ids;
    ids[best_at] = merges[best_rank].merged;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best_at) + 1);
  }
}

TEST(BpeModel, EqualsTheDefinitionOnRandomMerges) {
  std::mt19937 random(7);
  BpeScratch scratch;
  for (int round = 0; round < 300; ++round) {
    // Every merge makes a token of its own: then the heap has no say in the result.
    std::vector<std::string> tokens = {"a", "b", "c", "\xC3\xA9"};
    BpeVocab vocab;
    for (size_t i = 0; i < tokens.size(); ++i) vocab[tokens[i]] = static_cast<int32_t>(i);
    std::vector<BpeMerge> merges;
    const int wanted = std::uniform_int_distribution<int>(1, 25)(random);
    for (int i = 0; i < wanted; ++i) {
      std::uniform_int_distribution<size_t> pick(0, tokens.size() - 1);
      const size_t left = pick(random);
      const size_t right = pick(random);
      const std::string merged = tokens[left] + tokens[right];
      if (vocab.contains(merged)) continue;
      vocab[merged] = static_cast<int32_t>(tokens.size());
      merges.push_back({static_cast<int32_t>(left), static_cast<int32_t>(right),
                        static_cast<int32_t>(tokens.size())});
      tokens.push_back(merged);
    }
    const BpeModel model(vocab, merges, {});
    for (int n = 0; n < 20; ++n) {
      std::vector<int32_t> symbols(std::uniform_int_distribution<size_t>(0, 60)(random));
      std::string text;
      for (int32_t& symbol : symbols) {
        symbol = std::uniform_int_distribution<int32_t>(0, 3)(random);
        text += tokens[symbol];
      }
      std::vector<int32_t> ids;
      model.Tokenize(text, scratch, ids);
      EXPECT_EQ(ids, NaiveBpe(symbols, merges)) << text;
    }
  }
}

// Which characters `set` matches, by splitting a text that has all of them as "#c%".
std::vector<bool> Matched(const SplitRegex& regex) {
  std::string text;
  for (char32_t c = 0; c < 0x110000; ++c) {
    if ((c >= 0xD800 && c < 0xE000) || c == '#' || c == '%') continue;
    text += '#';
    AppendUtf8(c, text);
    text += '%';
  }
  std::vector<bool> matched(0x110000, false);
  const absl::Status status = regex.Split(text, [&](std::string_view piece) {
    if (piece.front() == '#' && piece.back() != '%') {
      matched[NextUtf8(piece.substr(1)).code_point] = true;
    }
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  return matched;
}

TEST(SplitRegex, ClassesEqualTheReferenceForEveryCharacter) {
  const json classes = TestData("tokenizer_byte_level_goldens.json")["classes"];
  for (const auto& [name, ranges] : classes.items()) {
    std::vector<bool> expected(0x110000, false);
    for (const json& range : ranges) {
      for (uint32_t c = range[0]; c <= range[1].get<uint32_t>(); ++c) expected[c] = true;
    }
    std::string negated = name;
    negated[1] = static_cast<char>(std::toupper(negated[1]));
    for (const std::string& pattern :
         {"#" + name, "#[" + name + "]", "#[^" + name + "]", "#" + negated}) {
      const auto regex = SplitRegex::Compile(pattern);
      ASSERT_TRUE(regex.ok()) << pattern << regex.status();
      const bool inverse = pattern.find('^') != pattern.npos || pattern == "#" + negated;
      const std::vector<bool> matched = Matched(*regex);
      for (uint32_t c = 0; c < 0x110000; ++c) {
        if ((c >= 0xD800 && c < 0xE000) || c == '#' || c == '%') continue;
        ASSERT_EQ(matched[c], expected[c] != inverse) << pattern << " U+" << std::hex << c;
      }
    }
    for (uint32_t c = 0; name == R"(\s)" && c < 0x110000; ++c) {
      ASSERT_EQ(IsWhiteSpace(c), expected[c]) << std::hex << c;
    }
  }
}

TEST(SplitRegex, RefusesWhatTheEnginesReadDifferently) {
  for (const char* pattern :
       {R"(\h)",     R"(\w+)",   R"(\bx)",     R"(\d)",      R"([a[b]])", R"([a&&b])",
        R"([a-\s])", R"((?i)a)", R"((?<n>a))", R"(a{,3})",   R"(a{2}?)",  R"(a{2}+)",
        R"(^a)",     R"(a$)",    R"([\S])",    R"([\P{L}])", R"(\x41)",   R"(\p{^L})",
        R"(\pL)",    "a\\",      "\\p{L",      "a{2",        "(?"}) {
    const auto regex = SplitRegex::Compile(pattern);
    EXPECT_EQ(regex.status().code(), absl::StatusCode::kInvalidArgument) << pattern;
    EXPECT_THAT(std::string(regex.status().message()), HasSubstr("not supported")) << pattern;
  }
  for (const char* pattern : {"", "(", "[", "a)", R"(\p{Nonesuch})", "*", "[z-a]"}) {
    EXPECT_EQ(SplitRegex::Compile(pattern).status().code(), absl::StatusCode::kInvalidArgument)
        << pattern;
  }
  EXPECT_FALSE(SplitRegex::Compile(std::string(20 << 10, 'a')).ok());
}

std::vector<std::string> Pieces(std::string_view pattern, std::string_view text) {
  const auto regex = SplitRegex::Compile(pattern);
  EXPECT_TRUE(regex.ok()) << regex.status();
  std::vector<std::string> pieces;
  EXPECT_TRUE(regex
                  ->Split(text,
                          [&](std::string_view piece) {
                            pieces.emplace_back(piece);
                            return absl::OkStatus();
                          })
                  .ok());
  return pieces;
}

TEST(SplitRegex, KeepsWhatLiesBetweenMatches) {
  using Texts = std::vector<std::string>;
  EXPECT_EQ(Pieces("b+", "abbcb"), (Texts{"a", "bb", "c", "b"}));
  EXPECT_EQ(Pieces("x", "abc"), (Texts{"abc"}));
  EXPECT_EQ(Pieces("x", ""), Texts{});
  EXPECT_EQ(Pieces("b*",
                   "\xC3\xA9"
                   "bb"),
            (Texts{"\xC3\xA9", "bb"}));  // empty matches only cut
  EXPECT_EQ(Pieces(R"([\s-]+)", "a -b"), (Texts{"a", " -", "b"}));
  EXPECT_EQ(Pieces(R"((?i:'s|'ll))", "a'Sb'lLc"), (Texts{"a", "'S", "b", "'lL", "c"}));
}

TEST(SplitRegex, EndlessBacktrackingIsAnError) {
  const auto regex = SplitRegex::Compile("(a+)+(?:b|c)");
  ASSERT_TRUE(regex.ok());
  const absl::Status status =
      regex->Split(std::string(64, 'a'), [](std::string_view) { return absl::OkStatus(); });
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("gave up at byte 0"));
}

TEST(Tokenizer, ByteLevelTextSurvivesTheRoundTrip) {
  const auto tokenizer = MustLoad(DemoModel());
  ASSERT_NE(tokenizer, nullptr);
  std::mt19937 random(11);
  for (int i = 0; i < 5000; ++i) {
    const std::string text = RandomText(random, 40);
    ASSERT_TRUE(IsValidUtf8(text));
    const std::vector<int32_t> ids = MustEncode(*tokenizer, text, kPlain);
    ASSERT_EQ(tokenizer->Decode(ids, false), text);
    for (const int32_t id : ids) ASSERT_FALSE(tokenizer->IsSpecial(id)) << text;
  }
}

TEST(Tokenizer, ByteFallbackTextSurvivesTheRoundTrip) {
  const auto tokenizer = MustParse(TestData("tokenizer_llama2.json"));
  ASSERT_NE(tokenizer, nullptr);
  std::mt19937 random(12);
  for (int i = 0; i < 5000; ++i) {
    std::string text = RandomText(random, 40);
    const std::vector<int32_t> ids = MustEncode(*tokenizer, text, kPlain);
    for (const int32_t id : ids) ASSERT_FALSE(tokenizer->IsSpecial(id)) << text;
    for (size_t at; (at = text.find("\xE2\x96\x81")) != text.npos;) text.replace(at, 3, " ");
    ASSERT_EQ(tokenizer->Decode(ids, false), text);
  }
}

TEST(Tokenizer, KnowsItsTokens) {
  const json file = TestData("tokenizer_llama2.json");
  const auto tokenizer = MustParse(file, R"({"bos_token": {"content": "<s>"}, "eos_token": "</s>",
                                             "chat_template": "{{ bos_token }}"})");
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->vocab_size(), static_cast<int>(file["model"]["vocab"].size()));
  for (const auto& [text, id] : file["model"]["vocab"].items()) {
    EXPECT_EQ(tokenizer->Token(id.get<int32_t>()), text);
    EXPECT_EQ(tokenizer->TokenId(text), id.get<int32_t>());
  }
  EXPECT_EQ(tokenizer->TokenBytes(3 + 0xE4), "\xE4");
  EXPECT_EQ(tokenizer->TokenBytes(*tokenizer->TokenId("\xE2\x96\x81the")), " the");
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_EQ(tokenizer->eos_id(), 2);
  EXPECT_EQ(tokenizer->chat_template(), "{{ bos_token }}");
  EXPECT_TRUE(tokenizer->IsSpecial(0));
  EXPECT_FALSE(tokenizer->IsSpecial(3));
  for (const int32_t id : {-1, tokenizer->vocab_size(), INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(tokenizer->Token(id), "");
    EXPECT_EQ(tokenizer->TokenBytes(id), "");
    EXPECT_FALSE(tokenizer->IsSpecial(id));
    EXPECT_EQ(tokenizer->Decode({id}, false), "");
  }
  EXPECT_EQ(tokenizer->TokenId("no such token"), std::nullopt);
}

TEST(Tokenizer, PartsAreOneText) {
  for (const char* scheme : {"always", "first", "never"}) {
    const json patch = {{"normalizer", nullptr},
                        {"pre_tokenizer",
                         {{"type", "Metaspace"},
                          {"replacement", "\xE2\x96\x81"},
                          {"prepend_scheme", scheme},
                          {"split", false}}}};
    const auto tokenizer = MustParse(ApplyPatch(TestData("tokenizer_llama2.json"), patch));
    ASSERT_NE(tokenizer, nullptr);
    // A cut inside a word is none, and what follows a control token is not at the start.
    const std::vector<PromptPart> parts = {{{}, "Once up"}, {{}, "on a time"}, {2, ""},     {1, ""},
                                           {{}, "The"},     {{}, ""},          {{}, " end"}};
    const auto ids = tokenizer->EncodeParts(parts);
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ(*ids, MustEncode(*tokenizer, "Once upon a time</s><s>The end", kParsed)) << scheme;
    const auto plain = tokenizer->EncodeParts({{{}, "</s>"}});
    ASSERT_TRUE(plain.ok());
    EXPECT_EQ(*plain, MustEncode(*tokenizer, "</s>", kPlain));
    EXPECT_EQ(tokenizer->EncodeParts({{tokenizer->vocab_size(), ""}}).status().code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(tokenizer->EncodeParts({{-1, ""}}).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

double SecondsToEncode(const Tokenizer& tokenizer, const std::string& text) {
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_TRUE(tokenizer.Encode(text, kPlain).ok());
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

TEST(Tokenizer, HostileLongTextsAreFast) {
  std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  tokenizers.push_back(MustParse(TestData("tokenizer_llama2.json")));
  tokenizers.push_back(MustLoad(DemoModel()));
  std::vector<std::string> units = {
      "a",     " ",  "\n", " a", "the ", "\xE2\x96\x81", "\xC3\xA9", std::string("\0x", 2), "<",
      "<|eot", "<s", "'",  "9",  "!",    "\t ",          "ab ba",    "\xF0\x9F\x98\x80",    "\xFF"};
  // About 0.1 s on one core; quadratic time would take minutes.
  const double most = kSanitized ? 60 : 5;
  for (const std::string& unit : units) {
    std::string text;
    while (text.size() < (512 << 10)) text += unit;
    text += "x";
    for (const auto& tokenizer : tokenizers) {
      ASSERT_NE(tokenizer, nullptr);
      EXPECT_LT(SecondsToEncode(*tokenizer, text), most) << testing::PrintToString(unit);
    }
  }
  std::mt19937 random(13);
  std::string mixed;
  while (mixed.size() < (512 << 10)) mixed += RandomText(random, 40);
  for (const auto& tokenizer : tokenizers) EXPECT_LT(SecondsToEncode(*tokenizer, mixed), most);
}

}  // namespace
}  // namespace mobi
