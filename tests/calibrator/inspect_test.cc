#include "calibrator/inspect.h"

#include <sys/wait.h>

#include <cstdio>
#include <filesystem>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/test_models.h"
#include "tests/paths.h"

namespace mobi {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

uint64_t BytesOf(const FolderReport& report, const std::string& part) {
  for (const auto& [name, bytes] : report.bytes) {
    if (name == part) return bytes;
  }
  return 0;
}

TEST(InspectTest, CountsAFloatFolder) {
  TempDir dir;
  TestModelOptions options;
  options.tie_word_embeddings = false;
  options.num_shards = 2;
  ASSERT_EQ(WriteTestModel(dir.Sub("m"), options), absl::OkStatus());
  const auto report = InspectFolder(dir.Sub("m"), true);
  ASSERT_EQ(report.status(), absl::OkStatus());
  // q and o 128 x 128, k and v 64 x 128, three of 256 x 128, in two layers.
  EXPECT_EQ(report->linear_parameters, 2 * (2 * 16384 + 2 * 8192 + 3 * 32768));
  EXPECT_EQ(report->parameters, report->linear_parameters + 2 * 320 * 128 + 5 * 128);
  EXPECT_EQ(report->total_bytes, static_cast<uint64_t>(2 * report->parameters));
  EXPECT_EQ(report->files.size(), 2u);
  EXPECT_EQ(BytesOf(*report, "linears"), static_cast<uint64_t>(2 * report->linear_parameters));
  EXPECT_EQ(BytesOf(*report, "lm_head"), 320u * 128 * 2);
  EXPECT_EQ(report->verified_files, 0);
  EXPECT_THAT(ReportAsText(*report),
              AllOf(HasSubstr("float model folder"), HasSubstr("parameters      377,472, of which"),
                    HasSubstr("manifest        none")));
}

TEST(InspectTest, CountsAMobiquantFolder) {
  TempDir dir;
  TestModelOptions options;
  options.rope_scaling = RopeScaling{8, 1, 4, 64};
  ASSERT_EQ(WriteTestModels(dir, options), absl::OkStatus());
  const auto report = InspectFolder(dir.Sub("mobiquant"), true);
  ASSERT_EQ(report.status(), absl::OkStatus());
  const auto weights = static_cast<uint64_t>(report->linear_parameters);
  uint64_t sum = 0;
  for (const auto& [part, bytes] : report->bytes) sum += bytes;
  EXPECT_EQ(sum, report->total_bytes);
  for (const char* level : {"1", "2", "3", "4"}) {
    EXPECT_EQ(BytesOf(*report, std::string("slice ") + level), weights / 4);
    EXPECT_EQ(BytesOf(*report, std::string("scales ") + level), weights / 128 * 4);
  }
  // Per layer: four routers of 8 hidden units over 128, 128, 128 and 256 inputs, 7 segments.
  EXPECT_EQ(BytesOf(*report, "routers"), 2u * (8 * 640 * 2 + 4 * 2 * 8 * 4 + 7 * 4 * (8 + 1) * 4));
  EXPECT_EQ(report->verified_files, 5);
  EXPECT_EQ(report->recipe["name"], "min-max");
  const std::string text = ReportAsText(*report);
  EXPECT_THAT(text, AllOf(HasSubstr("mobiquant model folder"), HasSubstr("2.000 bits per linear"),
                          HasSubstr("llama3 scaling by 8 from 64 positions"),
                          HasSubstr("coherent        batch 64"), HasSubstr("5 files match")));
  const nlohmann::json json = ReportAsJson(*report);
  EXPECT_EQ(json["kind"], "mobiquant");
  EXPECT_EQ(json["bytes"]["slice 3"], weights / 4);
  EXPECT_EQ(json["price_table"]["token"].size(), report->price_table.size());
  EXPECT_EQ(json["config"]["rope_scaling"]["factor"], 8);
}

TEST(InspectTest, TellsOfAnLmHeadInSlices) {
  TempDir dir;
  ASSERT_EQ(WriteTestModels(dir, {}, {.sliced_lm_head = true}), absl::OkStatus());
  const auto report = InspectFolder(dir.Sub("mobiquant"), true);
  ASSERT_EQ(report.status(), absl::OkStatus());
  const nlohmann::json bytes = ReportAsJson(*report)["bytes"];
  // Four slices of 2 bits and four pairs of 4 bytes a group of 128.
  EXPECT_EQ(bytes["lm_head"], 320 * 128 + 4 * 4 * 320);
  EXPECT_EQ(bytes["embeddings"], 2 * 320 * 128);
  EXPECT_EQ(ReportAsJson(*report)["lm_head"]["min_level"], 2);
  EXPECT_THAT(ReportAsText(*report), HasSubstr("in slices, read at level 2 and up; a token loses "
                                               "0.5, 0.0312, 0.00195, 0.000122 nats"));
}

TEST(InspectTest, KnowsTheReferenceModel) {
  const std::string dir = std::string(MOBI_SOURCE_DIR) + "/../shared/data/stories-llama";
  if (!std::filesystem::exists(dir)) GTEST_SKIP() << dir << " is not there";
  const auto report = InspectFolder(dir, true);
  ASSERT_EQ(report.status(), absl::OkStatus());
  EXPECT_EQ(report->parameters, 5'770'496);
}

// The program: exit code and what it prints on both streams together.
std::pair<int, std::string> RunProgram(const std::string& arguments) {
  const std::string command =
      std::string(MOBI_BINARY_DIR) + "/bin/mobi-inspect " + arguments + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  std::string output;
  char buffer[4096];
  while (const size_t count = fread(buffer, 1, sizeof(buffer), pipe)) output.append(buffer, count);
  return {WEXITSTATUS(pclose(pipe)), output};
}

TEST(InspectProgramTest, TellsAndRefuses) {
  TempDir dir;
  ASSERT_EQ(WriteTestModels(dir), absl::OkStatus());
  const auto [code, text] = RunProgram(dir.Sub("mobiquant"));
  EXPECT_EQ(code, 0);
  EXPECT_THAT(text, HasSubstr("mobiquant model folder"));
  const auto [json_code, json_text] = RunProgram("--json " + dir.Sub("float"));
  EXPECT_EQ(json_code, 0);
  EXPECT_EQ(nlohmann::json::parse(json_text)["kind"], "float");
  std::filesystem::resize_file(dir.Sub("mobiquant/model.safetensors"), 1000);
  for (const std::string& arguments : {dir.Sub("mobiquant"), dir.Sub("nothing"), std::string(),
                                       "--colour " + dir.Sub("float"), std::string("a b")}) {
    const auto [bad_code, line] = RunProgram(arguments);
    EXPECT_EQ(bad_code, 2) << arguments;
    EXPECT_THAT(line, ::testing::MatchesRegex("mobi-inspect: [^\n]+\n")) << arguments;
  }
}

}  // namespace
}  // namespace mobi
