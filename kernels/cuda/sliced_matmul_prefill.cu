// Launch of the prefill path: x packed in the order of levels, or left in images by the op before,
// then the product in tiles that fill the machine. More tokens than the workspace holds images of
// take several rounds.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/sliced_matmul_launch.h"
#include "kernels/cuda/sliced_matmul_prefill.cuh"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

int CountRowBlocks(const SlicedProblem& problem, int* segment_blocks) {
  int begin = 0, blocks = 0;
  for (int s = 0; s < kMaxSegments; ++s) {
    blocks += DivideUp((problem.segment_tiles[s] - begin) * kTileRows, kPrefillRows);
    if (segment_blocks != nullptr) segment_blocks[s] = blocks;
    begin = problem.segment_tiles[s];
  }
  return blocks;
}

// Tiles of BN tokens that one segment may need: every level may leave one half empty.
int MostTokenTiles(int num_tokens, int bn) {
  return DivideUp(num_tokens, bn) + std::min(num_tokens, kNumLevels) - 1;
}

// ---- Workspace: order, starts, images.

int64_t OrderBytes(int64_t num_tokens) {
  return (kMaxSegments * (num_tokens + kStartsOfSegment) * 4 + 255) / 256 * 256;
}
int64_t ImageBytes(const SlicedProblem& problem, int64_t tiles, int bn) {
  return tiles * bn * problem.groups * kGroupSize * 2;
}

template <int BN>
cudaError_t LaunchPack(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                       const PrefillPlan& plan) {
  const dim3 grid(plan.orders * plan.token_tiles * (BN / kPackTokens),
                  DivideUp(problem.groups, kPackGroups));
  return LaunchSliced(launch, SlicedPackKernel<BN>, grid, kPackThreads, 0, problem, plan);
}

template <int BN, bool kBf16>
cudaError_t LaunchTiles(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                        PrefillPlan plan, const LeavePrefillImages* leave) {
  plan.token_tiles =
      plan.level > 0 ? DivideUp(problem.num_tokens, BN) : MostTokenTiles(problem.num_tokens, BN);
  const int row_blocks = CountRowBlocks(problem, plan.segment_blocks);
  const cudaError_t error =
      leave != nullptr
          ? (*leave)({.bytes = plan.images, .tile_tokens = BN, .groups = problem.groups})
          : LaunchPack<BN>(launch, problem, plan);
  if (error != cudaSuccess) return error;
  const int blocks = std::min(row_blocks * plan.token_tiles, launch.num_sms);
  return LaunchSliced(launch, SlicedPrefillKernel<BN, kBf16>, dim3(blocks), kPrefillThreads,
                      PrefillShared<BN>::kBytes, problem, plan);
}

// How long tiles of BN tokens take, in cycles per group of columns; `cycles`: of one tile, measured
// with 4096 columns on an H200.
template <int BN>
int CostOf(const SlicedProblem& problem, int num_sms, int cycles) {
  const int tiles = CountRowBlocks(problem, nullptr) * DivideUp(problem.num_tokens, BN);
  return DivideUp(tiles, num_sms) * cycles;
}

template <bool kBf16>
cudaError_t LaunchBest(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                       const PrefillPlan& plan, const LeavePrefillImages* leave) {
  const int large = CostOf<256>(problem, launch.num_sms, 3400);
  const int medium = CostOf<128>(problem, launch.num_sms, 2050);
  const int small = CostOf<64>(problem, launch.num_sms, 1400);
  if (large <= medium && large <= small) {
    return LaunchTiles<256, kBf16>(launch, problem, plan, leave);
  }
  if (medium <= small) return LaunchTiles<128, kBf16>(launch, problem, plan, leave);
  return LaunchTiles<64, kBf16>(launch, problem, plan, leave);
}

cudaError_t LaunchBest(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, DType x_type,
                       const PrefillPlan& plan, const LeavePrefillImages* leave = nullptr) {
  return x_type == DType::kF16 ? LaunchBest<false>(launch, problem, plan, leave)
                               : LaunchBest<true>(launch, problem, plan, leave);
}

}  // namespace

cudaError_t LaunchSlicedPrefill(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                DType x_type) {
  PrefillPlan plan;
  plan.orders = problem.levels_stride == 0 ? 1 : problem.num_segments;
  int round = std::min(problem.num_tokens, kMostPackTokens);
  while (OrderBytes(round) +
             ImageBytes(problem, int64_t{plan.orders} * MostTokenTiles(round, 256), 256) >
         static_cast<int64_t>(launch.workspace_bytes)) {
    if (round <= 256) return cudaErrorInvalidValue;
    round = std::max(round / 2, 256);
  }
  plan.start = static_cast<int32_t*>(launch.workspace);
  plan.order = plan.start + kMaxSegments * kStartsOfSegment;
  plan.images = static_cast<uint8_t*>(launch.workspace) + OrderBytes(round);
  for (int first = 0; first < problem.num_tokens; first += round) {
    const SlicedProblem some =
        TokensOf(problem, first, std::min(round, problem.num_tokens - first));
    const cudaError_t error = LaunchBest(launch, some, x_type, plan);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool FitsPrefillImages(const SlicedMatmulLaunch& launch, const SlicedProblem& problem) {
  return ImageBytes(problem, DivideUp(problem.num_tokens, 256), 256) <=
         static_cast<int64_t>(launch.workspace_bytes);
}

cudaError_t LaunchSlicedPrefill(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                DType x_type, int level, LeavePrefillImages leave) {
  if (!FitsPrefillImages(launch, problem)) return cudaErrorInvalidValue;
  PrefillPlan plan;
  plan.level = level;
  plan.images = static_cast<uint8_t*>(launch.workspace);
  return LaunchBest(launch, problem, x_type, plan, &leave);
}

}  // namespace mobi::cuda
