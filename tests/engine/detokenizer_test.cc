#include "engine/detokenizer.h"

#include <gtest/gtest.h>

#include "engine/tokenizer_utf8.h"
#include "tests/engine/tokenizer_test_data.h"

namespace mobi {
namespace {

using ::nlohmann::json;

// Hugging Face's decoders written down as they are, on the whole list at once: the token texts are
// what the file spells, so nothing here shares code with the incremental decoder but NextUtf8.
std::string WholeByteLevel(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip) {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!(skip && tokenizer.IsSpecial(id))) bytes += tokenizer.TokenBytes(id);
  }
  return ReplaceIllFormedUtf8(bytes);
}

std::string WholeByteFallback(const Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                              bool skip, bool strip) {
  std::string text;
  std::string run;
  const auto end_run = [&] {
    if (IsValidUtf8(run)) {
      text += run;
    } else {
      for (size_t i = 0; i < run.size(); ++i) text += kReplacementCharacter;
    }
    run.clear();
  };
  for (const int32_t id : ids) {
    const std::string token(tokenizer.Token(id));
    if (token.empty() || (skip && tokenizer.IsSpecial(id))) continue;
    if (token.size() == 6 && token.substr(0, 3) == "<0x") {
      run += static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16));
      continue;
    }
    end_run();
    std::string spaced = token;
    for (size_t at; (at = spaced.find("\xE2\x96\x81")) != spaced.npos;) spaced.replace(at, 3, " ");
    text += spaced;
  }
  end_run();
  if (strip && !text.empty() && text[0] == ' ') text.erase(0, 1);
  return text;
}

// Pushes all, checks that every increment is whole UTF-8, and gives what came out.
std::string Incremental(const Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                        const DetokenizerOptions& options) {
  Detokenizer detokenizer(tokenizer, options);
  std::string text;
  for (const int32_t id : ids) {
    const std::string increment = detokenizer.Push(id);
    EXPECT_TRUE(IsValidUtf8(increment));
    text += increment;
  }
  const std::string rest = detokenizer.Flush();
  EXPECT_TRUE(IsValidUtf8(rest));
  EXPECT_EQ(detokenizer.Flush(), "");
  return text + rest;
}

std::vector<int32_t> RandomIds(std::mt19937& random, const Tokenizer& tokenizer, int first_byte) {
  std::uniform_int_distribution<int32_t> any(-2, tokenizer.vocab_size() + 2);
  std::uniform_int_distribution<int> kind(0, 3);
  std::vector<int32_t> ids(std::uniform_int_distribution<size_t>(0, 24)(random));
  for (int32_t& id : ids) {
    id = any(random);
    if (kind(random) != 0) id = first_byte + (id & 0xFF);
  }
  return ids;
}

TEST(Detokenizer, ByteLevelIncrementsAreTheWhole) {
  const auto tokenizer = MustLoad(DemoModel());
  ASSERT_NE(tokenizer, nullptr);
  std::mt19937 random(3);
  for (int i = 0; i < 5000; ++i) {
    const std::vector<int32_t> ids = RandomIds(random, *tokenizer, 0);
    for (const bool skip : {false, true}) {
      const std::string whole = WholeByteLevel(*tokenizer, ids, skip);
      EXPECT_EQ(Incremental(*tokenizer, ids, {.skip_special = skip}), whole);
      EXPECT_EQ(tokenizer->Decode(ids, skip), whole);
    }
  }
}

TEST(Detokenizer, ByteFallbackIncrementsAreTheWhole) {
  const auto tokenizer = MustParse(TestData("tokenizer_llama2.json"));
  ASSERT_NE(tokenizer, nullptr);
  std::mt19937 random(4);
  for (int i = 0; i < 5000; ++i) {
    const std::vector<int32_t> ids = RandomIds(random, *tokenizer, 3);
    for (const bool skip : {false, true}) {
      const std::string whole = WholeByteFallback(*tokenizer, ids, skip, true);
      EXPECT_EQ(Incremental(*tokenizer, ids, {.skip_special = skip}), whole);
      EXPECT_EQ(tokenizer->Decode(ids, skip), whole);
      EXPECT_EQ(Incremental(*tokenizer, ids, {.skip_special = skip, .continuation = true}),
                WholeByteFallback(*tokenizer, ids, skip, false));
    }
  }
}

TEST(Detokenizer, GivesTextAsSoonAsItIsCertain) {
  const auto tokenizer = MustParse(TestData("tokenizer_llama2.json"));
  ASSERT_NE(tokenizer, nullptr);
  const int32_t the = *tokenizer->TokenId("\xE2\x96\x81the");
  const auto byte = [](int value) { return 3 + value; };

  Detokenizer detokenizer(*tokenizer);
  EXPECT_EQ(detokenizer.Push(the), "the");  // the first space is taken away
  EXPECT_EQ(detokenizer.Push(the), " the");
  EXPECT_EQ(detokenizer.Push(byte(0xC3)), "");
  EXPECT_EQ(detokenizer.Push(byte(0xA9)), "");  // more bytes could still break the run
  EXPECT_EQ(detokenizer.Push(the), "\xC3\xA9 the");
  EXPECT_EQ(detokenizer.Push(byte(0xC3)), "");
  EXPECT_EQ(detokenizer.Push(byte(0x41)), "\xEF\xBF\xBD\xEF\xBF\xBD");  // broken for good
  EXPECT_EQ(detokenizer.Push(byte(0x41)), "\xEF\xBF\xBD");
  EXPECT_EQ(detokenizer.Push(2), "");  // special, so the run goes on
  EXPECT_EQ(detokenizer.Push(byte(0x42)), "\xEF\xBF\xBD");
  EXPECT_EQ(detokenizer.Push(the), " the");
  EXPECT_EQ(detokenizer.Push(byte(0xE4)), "");
  EXPECT_EQ(detokenizer.Flush(), "\xEF\xBF\xBD");
}

TEST(Detokenizer, ByteLevelHoldsNothingButAStartedCharacter) {
  const auto tokenizer = MustLoad(DemoModel());
  ASSERT_NE(tokenizer, nullptr);
  const auto emoji = tokenizer->Encode("\xF0\x9F\x98\x80", {.add_special_tokens = false});
  ASSERT_TRUE(emoji.ok());
  ASSERT_EQ(emoji->size(), 4u);  // one token a byte in this small vocabulary
  Detokenizer detokenizer(*tokenizer);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(detokenizer.Push((*emoji)[i]), "");
  EXPECT_EQ(detokenizer.Push((*emoji)[3]), "\xF0\x9F\x98\x80");
  EXPECT_EQ(detokenizer.Push((*emoji)[0]), "");
  EXPECT_EQ(detokenizer.Push(*tokenizer->TokenId("a")),
            "\xEF\xBF\xBD"
            "a");
  EXPECT_EQ(detokenizer.Push((*emoji)[0]), "");
  EXPECT_EQ(detokenizer.Push((*emoji)[1]), "");
  EXPECT_EQ(detokenizer.Flush(), "\xEF\xBF\xBD");
}

}  // namespace
}  // namespace mobi
