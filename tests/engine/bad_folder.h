// Model folders that are broken on purpose, and what refusing them has to be like.
#ifndef MOBI_TESTS_ENGINE_BAD_FOLDER_H_
#define MOBI_TESTS_ENGINE_BAD_FOLDER_H_

#include <chrono>
#include <fstream>
#include <functional>
#include <iterator>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "engine/checkpoint.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace mobi {

inline constexpr CheckpointOptions kVerify = {.verify_manifest = true};

inline std::string Read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void Write(const std::string& path, const std::string& contents) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << contents;
}

inline void EditJson(const std::string& path, const std::function<void(nlohmann::json&)>& edit) {
  nlohmann::json document = nlohmann::json::parse(Read(path));
  edit(document);
  Write(path, document.dump());
}

// Lies and accidents. Each case breaks a good folder in one way; the folder must be refused with
// one line that names the file and says what is wrong, at once.
struct BadFolder {
  std::string name;
  std::function<void(const std::string& dir)> damage;
  std::vector<std::string> expected;  // parts of the message
};

inline std::ostream& operator<<(std::ostream& out, const BadFolder& bad) { return out << bad.name; }

inline void ExpectRefused(const std::string& dir, const BadFolder& bad) {
  const auto start = std::chrono::steady_clock::now();
  const auto checkpoint = Checkpoint::Open(dir, kVerify);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
  ASSERT_FALSE(checkpoint.ok());
  const std::string message(checkpoint.status().message());
  EXPECT_THAT(message, ::testing::AllOf(::testing::HasSubstr(dir),
                                        ::testing::Not(::testing::HasSubstr("\n"))));
  for (const std::string& part : bad.expected) EXPECT_THAT(message, ::testing::HasSubstr(part));
}

inline std::function<void(const std::string&)> EditConfig(
    std::function<void(nlohmann::json&)> edit) {
  return [edit = std::move(edit)](const std::string& dir) { EditJson(dir + "/config.json", edit); };
}

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_BAD_FOLDER_H_
