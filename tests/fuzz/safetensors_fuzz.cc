#include <cstdlib>
#include <cstring>

#include "engine/safetensors.h"
#include "tests/fuzz/fuzz_target.h"

namespace {

std::string Image(std::string header, size_t data_size) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string image(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(image.data(), &length, sizeof(length));
  return image + header + std::string(data_size, 'x');
}

void Require(bool condition) {
  if (!condition) abort();
}

}  // namespace

namespace mobi {

bool FuzzOne(const uint8_t* data, size_t size) {
  // Aligned, and not a byte longer than the input, so that reading past the end is seen.
  void* memory = nullptr;
  Require(posix_memalign(&memory, 64, size == 0 ? 1 : size) == 0);
  if (size > 0) std::memcpy(memory, data, size);
  const absl::Span<const std::byte> bytes(static_cast<const std::byte*>(memory), size);
  const auto tensors = ParseSafetensors(bytes, "fuzz");
  if (tensors.ok()) {
    // The promise to everyone who reads a tensor: inside of the file, one after the other, whole.
    const std::byte* end = nullptr;
    for (const HostTensor& tensor : *tensors) {
      int64_t elements = 1;
      for (const int64_t dimension : tensor.shape) elements *= dimension;
      Require(tensor.num_elements() == elements);
      Require(tensor.bytes.size() == static_cast<size_t>(elements) * SizeOf(tensor.dtype));
      Require(end == nullptr || tensor.bytes.data() == end);
      Require(tensor.bytes.data() >= bytes.data());
      end = tensor.bytes.data() + tensor.bytes.size();
    }
    Require(tensors->empty() || end == bytes.data() + size);
  } else {
    Require(tensors.status().message().find('\n') == absl::string_view::npos);
  }
  free(memory);
  return tensors.ok();
}

std::vector<std::string> FuzzSeeds() {
  return {Image("{}", 0),
          Image(R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
                R"("b":{"dtype":"U8","shape":[8],"data_offsets":[16,24]}})",
                24),
          Image(R"({"__metadata__":{"format":"pt"},)"
                R"("w":{"dtype":"BF16","shape":[1,2,3],"data_offsets":[4,16]},)"
                R"("s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
                R"("empty":{"dtype":"F16","shape":[0,7],"data_offsets":[16,16]}})",
                16),
          Image(R"({"i":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}})", 4)};
}

}  // namespace mobi
