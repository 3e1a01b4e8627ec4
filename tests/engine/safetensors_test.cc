#include "engine/safetensors.h"

#include <cstring>
#include <filesystem>
#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string LittleEndian(uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(value >> (8 * i));
  return bytes;
}

// A file in memory, aligned as a mapping is.
class FileImage {
 public:
  explicit FileImage(const std::string& contents)
      : words_(contents.size() / 8 + 1), size_(contents.size()) {
    std::memcpy(words_.data(), contents.data(), size_);
  }
  absl::StatusOr<std::vector<HostTensor>> Parse() const {
    return ParseSafetensors({reinterpret_cast<const std::byte*>(words_.data()), size_}, "f.st");
  }

 private:
  std::vector<uint64_t> words_;
  size_t size_;
};

// Header padded with spaces to a multiple of eight, then data.
std::string Image(std::string header, const std::string& data) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return LittleEndian(header.size()) + header + data;
}

TEST(SafetensorsTest, ReadsTensorsInTheOrderOfTheirOffsets) {
  std::string data(26, '\0');
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i);
  const FileImage image(Image(R"({"b":{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]},
      "a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},
      "none":{"dtype":"BF16","shape":[3,0],"data_offsets":[24,24]},
      "scalar":{"dtype":"F16","shape":[],"data_offsets":[24,26]},
      "__metadata__":{"format":"pt"}})",
                              data));
  const auto tensors = image.Parse();
  ASSERT_EQ(tensors.status(), absl::OkStatus());
  ASSERT_EQ(tensors->size(), 4u);
  EXPECT_EQ((*tensors)[0].name, "a");
  EXPECT_EQ((*tensors)[0].As<int32_t>()[1], 0x07060504);
  EXPECT_EQ((*tensors)[1].name, "b");
  EXPECT_EQ((*tensors)[1].num_elements(), 4);
  EXPECT_EQ((*tensors)[2].name, "none");
  EXPECT_EQ((*tensors)[2].num_elements(), 0);
  EXPECT_EQ((*tensors)[3].As<uint16_t>()[0], 0x1918);
}

TEST(SafetensorsTest, ReadsAFileWithoutTensors) {
  EXPECT_EQ(FileImage(Image("{}", "")).Parse()->size(), 0u);
}

struct BadFile {
  std::string name;
  std::string contents;
  std::vector<std::string> expected;  // parts of the message
};

std::ostream& operator<<(std::ostream& out, const BadFile& bad) { return out << bad.name; }

// One tensor "t" with this entry and `size` bytes of data.
BadFile BadEntry(const std::string& name, const std::string& entry, size_t size,
                 const std::string& expected) {
  return {name, Image("{\"t\":" + entry + "}", std::string(size, '\0')), {"t", expected}};
}

// Two tensors of one F32 each.
BadFile BadOffsets(const std::string& name, const std::string& first, const std::string& second,
                   size_t size, const std::string& expected) {
  return {name,
          Image(absl::StrCat(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":)", first,
                             R"(},"u":{"dtype":"F32","shape":[1],"data_offsets":)", second, "}}"),
                std::string(size, '\0')),
          {expected}};
}

class BadSafetensorsTest : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadSafetensorsTest, IsRefusedWithOneLine) {
  const auto tensors = FileImage(GetParam().contents).Parse();
  ASSERT_FALSE(tensors.ok());
  const std::string message(tensors.status().message());
  EXPECT_THAT(message, AllOf(HasSubstr("f.st: "), Not(HasSubstr("\n"))));
  EXPECT_LT(message.size(), 300u);
  for (const std::string& part : GetParam().expected) EXPECT_THAT(message, HasSubstr(part));
}

constexpr uint64_t kHuge = uint64_t{1} << 63;
const std::string kGood = R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})";  // NOLINT

