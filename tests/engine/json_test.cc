#include "engine/base/json.h"

#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace mobi {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

std::string ErrorOf(std::string_view text, const JsonLimits& limits = {}) {
  return std::string(ParseJson(text, "f.json", limits).status().message());
}

// A random document of small values, nested at most `depth` deep.
json RandomDocument(std::mt19937& random, int depth) {
  switch (random() % (depth > 0 ? 9 : 7)) {
    case 0:
      return nullptr;
    case 1:
      return random() % 2 == 0;
    case 2:
      return random();
    case 3:
      return -static_cast<int64_t>(random());
    case 4:
      return static_cast<double>(random()) / 7;
    case 5:
      return "text \"quoted\" \n \xc3\xa9";
    case 6:
      return "";
    case 7: {
      json list = json::array();
      for (unsigned n = random() % 4; n > 0; --n) list.push_back(RandomDocument(random, depth - 1));
      return list;
    }
  }
  json object = json::object();
  for (unsigned n = random() % 4; n > 0; --n) {
    object["key" + std::to_string(n)] = RandomDocument(random, depth - 1);
  }
  return object;
}

TEST(JsonTest, ReadsWhatTheLibraryReads) {
  std::mt19937 random(5);
  for (int i = 0; i < 2000; ++i) {
    const json expected = RandomDocument(random, 5);
    const auto parsed = ParseJson(expected.dump(static_cast<int>(random() % 3)), "f.json");
    ASSERT_EQ(parsed.status(), absl::OkStatus()) << expected;
    EXPECT_EQ(*parsed, expected);
  }
}

TEST(JsonTest, RefusesWithFileAndPosition) {
  EXPECT_THAT(ErrorOf(""), StartsWith("f.json: not valid JSON at byte 1: "));
  EXPECT_THAT(ErrorOf("{\"a\": tru}"), HasSubstr("at byte 10: invalid literal"));
  EXPECT_THAT(ErrorOf("{\"a\": 1} 2"), HasSubstr("expected end of input"));
  EXPECT_THAT(ErrorOf("[1e999]"), HasSubstr("number overflow parsing '1e999'"));
  EXPECT_THAT(ErrorOf("[\"\xff\"]"), HasSubstr("ill-formed UTF-8"));
  EXPECT_THAT(ErrorOf("[\"\\ud800\"]"), HasSubstr("surrogate"));
  EXPECT_THAT(ErrorOf("{\"a\": {\"b\": 1, \"b\": 2}}"), HasSubstr("duplicate key \"b\""));
  EXPECT_EQ(ErrorOf("{\"a\": {\"b\": 1}, \"b\": {\"b\": 2}}"), "");
}

TEST(JsonTest, BoundsDepthAndSize) {
  EXPECT_EQ(ErrorOf("[[1]]", {.max_depth = 2}), "");
  EXPECT_THAT(ErrorOf("[[[1]]]", {.max_depth = 2}), HasSubstr("nested deeper than 2"));
  EXPECT_THAT(ErrorOf(std::string(1 << 20, '[')), HasSubstr("nested deeper than 32"));
  EXPECT_THAT(ErrorOf("[1, 2]", {.max_bytes = 5}), HasSubstr("6 bytes of JSON, the limit is 5"));
}

TEST(JsonTest, MessagesAreShortAndPrintable) {
  for (const std::string& text :
       {"\"" + std::string(5000, 'x') + "\x1b[31m", std::string("{\"\x07\": 1}"),
        std::string(5000, '9') + "e" + std::string(500, '9'),
        "{\"" + std::string(5000, 'k') + "\":1,\"" + std::string(5000, 'k') + "\":1}"}) {
    const std::string message = ErrorOf(text);
    EXPECT_FALSE(message.empty());
    EXPECT_LT(message.size(), 300u);
    for (const char c : message) EXPECT_TRUE(c >= ' ' && c <= '~') << message;
  }
}

TEST(JsonObjectTest, ReadsFields) {
  const json document = json::parse(
      R"({"int": 7, "number": 0.5, "text": "t", "yes": true, "no": null, "list": [1],
          "inner": {"deep": {"x": 1}}})");
  const auto object = JsonObject::Of(document, "f.json");
  ASSERT_EQ(object.status(), absl::OkStatus());
  EXPECT_EQ(*object->Int("int", 0, 10), 7);
  EXPECT_EQ(*object->Number("int", 0, 10), 7);
  EXPECT_EQ(*object->Number("number", 0, 1), 0.5);
  EXPECT_EQ(*object->String("text"), "t");
  EXPECT_TRUE(*object->Bool("yes"));
  EXPECT_FALSE(object->Has("no"));
  EXPECT_EQ((*object->Array("list"))->size(), 1u);
  EXPECT_EQ(*object->IntOr("no", 0, 10, -1), -1);
  EXPECT_EQ(*object->NumberOr("none", 0, 10, 3.5), 3.5);
  EXPECT_EQ(*object->StringOr("none", "absent"), "absent");
  EXPECT_EQ(*object->BoolOr("yes", false), true);
  const auto deep = object->Object("inner")->Object("deep");
  EXPECT_EQ(*deep->Int("x", 1, 1), 1);
  EXPECT_EQ(deep->Int("y", 1, 1).status().message(), "f.json: inner.deep.y: missing");
}

TEST(JsonObjectTest, RefusesWithThePathToTheField) {
  const json document = json::parse(
      R"({"int": 7, "big": 18446744073709551615, "text": "t", "list": [1], "half": 0.5})");
  const auto object = JsonObject::Of(document, "f.json");
  const auto message = [](const auto& result) { return std::string(result.status().message()); };
  EXPECT_EQ(message(object->Int("int", 8, 9)), "f.json: int: 7 is not in 8..9");
  EXPECT_EQ(message(object->Int("big", 0, INT64_MAX)),
            "f.json: big: 18446744073709551615 is not in 0..9223372036854775807");
  EXPECT_EQ(message(object->Int("half", 0, 9)), "f.json: half: 0.5 is not an integer");
  EXPECT_EQ(message(object->Int("none", 0, 9)), "f.json: none: missing");
  EXPECT_EQ(message(object->IntOr("text", 0, 9, 1)), "f.json: text: \"t\" is not an integer");
  EXPECT_EQ(message(object->Number("half", 1, 2)), "f.json: half: 0.5 is not in 1..2");
  EXPECT_EQ(message(object->Number("list", 1, 2)), "f.json: list: a list is not a number");
  EXPECT_EQ(message(object->String("int")), "f.json: int: 7 is not a string");
  EXPECT_EQ(message(object->Bool("int")), "f.json: int: 7 is not true or false");
  EXPECT_EQ(message(object->Array("int")), "f.json: int: 7 is not a list");
  EXPECT_EQ(message(object->Object("list")), "f.json: list: a list is not an object");
  EXPECT_EQ(message(JsonObject::Of(json(3), "f.json")), "f.json: 3 is not an object");
}

}  // namespace
}  // namespace mobi
