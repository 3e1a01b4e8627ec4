// The entry of the sliced matmul: checks the arguments, states the problem, chooses the path.
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/sliced_matmul.h"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

bool IsActivation(DType dtype) { return dtype == DType::kF16 || dtype == DType::kBF16; }

bool Aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

bool Valid(const Tensor& x, const SlicedWeight& weight, const Tensor& out) {
  if (weight.rows <= 0 || weight.rows % kTileRows != 0) return false;
  if (weight.cols <= 0 || weight.cols % kGroupSize != 0) return false;
  // Tiles are counted in 32 bits.
  if (weight.rows / kTileRows * (weight.cols / kGroupSize) > INT32_MAX) return false;
  if (weight.num_segments < 1 || weight.num_segments > kMaxSegments) return false;
  int64_t begin = 0;
  for (int s = 0; s < weight.num_segments; ++s) {
    const int64_t end = weight.segment_end[s];
    if (end <= begin || end % kTileRows != 0) return false;
    begin = end;
  }
  if (begin != weight.rows) return false;
  for (const uint8_t* slice : weight.slices) {
    if (!Aligned(slice, 16)) return false;
  }
  for (const uint16_t* scales : weight.scales) {
    if (!Aligned(scales, 16)) return false;
  }
  const bool out_type = IsActivation(out.dtype) || out.dtype == DType::kF32;
  return IsActivation(x.dtype) && out_type && x.cols == weight.cols && out.cols == weight.rows &&
         x.rows == out.rows && x.rows <= INT32_MAX && x.stride % 8 == 0 && Aligned(x.data, 16);
}

}  // namespace

bool StateProblem(const Tensor& x, const SlicedWeight& weight, const uint8_t* levels,
                  int64_t levels_stride, const Tensor& out, SlicedProblem* to) {
  if (!Valid(x, weight, out)) return false;
  SlicedProblem& problem = *to;
  for (int s = 0; s < kNumSlices; ++s) {
    problem.slices[s] = reinterpret_cast<const uint4*>(weight.slices[s]);
    problem.scales[s] = reinterpret_cast<const uint4*>(weight.scales[s]);
  }
  problem.rows = static_cast<int>(weight.rows);
  problem.groups = static_cast<int>(weight.cols / kGroupSize);
  problem.num_segments = weight.num_segments;
  for (int s = 0; s < kMaxSegments; ++s) {
    const int64_t end = s < weight.num_segments ? weight.segment_end[s] : weight.rows;
    problem.segment_tiles[s] = static_cast<int>(end / kTileRows);
  }
  problem.x = static_cast<const uint16_t*>(x.data);
  problem.x_stride = x.stride;
  problem.num_tokens = static_cast<int>(x.rows);
  problem.levels = levels;
  problem.levels_stride = levels_stride;
  problem.out = out.data;
  problem.out_stride = out.stride;
  problem.out_type = out.dtype;
  return true;
}

SlicedProblem TokensOf(const SlicedProblem& problem, int first, int count) {
  SlicedProblem some = problem;
  some.num_tokens = count;
  some.x += first * problem.x_stride;
  some.levels += first;
  some.out = static_cast<std::byte*>(problem.out) +
             first * problem.out_stride * static_cast<int64_t>(SizeOf(problem.out_type));
  return some;
}

cudaError_t LaunchSlicedMatmul(const SlicedMatmulLaunch& launch, const Tensor& x,
                               const SlicedWeight& weight, const uint8_t* levels,
                               int64_t levels_stride, const Tensor& out) {
  if (x.rows == 0) return cudaSuccess;
  SlicedProblem problem;
  if (!StateProblem(x, weight, levels, levels_stride, out, &problem)) return cudaErrorInvalidValue;
  const bool prefill = launch.path == SlicedMatmulPath::kPrefill && launch.compute_capability == 90;
  return prefill ? LaunchSlicedPrefill(launch, problem, x.dtype)
                 : LaunchSlicedDecode(launch, problem, x.dtype);
}

bool TakesPrefillImages(const SlicedMatmulLaunch& launch, const Tensor& x,
                        const SlicedWeight& weight, const Tensor& out) {
  SlicedProblem problem;
  return launch.compute_capability == 90 && x.rows > 0 &&
         StateProblem(x, weight, nullptr, 0, out, &problem) && FitsPrefillImages(launch, problem);
}

cudaError_t LaunchSlicedMatmul(const SlicedMatmulLaunch& launch, const Tensor& x,
                               const SlicedWeight& weight, int level, LeavePrefillImages leave,
                               const Tensor& out) {
  SlicedProblem problem;
  if (launch.compute_capability != 90 || x.rows == 0 ||
      !StateProblem(x, weight, nullptr, 0, out, &problem)) {
    return cudaErrorInvalidValue;
  }
  return LaunchSlicedPrefill(launch, problem, x.dtype, level, leave);
}

}  // namespace mobi::cuda