INSTANTIATE_TEST_SUITE_P(
    Container, BadSafetensorsTest,
    ::testing::Values(
        BadFile{"empty", "", {"0 bytes is too short"}},
        BadFile{"seven bytes", "1234567", {"7 bytes is too short"}},
        BadFile{"no header", LittleEndian(1), {"header of 1 bytes goes beyond the file of 8"}},
        BadFile{"header length 2^63", LittleEndian(kHuge) + "{}", {"9223372036854775808 bytes"}},
        BadFile{"header length 2^64-1", LittleEndian(~uint64_t{0}) + "{}", {"goes beyond"}},
        BadFile{"header length 2^64-8", LittleEndian(~uint64_t{7}) + "{}", {"goes beyond"}},
        BadFile{"header of 5 MB",
                Image(std::string(5 << 20, ' ') + "{}", ""),
                {"header of 5242888 bytes, the limit is 4194304"}},
        BadFile{"zero header", LittleEndian(0), {"not valid JSON"}},
        BadFile{"not JSON", Image("tensors", ""), {"not valid JSON at byte"}},
        BadFile{"truncated JSON", Image("{\"t\":{", ""), {"not valid JSON at byte"}},
        BadFile{"two documents", Image("{}{}", ""), {"not valid JSON at byte"}},
        BadFile{"a list", Image("[]", ""), {"a list is not an object"}},
        BadFile{"deep nesting", Image(std::string(100000, '['), ""), {"nested deeper than 3"}},
        BadFile{
            "deep objects", Image(R"({"a":{"b":{"c":{"d":1}}}})", ""), {"nested deeper than 3"}},
        BadFile{"not UTF-8",
                Image("{\"t\xff\":" + kGood + "}", "0000"),
                {"not valid JSON at byte", "UTF-8"}},
        BadFile{"overlong UTF-8", Image("{\"\xc0\xaf\":" + kGood + "}", "0000"), {"UTF-8"}},
        BadFile{"control character in a string", Image("{\"t\n\":1}", ""), {"control character"}},
        BadFile{"duplicate tensor",
                Image("{\"t\":" + kGood + ",\"t\":" + kGood + "}", "0000"),
                {"duplicate key \"t\""}},
        BadFile{"duplicate field",
                Image(R"({"t":{"dtype":"F32","dtype":"F16"}})", ""),
                {"duplicate key \"dtype\""}},
        BadFile{"number too large for JSON", Image("{\"t\":1e999}", ""), {"number overflow"}},
        BadFile{"data without tensors", Image("{}", "1"), {"1 bytes of data"}},
        BadFile{"long bad name",
                Image("{\"" + std::string(10000, 'x') + "\":1}", ""),
                {"xxx...", "1 is not an object"}}));

INSTANTIATE_TEST_SUITE_P(
    Entry, BadSafetensorsTest,
    ::testing::Values(
        BadEntry("a number", "3", 0, "t: 3 is not an object"),
        BadEntry("null", "null", 0, "t: missing"), BadEntry("empty", "{}", 0, "t.dtype: missing"),
        BadEntry("dtype is a number", R"({"dtype":3,"shape":[1],"data_offsets":[0,4]})", 4,
                 "t.dtype: 3 is not a string"),
        BadEntry("unknown dtype", R"({"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]})", 1,
                 "t.dtype: \"F8_E4M3\" is not supported"),
        BadEntry("hostile dtype", "{\"dtype\":\"\\u001b[2J\",\"shape\":[1],\"data_offsets\":[0,1]}",
                 1, "t.dtype: \"\\u001b[2J\" is not supported"),
        BadEntry("no shape", R"({"dtype":"F32","data_offsets":[0,4]})", 4, "t.shape: missing"),
        BadEntry("shape is a number", R"({"dtype":"F32","shape":1,"data_offsets":[0,4]})", 4,
                 "t.shape: 1 is not a list"),
        BadEntry("negative size", R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})", 4,
                 "t.shape: -1 is not a size"),
        BadEntry("fraction of a size", R"({"dtype":"F32","shape":[1.5],"data_offsets":[0,4]})", 4,
                 "t.shape: 1.5 is not a size"),
        BadEntry("size beyond 63 bits",
                 R"({"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4]})", 4,
                 "t.shape: 9223372036854775808 is not a size"),
        BadEntry("product of 2^64 elements",
                 R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0,
                 "does not fit 0 bytes"),
        BadEntry("product that wraps to the right size",
                 R"({"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]})", 4,
                 "does not fit 4 bytes"),
        BadEntry("nine dimensions",
                 R"({"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]})", 1,
                 "t.shape: 9 numbers, the limit is 8"),
        BadEntry("shape smaller than data", R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})",
                 8, "t.shape: F32 [1] does not fit 8 bytes"),
        BadEntry("shape larger than data", R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})", 4,
                 "t.shape: F32 [2] does not fit 4 bytes"),
        BadEntry("no offsets", R"({"dtype":"F32","shape":[1]})", 4, "t.data_offsets: missing"),
        BadEntry("one offset", R"({"dtype":"F32","shape":[1],"data_offsets":[0]})", 4,
                 "t.data_offsets: not a begin and an end"),
        BadEntry("three offsets", R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,8]})", 4,
                 "t.data_offsets: 3 numbers"),
        BadEntry("offsets in reverse", R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})", 4,
                 "t.data_offsets: not a begin and an end"),
        BadEntry("negative offset", R"({"dtype":"F32","shape":[1],"data_offsets":[-4,0]})", 4,
                 "t.data_offsets: -4"),
        BadEntry("end beyond the file", R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 4,
                 "t.data_offsets: end 8 is beyond the 4 bytes of data"),
        BadEntry(
            "a lie of an exabyte",
            R"({"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]})",
            4, "end 1152921504606846976 is beyond"),
        BadEntry("gap at the start", R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})", 8,
                 "t: data_offsets: begin 4 leaves a gap after 0"),
        BadEntry("bytes after the last", R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})", 8,
                 "8 bytes of data, of which the tensors cover 4"),
        BadOffsets("overlap", "[0,4]", "[0,4]", 4, "begin 0 overlaps the tensor that ends at 4"),
        BadOffsets("partial overlap", "[0,4]", "[4,8]", 6, "u.data_offsets: end 8 is beyond"),
        BadOffsets("gap between", "[0,4]", "[8,12]", 12, "u: data_offsets: begin 8 leaves a gap"),
        BadOffsets("misaligned", "[2,6]", "[6,10]", 10, "t.data_offsets: begin 2 is not aligned")));

