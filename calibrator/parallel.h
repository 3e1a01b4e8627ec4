// Splits independent work over threads. Each index is done exactly once and by one thread, so that
// results do not depend on the number of threads. Not reentrant: call it from one thread.
#ifndef MOBI_CALIBRATOR_PARALLEL_H_
#define MOBI_CALIBRATOR_PARALLEL_H_

#include <cstdint>

#include "absl/functional/function_ref.h"

namespace mobi {

// Runs body(index) for 0 <= index < count on `num_threads` threads, the caller's included. Products
// inside the body use one BLAS thread each; `num_threads` is restored when it returns.
void ParallelFor(int num_threads, int64_t count, absl::FunctionRef<void(int64_t)> body);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_PARALLEL_H_
