#include "engine/base/flags.h"

#include <cstdlib>

#include "absl/flags/declare.h"
#include "absl/flags/flag.h"
#include "absl/flags/reflection.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

ABSL_FLAG(int, max_seqs, 5, "How many.");
ABSL_FLAG(bool, verbose, false, "Say more.");
ABSL_FLAG(std::string, model_dir, "demo", "Which.");

ABSL_DECLARE_FLAG(int, shared_flag);

namespace mobi {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<std::vector<std::string>> Parse(std::vector<std::string> arguments,
                                               std::string_view env_prefix = "") {
  arguments.insert(arguments.begin(), "program");
  std::vector<char*> argv;
  argv.reserve(arguments.size());
  for (std::string& argument : arguments) argv.push_back(argument.data());
  return ParseFlags(static_cast<int>(argv.size()), argv.data(), __FILE__, env_prefix);
}

TEST(Flags, ThoseOfLinkedFlagFilesAreTheProgramsToo) {
  absl::FlagSaver saver;
  ASSERT_TRUE(Parse({"--shared_flag=4"}).ok());
  EXPECT_EQ(absl::GetFlag(FLAGS_shared_flag), 4);
}

TEST(Flags, TakesEveryForm) {
  absl::FlagSaver saver;
  const auto positional = Parse(
      {"generate", "--max-seqs", "7", "-", "--verbose", "--model_dir=a=b", "--", "--not-a-flag"});
  ASSERT_TRUE(positional.ok()) << positional.status();
  EXPECT_THAT(*positional, ElementsAre("generate", "-", "--not-a-flag"));
  EXPECT_EQ(absl::GetFlag(FLAGS_max_seqs), 7);
  EXPECT_TRUE(absl::GetFlag(FLAGS_verbose));
  EXPECT_EQ(absl::GetFlag(FLAGS_model_dir), "a=b");
  ASSERT_TRUE(Parse({"--noverbose", "--max_seqs=-3"}).ok());
  EXPECT_FALSE(absl::GetFlag(FLAGS_verbose));
  EXPECT_EQ(absl::GetFlag(FLAGS_max_seqs), -3);
}

TEST(Flags, EnvironmentIsBelowTheCommandLine) {
  absl::FlagSaver saver;
  ::setenv("MOBITEST_MAX_SEQS", "11", 1);
  ::setenv("MOBITEST_MODEL_DIR", "from-env", 1);
  ASSERT_TRUE(Parse({"--max-seqs=12"}, "MOBITEST_").ok());
  EXPECT_EQ(absl::GetFlag(FLAGS_max_seqs), 12);
  EXPECT_EQ(absl::GetFlag(FLAGS_model_dir), "from-env");
  ::setenv("MOBITEST_MAX_SEQS", "many", 1);
  EXPECT_THAT(std::string(Parse({}, "MOBITEST_").status().message()),
              HasSubstr("MOBITEST_MAX_SEQS"));
  ::unsetenv("MOBITEST_MAX_SEQS");
  ::unsetenv("MOBITEST_MODEL_DIR");
}

TEST(Flags, ErrorsNameTheFlag) {
  absl::FlagSaver saver;
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"--max-sequences=3"}, "--max-sequences: unknown flag"},
      {{"--max-seqs=many"}, "--max-seqs: "},
      {{"--max-seqs"}, "--max-seqs: needs a value"},
      {{"--noverbose=true"}, "--noverbose: takes no value"},
      {{"--nomax_seqs"}, "--nomax_seqs: unknown flag"},
      // Flags of libraries are not ours to offer.
      {{"--gtest_filter=x"}, "--gtest_filter: unknown flag"},
  };
  for (const auto& [arguments, expected] : cases) {
    const auto result = Parse(arguments);
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument) << arguments[0];
    EXPECT_THAT(std::string(result.status().message()), HasSubstr(expected));
  }
}

TEST(Flags, HelpListsFlagsWithDefaults) {
  EXPECT_EQ(FlagsHelp(__FILE__),
            "  --max_seqs (5): How many.\n"
            "  --model_dir (demo): Which.\n"
            "  --shared_flag (2): Of several programs.\n"
            "  --verbose (false): Say more.\n");
}

}  // namespace
}  // namespace mobi
