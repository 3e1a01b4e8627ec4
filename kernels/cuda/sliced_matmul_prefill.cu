// Launch of the prefill path: the order of the tokens, then the product, in tiles that fill the
// machine.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/sliced_matmul_prefill.cuh"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

cudaError_t Launch(const SlicedMatmulLaunch& launch, const void* kernel, int blocks, int threads,
                   int shared_bytes, void** arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = launch.pdl ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

int CountRowBlocks(const SlicedProblem& problem, int rows, int* segment_blocks) {
  int begin = 0, blocks = 0;
  for (int s = 0; s < kMaxSegments; ++s) {
    blocks += CeilDiv((problem.segment_tiles[s] - begin) * kTileRows, rows);
    if (segment_blocks != nullptr) segment_blocks[s] = blocks;
    begin = problem.segment_tiles[s];
  }
  return blocks;
}

template <int BM, int BN, bool kBf16>
cudaError_t LaunchTiles(const SlicedMatmulLaunch& launch, SlicedProblem problem,
                        TokenOrder tokens) {
  PrefillPlan plan;
  plan.tokens = tokens;
  plan.token_tiles = CeilDiv(problem.num_tokens, BN) + std::min(problem.num_tokens, kNumLevels) - 1;
  const int blocks = CountRowBlocks(problem, BM, plan.segment_blocks);
  void* arguments[] = {&problem, &plan};
  return Launch(launch, reinterpret_cast<const void*>(SlicedPrefillKernel<BM, BN, kBf16>),
                blocks * plan.token_tiles, (BM / 64 + 1) * kWarpgroup,
                PrefillShared<BM, BN>::kBytes, arguments);
}

// How long a tiling takes, in units of one multiprocessor's time for 64 x 64 outputs: waves times
// what a multiprocessor does in one. Small tiles read more shared memory per product.
double CostOf(const SlicedProblem& problem, int num_sms, int rows, int tokens, int per_sm,
              double efficiency) {
  const int tiles = CountRowBlocks(problem, rows, nullptr) * CeilDiv(problem.num_tokens, tokens);
  const double size = rows / 64.0 * tokens / 64.0 / efficiency;
  const int full = tiles / (num_sms * per_sm), rest = tiles % (num_sms * per_sm);
  return (full * per_sm + CeilDiv(rest, num_sms)) * size;
}

template <bool kBf16>
cudaError_t LaunchBest(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                       const TokenOrder& tokens) {
  const double large = CostOf(problem, launch.num_sms, 128, 256, 1, 1.0);
  const double medium = CostOf(problem, launch.num_sms, 64, 128, 2, 0.75);
  const double small = CostOf(problem, launch.num_sms, 64, 64, 2, 0.5);
  if (large <= medium && large <= small) {
    return LaunchTiles<128, 256, kBf16>(launch, problem, tokens);
  }
  if (medium <= small) return LaunchTiles<64, 128, kBf16>(launch, problem, tokens);
  return LaunchTiles<64, 64, kBf16>(launch, problem, tokens);
}

}  // namespace

size_t SlicedPrefillWorkspaceBytes(int compute_capability, int64_t, int64_t max_tokens) {
  if (compute_capability != 90) return 0;
  return kMaxSegments * (max_tokens + kNumLevels + 1) * sizeof(int32_t);
}

cudaError_t LaunchSlicedPrefill(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                DType x_type) {
  TokenOrder tokens;
  tokens.start = static_cast<int32_t*>(launch.workspace);
  tokens.order = tokens.start + kMaxSegments * (kNumLevels + 1);
  SlicedProblem copy = problem;
  void* arguments[] = {&copy, &tokens};
  const cudaError_t error =
      Launch(launch, reinterpret_cast<const void*>(SlicedSortKernel<kSortThreads>),
             problem.num_segments, kSortThreads, 0, arguments);
  if (error != cudaSuccess) return error;
  return x_type == DType::kF16 ? LaunchBest<false>(launch, problem, tokens)
                               : LaunchBest<true>(launch, problem, tokens);
}

}  // namespace mobi::cuda
