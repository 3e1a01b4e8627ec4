// Tokenizers and goldens that the tests of tokenizer, detokenizer and chat_template share.
#ifndef MOBI_TESTS_ENGINE_TOKENIZER_TEST_DATA_H_
#define MOBI_TESTS_ENGINE_TOKENIZER_TEST_DATA_H_

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/tokenizer.h"
#include "nlohmann/json.hpp"
#include "tests/paths.h"

namespace mobi {

inline std::string SourcePath(const std::string& path) {
  return std::string(MOBI_SOURCE_DIR) + "/" + path;
}

inline std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return std::string(std::istreambuf_iterator<char>(file), {});
}

inline nlohmann::json TestData(const std::string& name) {
  return nlohmann::json::parse(ReadText(SourcePath("tests/testdata/" + name)));
}

// The small byte-level tokenizer that the demo model has.
inline std::string DemoModel() { return SourcePath("deploy/demo/model"); }

inline std::unique_ptr<Tokenizer> MustParse(const nlohmann::json& tokenizer,
                                            const std::string& config = "") {
  auto parsed =
      Tokenizer::Parse(tokenizer.dump(), "tokenizer.json", config, "tokenizer_config.json");
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return parsed.ok() ? *std::move(parsed) : nullptr;
}

inline std::unique_ptr<Tokenizer> MustLoad(const std::string& path) {
  auto loaded = Tokenizer::Load(path);
  EXPECT_TRUE(loaded.ok()) << loaded.status();
  return loaded.ok() ? *std::move(loaded) : nullptr;
}

// The rule of make_tokenizer_goldens.py: "model" is merged and may rename tokens, the rest
// replaces.
inline nlohmann::json ApplyPatch(nlohmann::json base, const nlohmann::json& patch) {
  for (const auto& [key, value] : patch.items()) {
    if (key != "model") {
      base[key] = value;
      continue;
    }
    for (const auto& [field, setting] : value.items()) {
      if (field != "rename") base["model"][field] = setting;
    }
    if (!value.contains("rename")) continue;
    nlohmann::json& vocab = base["model"]["vocab"];
    for (const auto& [from, to] : value["rename"].items()) {
      vocab[to.get<std::string>()] = vocab[from];
      vocab.erase(from);
    }
  }
  return base;
}

inline std::vector<int32_t> Ids(const nlohmann::json& list) {
  return list.get<std::vector<int32_t>>();
}

// Text that is hard on tokenizers; always valid UTF-8.
inline std::string RandomText(std::mt19937& random, int max_pieces) {
  static constexpr const char* kPieces[] = {
      " ",
      "  ",
      "\n",
      "\r\n",
      "\t",
      "the",
      " story",
      "'s",
      "'LL",
      "123",
      "4",
      "!?",
      "\xC3\xA9",
      "\xE4\xB8\xAD",
      "\xCC\x81",
      "\xE2\x80\x8D",
      "\xF0\x9F\x98\x80",
      "\xC2\xA0",
      "\xE3\x80\x80",
      "\xE2\x96\x81",
      "<|eot_id|>",
      "<s>",
      "</s>",
      "<0x0A>",
      "_",
      "A",
      "zq",
      "\x7F",
      "\x01",
  };
  std::uniform_int_distribution<int> count(0, max_pieces);
  std::uniform_int_distribution<size_t> pick(0, std::size(kPieces) + 3);
  std::uniform_int_distribution<uint32_t> point(0, 0x10FFFF);
  std::string text;
  for (int i = count(random); i > 0; --i) {
    const size_t piece = pick(random);
    if (piece < std::size(kPieces)) {
      text += kPieces[piece];
      continue;
    }
    uint32_t c = point(random) >> (3 * (piece - std::size(kPieces)));
    if (c >= 0xD800 && c < 0xE000) c = 0;
    if (c < 0x80) {
      text += static_cast<char>(c);
    } else if (c < 0x800) {
      text += {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
    } else if (c < 0x10000) {
      text += {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 63)),
               static_cast<char>(0x80 | (c & 63))};
    } else {
      text += {static_cast<char>(0xF0 | c >> 18), static_cast<char>(0x80 | (c >> 12 & 63)),
               static_cast<char>(0x80 | (c >> 6 & 63)), static_cast<char>(0x80 | (c & 63))};
    }
  }
  return text;
}

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_TOKENIZER_TEST_DATA_H_
