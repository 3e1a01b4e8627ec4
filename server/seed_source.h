// Seeds and request ids for requests that bring none: a counter from a random start, mixed, so that
// no two of a process are equal. Thread-safe.
// Source: splitmix64, Steele et al., "Fast splittable pseudorandom number generators", 2014.
#ifndef MOBI_SERVER_SEED_SOURCE_H_
#define MOBI_SERVER_SEED_SOURCE_H_

#include <atomic>
#include <cstdint>
#include <random>

namespace mobi {

class SeedSource {
 public:
  SeedSource() {
    std::random_device device;
    state_ = (uint64_t{device()} << 32) | device();
  }
  explicit SeedSource(uint64_t start) : state_(start) {}

  uint64_t Next() {
    uint64_t z = state_.fetch_add(0x9E3779B97F4A7C15, std::memory_order_relaxed);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }

 private:
  std::atomic<uint64_t> state_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_SEED_SOURCE_H_
