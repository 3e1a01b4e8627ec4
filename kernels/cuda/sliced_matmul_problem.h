// What the sliced matmul kernels are told: shapes and pointers, by value in constant memory. Made
// by sliced_matmul.cu from the arguments of LaunchSlicedMatmul; read by the kernels of both paths.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_PROBLEM_H_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_PROBLEM_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "kernels/cuda/sliced_matmul.h"
#include "kernels/cuda/sliced_matmul_batch90_image.h"
#include "kernels/sliced_weight.h"

namespace mobi::cuda {

struct RouteParams;  // kernels/cuda/route.cuh

struct SlicedProblem {
  const uint4* slices[kNumSlices];  // 32 per tile of 16 x 128
  const uint4* scales[kNumLevels];  // 4 per tile
  int rows = 0;
  int groups = 0;  // columns / kGroupSize
  int num_segments = 0;
  int segment_tiles[kMaxSegments] = {};  // row tiles up to the end of each segment; all, beyond

  const uint16_t* x = nullptr;
  int64_t x_stride = 0;
  int num_tokens = 0;
  const uint8_t* levels = nullptr;
  int64_t levels_stride = 0;

  void* out = nullptr;
  int64_t out_stride = 0;
  DType out_type = DType::kF16;
  // Null, or what out is added to, in out's type: rounded as two ops would.
  void* residual = nullptr;
  int64_t residual_stride = 0;
};

// False: a shape, stride, alignment or dtype that the kernels cannot take.
bool StateProblem(const Tensor& x, const SlicedWeight& weight, const uint8_t* levels,
                  int64_t levels_stride, const Tensor& out, SlicedProblem* problem);

// The same for tokens first .. first + count - 1 alone.
SlicedProblem TokensOf(const SlicedProblem& problem, int first, int count);

// Enqueue one path; the arguments are checked already.
cudaError_t LaunchSlicedDecode(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                               DType x_type);
// The decode path on compute capability 9.0; false: x does not fit, nothing was enqueued.
bool LaunchSlicedDecode90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                          DType x_type, cudaError_t* error);
// The same of more tokens than that takes at once.
cudaError_t LaunchSlicedBatch90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                DType x_type);
// Enqueues what leaves these tokens' x in the images.
using LeaveImages =
    absl::FunctionRef<cudaError_t(const SlicedProblem& some, const BatchImages& images)>;
// route: with losses, which are there when x is, if levels are still to be chosen.
cudaError_t LaunchSlicedBatch90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                const RouteParams& route, LeaveImages leave_images);
// True: it can take all of these tokens, and calls leave_images once.
bool CanBeOneRoundOfBatch90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem);
cudaError_t LaunchSlicedPrefill(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                DType x_type);
// The same where all tokens read `level` and something else leaves their x in the images, in the
// order of tokens; x itself is not read. Only where the images fit.
bool FitsPrefillImages(const SlicedMatmulLaunch& launch, const SlicedProblem& problem);
cudaError_t LaunchSlicedPrefill(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                DType x_type, int level, LeavePrefillImages leave);

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_PROBLEM_H_
