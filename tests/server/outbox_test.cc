#include "server/outbox.h"

#include <map>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace mobi {
namespace {

TEST(Outbox, MergesWhatOneWriteCarries) {
  Outbox outbox;
  EXPECT_TRUE(outbox.empty());
  outbox.AddToken(0, 7, 4, "ab");
  outbox.AddToken(0, 8, 8, "c");
  outbox.AddToken(2, 9, 2, "");
  const std::string stop = "END";
  outbox.EndCompletion(2, "x", v1::FINISH_REASON_STOP, &stop, nullptr);
  EXPECT_FALSE(outbox.empty());
  v1::GenerateResponse message;
  outbox.TakeInto(message);
  EXPECT_TRUE(outbox.empty());
  EXPECT_EQ(outbox.bytes(), 0u);
  ASSERT_EQ(message.chunks_size(), 2);
  EXPECT_EQ(message.chunks(0).text(), "abc");
  EXPECT_THAT(message.chunks(0).token_ids(), ::testing::ElementsAre(7, 8));
  EXPECT_FLOAT_EQ(message.chunks(0).effective_bits(), 6);
  EXPECT_EQ(message.chunks(0).finish_reason(), v1::FINISH_REASON_UNSPECIFIED);
  EXPECT_EQ(message.chunks(1).index(), 2);
  EXPECT_EQ(message.chunks(1).text(), "x");
  EXPECT_EQ(message.chunks(1).stop(), "END");
}

TEST(Outbox, PromptAndSummaryAreNotCounted) {
  Outbox outbox;
  v1::Prompt prompt;
  prompt.set_text(std::string(1 << 20, 'x'));
  outbox.SetPrompt(prompt);
  EXPECT_FALSE(outbox.empty());
  EXPECT_EQ(outbox.bytes(), 0u);
  outbox.SetSummary({});
  EXPECT_EQ(outbox.bytes(), 0u);
  v1::GenerateResponse message;
  outbox.TakeInto(message);
  EXPECT_TRUE(message.has_prompt());
  EXPECT_TRUE(message.has_summary());
  EXPECT_TRUE(outbox.empty());
}

// However takes fall between additions, their concatenation is the same, and bytes() is close to
// what the message takes on the wire.
TEST(Outbox, TakesAreAPartitionOfTheStream) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    Outbox outbox;
    std::map<int, std::string> sent, received;
    std::map<int, std::vector<int32_t>> sent_ids, received_ids;
    v1::GenerateResponse message;
    const auto take = [&] {
      const size_t estimate = outbox.bytes();
      outbox.TakeInto(message);
      EXPECT_LE(message.ByteSizeLong(), estimate + 16);
      EXPECT_GE(message.ByteSizeLong() * 4 + 64, estimate);
      for (const v1::Chunk& chunk : message.chunks()) {
        received[chunk.index()] += chunk.text();
        auto& ids = received_ids[chunk.index()];
        ids.insert(ids.end(), chunk.token_ids().begin(), chunk.token_ids().end());
      }
    };
    for (int i = 0; i < 60; ++i) {
      const int index = static_cast<int>(random() % 4);
      const auto token = static_cast<int32_t>(random() % 128000);
      const std::string text(random() % 9, static_cast<char>('a' + random() % 26));
      outbox.AddToken(index, token, 4, text);
      sent[index] += text;
      sent_ids[index].push_back(token);
      if (random() % 5 == 0) take();
    }
    take();
    EXPECT_EQ(sent, received);
    EXPECT_EQ(sent_ids, received_ids);
  }
}

}  // namespace
}  // namespace mobi
