// Backend::Route for the CPU: the router's first layer as a dense product, the small second layer
// and the choice of levels in plain loops.
#ifndef MOBI_KERNELS_CPU_ROUTE_H_
#define MOBI_KERNELS_CPU_ROUTE_H_

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/workspace.h"

namespace mobi::cpu {

// x fp32; see Backend::Route. Uses the workspace's results beside what DenseMatmul uses.
void Route(ThreadPool& pool, Workspace& workspace, Tensor x, const RoutedWeight& linear,
           const RoutingBatch& batch, uint8_t* levels, int64_t levels_stride);

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_ROUTE_H_
