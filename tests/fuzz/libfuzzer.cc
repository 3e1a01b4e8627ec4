// libFuzzer's entry point.
#include "tests/fuzz/fuzz_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  mobi::FuzzOne(data, size);
  return 0;
}
