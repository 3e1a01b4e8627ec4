#include "calibrator/text_data.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <set>

#include "tests/paths.h"

namespace mobi {
namespace {

TEST(TextDataTest, WikiTextRowsAreJoinedAsTheDatasetJoinsThem) {
  EXPECT_EQ(ApplyLayout(" \n = Title = \n \n Text . \n", TextLayout::kWikiText),
            "\n\n = Title = \n\n\n\n\n Text . \n");
}

TEST(TextDataTest, StandardPerplexityTextHasItsPublishedLength) {
  const std::string path = std::string(MOBI_SOURCE_DIR) + "/../shared/data/wikitext2/wiki.test.raw";
  if (!std::ifstream(path).good()) GTEST_SKIP() << "needs " << path;
  const auto text = ReadText(path, TextLayout::kWikiText);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(text->size(), 1296370u);
  EXPECT_EQ(std::count_if(text->begin(), text->end(), [](char c) { return (c & 0xC0) != 0x80; }),
            1294336);
}

TEST(TextDataTest, DocumentsArePartedByTheirMarkAlone) {
  EXPECT_EQ(ApplyLayout("one\n two\n\n<|endoftext|>\n\nthree <|endoftext|>\n<|endoftext|>\n",
                        TextLayout::kDocuments),
            "one\n two\n\nthree <|endoftext|>");
}

TEST(TextDataTest, FindsTheFirstByteThatIsNotUtf8) {
  EXPECT_EQ(FirstInvalidUtf8("a\u00e9\u20ac\U0001F600z"), std::string_view::npos);
  EXPECT_EQ(FirstInvalidUtf8("ab\xff"), 2u);
  EXPECT_EQ(FirstInvalidUtf8("\xc3"), 0u);                // cut short
  EXPECT_EQ(FirstInvalidUtf8("\xc0\xaf"), 0u);            // overlong
  EXPECT_EQ(FirstInvalidUtf8("x\xed\xa0\x80"), 1u);       // surrogate
  EXPECT_EQ(FirstInvalidUtf8("xy\xf4\x90\x80\x80"), 2u);  // beyond U+10FFFF
}

TEST(TextDataTest, BadFilesAreNamed) {
  EXPECT_EQ(ReadText("/nonexistent/x.txt", TextLayout::kPlain).status().code(),
            absl::StatusCode::kNotFound);
  const std::string path = testing::TempDir() + "/latin1.txt";
  std::ofstream(path) << "caf\xe9 au lait";
  const auto status = ReadText(path, TextLayout::kPlain).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find("offset 3"), std::string::npos) << status;
}

TEST(TextDataTest, WindowsDoNotOverlapAndDependOnTheSeedAlone) {
  std::vector<std::vector<int32_t>> texts(2);
  for (int32_t i = 0; i < 1000; ++i) texts[i % 3 == 0].push_back(static_cast<int32_t>(i));
  const auto windows = DrawWindows(texts, 20, 32, -1, 7);
  ASSERT_TRUE(windows.ok()) << windows.status();
  ASSERT_EQ(windows->size(), 640u);
  EXPECT_EQ(std::set<int32_t>(windows->begin(), windows->end()).size(), 640u);
  EXPECT_EQ(*DrawWindows(texts, 20, 32, -1, 7), *windows);
  EXPECT_NE(*DrawWindows(texts, 20, 32, -1, 8), *windows);
}

TEST(TextDataTest, EveryFourthWindowOpensWithBos) {
  const std::vector<std::vector<int32_t>> texts = {std::vector<int32_t>(1000, 5)};
  const auto windows = DrawWindows(texts, 8, 16, 3, 1);
  ASSERT_TRUE(windows.ok());
  for (int i = 0; i < 8; ++i) EXPECT_EQ((*windows)[i * 16], i % 4 == 0 ? 3 : 5);
}

TEST(TextDataTest, TooLittleTextIsRefusedWithBothNumbers) {
  const auto status = DrawWindows({std::vector<int32_t>(100)}, 4, 32, -1, 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find("100 tokens"), std::string::npos) << status;
}

}  // namespace
}  // namespace mobi
