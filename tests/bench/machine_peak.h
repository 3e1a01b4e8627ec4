// What this machine's CPU can do at most, measured beside the kernels: fused multiply-adds in
// registers and a pure read of memory, on the same threads and SIMD target as the CPU backend.
#ifndef MOBI_TESTS_BENCH_MACHINE_PEAK_H_
#define MOBI_TESTS_BENCH_MACHINE_PEAK_H_

#include <cstddef>
#include <memory>

namespace mobi {

class MachinePeak {
 public:
  explicit MachinePeak(int num_threads);
  ~MachinePeak();

  // Floating-point operations of one RunFma, bytes of one RunRead (far more than the caches hold).
  double fma_flop() const;
  double read_bytes() const;
  void RunFma();
  void RunRead();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mobi

#endif  // MOBI_TESTS_BENCH_MACHINE_PEAK_H_
