// Launch of the decode path on compute capability 9.0: tokens per block, size of clusters, cut of
// the rows, what fits in shared memory.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/sliced_matmul_decode90.cuh"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

constexpr int kSharedBytes = 227 * 1024;  // of a block that has a multiprocessor for itself
constexpr int kFewestStages = 2;

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// Lays out shared memory for plan.stages.
template <int N, int W>
void LayOut(int groups, Decode90Plan& plan) {
  int at = 0;
  const auto take = [&at](int bytes) {
    const int begin = at;
    at += (bytes + 127) / 128 * 128;
    return begin;
  };
  const int parts = 1 << plan.parts_log;
  take(groups * N * kGroupSize * 2);
  plan.ring = take(4 * W * plan.stages * kWarpStageBytes);
  plan.sums = take(groups * N * 4);
  plan.bias = take(groups * N * 8);
  plan.unit = take(groups * N * 4);
  plan.buffers = take(plan.round_units * 2 * kParts * parts * kChunkRows * N * 4);
  plan.levels = take(kMaxSegments * N);
  plan.barriers = take((4 * W * kMaxStages + 2 * W) * 8);
  plan.shared_bytes = at;
}

// As many stages as fit.
template <int N, int W>
bool FitShared(const SlicedProblem& problem, Decode90Plan& plan) {
  const int groups = CeilDiv(problem.groups << plan.parts_log, kParts);
  for (plan.stages = kMaxStages; plan.stages >= kFewestStages; --plan.stages) {
    LayOut<N, W>(groups, plan);
    if (plan.shared_bytes <= kSharedBytes) return true;
  }
  return false;
}

// Clusters per block of tokens: all at once, so that weights are read once, unless that leaves a
// quarter of the machine idle.
int CountClusters(int resident, int token_blocks, int units) {
  const int count = std::clamp(resident / token_blocks, 1, units);
  const int waves = CeilDiv(token_blocks * count, resident);
  const bool idle = 4 * token_blocks * count < 3 * waves * resident;
  return idle ? std::min(resident, units) : count;
}

// The size of clusters that leaves the busiest multiprocessor the least to do.
template <int N, int W>
bool MakePlan(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, int* clusters,
              Decode90Plan& best) {
  const int units = CeilDiv(problem.rows, kUnitRows);
  const int token_blocks = CeilDiv(problem.num_tokens, N);
  int least = 0;
  for (int parts_log = 0; parts_log <= 2 && W % (1 << parts_log) == 0; ++parts_log) {
    const int resident = launch.clusters[kPartsLog - parts_log];
    Decode90Plan plan;
    plan.parts_log = parts_log;
    plan.round_units = W >> parts_log;
    while (2 << plan.pairs_log < std::min(problem.num_tokens, N)) ++plan.pairs_log;
    const int count = CountClusters(resident, token_blocks, units);
    plan.run_units = units / count;
    plan.long_runs = units % count;
    plan.rounds = CeilDiv(plan.run_units, plan.round_units);
    plan.long_rounds = CeilDiv(plan.run_units + 1, plan.round_units);
    const int waves = CeilDiv(token_blocks * count, resident);
    const int most = waves * CeilDiv(units, count) << parts_log;
    if (!FitShared<N, W>(problem, plan) || (least > 0 && most >= least)) continue;
    least = most;
    best = plan;
    *clusters = count;
  }
  return least > 0;
}

template <int N, int W, bool kBf16>
cudaLaunchConfig_t Configure(const SlicedMatmulLaunch& launch, const Decode90Plan& plan,
                             int clusters, int token_blocks, cudaLaunchAttribute* attributes) {
  const unsigned size = kParts >> plan.parts_log;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {size, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * size, token_blocks);
  config.blockDim = dim3(128 * W);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = launch.pdl ? 2 : 1;
  return config;
}

template <int N, int W, bool kBf16>
cudaError_t LaunchKernel(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                         int clusters, const Decode90Plan& plan) {
  auto* kernel = SlicedDecode90Kernel<N, W, kBf16>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config =
      Configure<N, W, kBf16>(launch, plan, clusters, CeilDiv(problem.num_tokens, N), attributes);
  return cudaLaunchKernelEx(&config, kernel, problem, plan);
}

// The fewest tokens per block that hold them all, or the most whose x fits; false: none does.
template <int N, int W>
bool TryLaunch(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, bool bf16,
               cudaError_t* error) {
  Decode90Plan plan;
  int clusters;
  if (N > 8 && problem.num_tokens <= N / 2) return false;
  if (!MakePlan<N, W>(launch, problem, &clusters, plan)) return false;
  *error = bf16 ? LaunchKernel<N, W, true>(launch, problem, clusters, plan)
                : LaunchKernel<N, W, false>(launch, problem, clusters, plan);
  return true;
}

}  // namespace

cudaError_t FindClusterLimits(int compute_capability, int num_sms, int (&clusters)[4]) {
  std::fill(clusters, clusters + 4, 0);
  if (compute_capability != 90) return cudaSuccess;
  auto* kernel = SlicedDecode90Kernel<64, 3, false>;  // one block to a multiprocessor
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  clusters[0] = num_sms;
  for (int log = 1; log <= kPartsLog && error == cudaSuccess; ++log) {
    SlicedMatmulLaunch launch;
    Decode90Plan plan;
    plan.parts_log = kPartsLog - log;
    plan.shared_bytes = kSharedBytes;
    cudaLaunchAttribute attributes[2] = {};
    const cudaLaunchConfig_t config =
        Configure<64, 3, false>(launch, plan, num_sms >> log, 1, attributes);
    error = cudaOccupancyMaxActiveClusters(&clusters[log], kernel, &config);
  }
  return error;
}

bool LaunchSlicedDecode90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                          DType x_type, cudaError_t* error) {
  const bool bf16 = x_type == DType::kBF16;
  if (problem.groups < kParts || launch.clusters[kPartsLog] == 0) return false;
  return TryLaunch<64, 3>(launch, problem, bf16, error) ||
         TryLaunch<32, 4>(launch, problem, bf16, error) ||
         TryLaunch<32, 3>(launch, problem, bf16, error) ||
         TryLaunch<16, 4>(launch, problem, bf16, error) ||
         TryLaunch<8, 4>(launch, problem, bf16, error);
}

}  // namespace mobi::cuda