TEST(SafetensorsWriterTest, WritesWhatTheReaderReads) {
  TempDir dir;
  std::mt19937 random(3);
  std::vector<HostTensor> expected;
  std::vector<std::vector<float>> storage;
  {
    auto writer = SafetensorsWriter::Create(dir.Sub("t.safetensors"), 100 * 320);
    ASSERT_EQ(writer.status(), absl::OkStatus());
    for (int i = 0; i < 100; ++i) {
      const std::vector<int64_t> shape = {static_cast<int64_t>(1 + random() % 5),
                                          static_cast<int64_t>(1 + random() % 50)};
      storage.emplace_back(static_cast<size_t>(shape[0] * shape[1]));
      for (float& value : storage.back()) value = static_cast<float>(random());
      const absl::Span<const std::byte> bytes = {
          reinterpret_cast<const std::byte*>(storage.back().data()), storage.back().size() * 4};
      ASSERT_EQ(writer->Add(absl::StrCat("t.", i), DType::kF32, shape, bytes), absl::OkStatus());
      expected.push_back({absl::StrCat("t.", i), DType::kF32, shape, bytes});
    }
    ASSERT_EQ(writer->Finish(), absl::OkStatus());
  }
  const auto file = SafetensorsFile::Open(dir.Sub("t.safetensors"));
  ASSERT_EQ(file.status(), absl::OkStatus());
  ASSERT_EQ(file->tensors().size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(file->tensors()[i].name, expected[i].name);
    EXPECT_EQ(file->tensors()[i].shape, expected[i].shape);
    EXPECT_EQ(file->tensors()[i].bytes, expected[i].bytes);
  }
  // Mapped tensors start on a cache line where their sizes allow it.
  EXPECT_EQ(reinterpret_cast<uintptr_t>(file->tensors()[0].bytes.data()) % 64, 0u);
}

TEST(SafetensorsWriterTest, RefusesWhatTheReaderWould) {
  TempDir dir;
  auto writer = SafetensorsWriter::Create(dir.Sub("t.safetensors"), 0);
  ASSERT_EQ(writer.status(), absl::OkStatus());
  const std::byte bytes[8] = {};
  const auto add = [&](const char* name, DType dtype, std::vector<int64_t> shape, size_t size) {
    return std::string(writer->Add(name, dtype, shape, {bytes, size}).message());
  };
  EXPECT_EQ(add("a", DType::kU8, {3}, 3), "");
  EXPECT_THAT(add("a", DType::kU8, {1}, 1), HasSubstr("t.safetensors: a: added twice"));
  EXPECT_THAT(add("b", DType::kF32, {1}, 4), HasSubstr("b: would not be aligned"));
  EXPECT_THAT(add("b", DType::kU8, {4}, 3), HasSubstr("b: U8 [4] does not fit 3 bytes"));
  EXPECT_THAT(add("b\"", DType::kU8, {1}, 1), HasSubstr("not a plain name"));
  std::string full;
  for (int i = 0; i < 10 && full.empty(); ++i) {
    full = add(absl::StrCat("more.", i).c_str(), DType::kU8, {1}, 1);
  }
  EXPECT_THAT(full, HasSubstr("no room in the header"));
  EXPECT_FALSE(writer->HasRoomFor("more"));
  ASSERT_EQ(writer->Finish(), absl::OkStatus());
  EXPECT_EQ(SafetensorsFile::Open(dir.Sub("t.safetensors")).status(), absl::OkStatus());
  EXPECT_TRUE(
      absl::IsAlreadyExists(SafetensorsWriter::Create(dir.Sub("t.safetensors"), 0).status()));
}

}  // namespace
}  // namespace mobi
