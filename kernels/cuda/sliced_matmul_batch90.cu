// Launch of the decode path for many tokens on compute capability 9.0: how rows and columns are
// cut, where images, sums and arrivals are in the workspace. More tokens than it holds images of
// take several rounds.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/sliced_matmul_batch90.cuh"
#include "kernels/cuda/sliced_matmul_launch.h"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

// Cuts the segments' rows into tiles of plan.tile_units units; returns how many.
int CutRows(const SlicedProblem& problem, Batch90Plan& plan) {
  int begin = 0, tiles = 0;
  for (int s = 0; s < kMaxSegments; ++s) {
    const int units = DivideUp(problem.segment_tiles[s] - begin, kUnitTiles);
    tiles += DivideUp(units, plan.tile_units);
    plan.segment_tiles[s] = tiles;
    begin = problem.segment_tiles[s];
  }
  return tiles;
}

// How long a launch takes, about, in cycles. Measured on an H200.
int CostOf(int groups, int blocks, int num_sms, const Batch90Plan& plan) {
  constexpr int kGroupCycles[kBatchWarpgroups] = {1700, 2000, 2400, 2800};
  constexpr int kStart = 4000, kSums = 6000;  // those of several blocks
  const int cycles =
      kStart + DivideUp(groups, 1 << plan.splits_log) * kGroupCycles[plan.tile_units - 1];
  return DivideUp(blocks, num_sms) * cycles + (plan.splits_log > 0 ? kSums : 0);
}

// A stretch of the workspace for each of its users, one after another.
struct Workspace {
  uint8_t* next;
  size_t left;

  template <typename T>
  bool Take(int64_t count, T** to) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    if (bytes > left) return false;
    *to = reinterpret_cast<T*>(next);
    next += bytes;
    left -= bytes;
    return true;
  }
};

template <int N>
bool TakeWorkspace(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, int tiles,
                   Batch90Plan& plan) {
  Workspace space{static_cast<uint8_t*>(launch.workspace), launch.workspace_bytes};
  const int64_t token_blocks = DivideUp(problem.num_tokens, N);
  const int64_t columns = token_blocks * N * problem.groups;
  plan.x.groups = problem.groups;
  if (!space.Take(columns * kImageTokenBytes, &plan.x.bytes) ||
      !space.Take(columns, &plan.x.terms)) {
    return false;
  }
  plan.x.num_arrivals = 0;
  if (plan.splits_log == 0) return true;
  const int64_t units = token_blocks * tiles * plan.tile_units;
  plan.x.num_arrivals = static_cast<int>(units);
  return space.Take(units, &plan.x.arrivals) &&
         space.Take(units * kParts * BatchWarp90<N>::kVectors * 128, &plan.sums);
}

// The cut that takes the least time. Blocks that wait for one another must all be resident.
template <int N>
bool MakePlan(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, Batch90Plan* best) {
  const int token_blocks = DivideUp(problem.num_tokens, N);
  int least = 0;
  for (int splits_log = 0; splits_log <= kPartsLog; ++splits_log) {
    for (int units = 1; units <= kBatchWarpgroups; ++units) {
      Batch90Plan plan;
      plan.tile_units = units;
      plan.splits_log = splits_log;
      const int tiles = CutRows(problem, plan);
      const int blocks = (tiles << splits_log) * token_blocks;
      if (splits_log > 0 && blocks > launch.num_sms) continue;
      const int cost = CostOf(problem.groups, blocks, launch.num_sms, plan);
      if ((least > 0 && cost >= least) || !TakeWorkspace<N>(launch, problem, tiles, plan)) continue;
      least = cost;
      *best = plan;
    }
  }
  return least > 0;
}

template <int N>
cudaError_t LaunchProduct(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                          const RouteParams& route, Batch90Plan& plan) {
  const bool splits = plan.splits_log > 0;
  static_assert(Batch90Shared<N>::Bytes(2, false) <= kSharedBytes);  // BatchBlock90::FeedColumns
  plan.x_stages = Batch90Shared<N>::kMostStages;
  while (Batch90Shared<N>::Bytes(plan.x_stages, splits) > kSharedBytes) --plan.x_stages;
  const int tiles = plan.segment_tiles[kMaxSegments - 1];
  return LaunchSliced(
      launch, BatchKernel90<N>, dim3(tiles << plan.splits_log, DivideUp(problem.num_tokens, N)),
      kBatchThreads, Batch90Shared<N>::Bytes(plan.x_stages, splits), problem, plan, route);
}

// As many tokens at a time as half of the workspace holds images of.
template <int N>
int TokensOfRound(const SlicedMatmulLaunch& launch, const SlicedProblem& problem) {
  const size_t block_bytes = size_t{kGroupBytes<N> + Batch90Shared<N>::kTermBytes} * problem.groups;
  const size_t blocks = std::max<size_t>(launch.workspace_bytes / 2 / block_bytes, 1);
  return static_cast<int>(std::min<size_t>(blocks * N, problem.num_tokens));
}

template <int N>
cudaError_t LaunchTokens(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                         const RouteParams& route, LeaveImages leave_images) {
  const int round = TokensOfRound<N>(launch, problem);
  for (int first = 0; first < problem.num_tokens; first += round) {
    const SlicedProblem some =
        TokensOf(problem, first, std::min(round, problem.num_tokens - first));
    Batch90Plan plan;
    if (!MakePlan<N>(launch, some, &plan)) return cudaErrorInvalidValue;
    cudaError_t error = leave_images(some, plan.x);
    if (error == cudaSuccess) error = LaunchProduct<N>(launch, some, route, plan);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Calls with the tokens of a block as a template argument.
template <typename Call>
auto ForBlocks(int num_tokens, const Call& call) {
  return num_tokens <= 32 ? call.template operator()<32>() : call.template operator()<64>();
}

}  // namespace

bool CanBeOneRoundOfBatch90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem) {
  return problem.groups >= kParts && ForBlocks(problem.num_tokens, [&]<int N>() {
           Batch90Plan plan;
           return TokensOfRound<N>(launch, problem) == problem.num_tokens &&
                  MakePlan<N>(launch, problem, &plan);
         });
}

cudaError_t LaunchSlicedBatch90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                const RouteParams& route, LeaveImages leave_images) {
  return ForBlocks(problem.num_tokens,
                   [&]<int N>() { return LaunchTokens<N>(launch, problem, route, leave_images); });
}

cudaError_t LaunchSlicedBatch90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                DType x_type) {
  auto* const kernel = x_type == DType::kBF16 ? BatchImageKernel<true> : BatchImageKernel<false>;
  const auto leave_images = [&](const SlicedProblem& some, const BatchImages& images) {
    const dim3 blocks(some.groups, DivideUp(some.num_tokens, kImageTokens));
    return LaunchSliced(launch, kernel, blocks, kImageThreads, 0, some, images);
  };
  return LaunchSlicedBatch90(launch, problem, RouteParams{}, leave_images);
}

}  // namespace mobi::cuda
