// Checks of the CUDA sliced matmul against float64 on the device: fresh random bits, poisoned
// outputs.
#ifndef MOBI_TESTS_BENCH_SLICED_BENCH_CHECK_CUH_
#define MOBI_TESTS_BENCH_SLICED_BENCH_CHECK_CUH_

#include "sliced_bench_device.cuh"

namespace mobi::cuda {

// All cases of a path, or with `quick` those of small shapes; prints what failed. True: nothing.
bool RunChecks(Machine& machine, SlicedMatmulPath path, bool quick);

}  // namespace mobi::cuda

#endif  // MOBI_TESTS_BENCH_SLICED_BENCH_CHECK_CUH_
