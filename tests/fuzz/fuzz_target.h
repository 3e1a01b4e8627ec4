// What every NAME_fuzz.cc of this folder defines. It is built twice: with -DMOBI_FUZZ=ON and clang
// as a libFuzzer program, and always as a test that feeds it a few thousand mutations of its seeds,
// the same on every run.
#ifndef MOBI_TESTS_FUZZ_FUZZ_TARGET_H_
#define MOBI_TESTS_FUZZ_FUZZ_TARGET_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mobi {

// True when the input was accepted as good. A crash, a sanitizer's report or abort() is a finding.
bool FuzzOne(const uint8_t* data, size_t size);

// Inputs that are accepted, each of which takes another way through the code.
std::vector<std::string> FuzzSeeds();

}  // namespace mobi

#endif  // MOBI_TESTS_FUZZ_FUZZ_TARGET_H_
