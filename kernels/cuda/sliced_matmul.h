// The sliced matmul on CUDA: out[token] = W_level(token, segment) x[token], levels read on the
// device. Called by the CUDA backend inside a step. Host code, one thread per device; nothing is
// allocated and nothing waits for the device, so launches may be captured in a graph. Source:
// MoBiQuant (arXiv 2602.20191) for slices and levels; kernels/bit_slice.h for the packing.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_H_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "absl/functional/function_ref.h"
#include "kernels/cuda/prefill_image.h"
#include "kernels/sliced_weight.h"
#include "kernels/tensor.h"

namespace mobi::cuda {

// Which kernel computes. Each gives a token the same bits alone and in any company, at any number
// of tokens; the two differ from each other by rounding. A caller that promises batch invariance
// therefore chooses by something that a request alone decides (StepKey::num_short), never by the
// size of the batch.
enum class SlicedMatmulPath : uint8_t {
  kDecode,   // any number of tokens; made for 1 to 64, where reading weights is the cost
  kPrefill,  // any number of tokens; made for more. kDecode except on 9.0
};

struct SlicedMatmulLaunch {
  cudaStream_t stream = nullptr;
  int num_sms = 0;
  int compute_capability = 0;  // 10 * major + minor: 80, 89, 90
  SlicedMatmulPath path = SlicedMatmulPath::kDecode;
  // Programmatic dependent launch (9.0 and newer): the kernel may start while the one before it
  // still runs, and waits before it touches memory.
  // Every kernel of the chain must wait likewise (griddepcontrol.wait) before it ends.
  bool pdl = false;
  // clusters[i]: how many clusters of 2^i blocks the device holds at a time, one block to a
  // multiprocessor (FindClusterLimits). Only for 9.0.
  int clusters[4] = {};
  // For kPrefill: 2 KiB for every column of x and segment of the weight at least, and 2 bytes more
  // a token for all of them in one round. For more than 16 tokens of kDecode: 136 bytes for every
  // column at least. Aligned to 256 bytes; contents need not survive between calls.
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

// SlicedMatmulLaunch::clusters of the current device.
cudaError_t FindClusterLimits(int compute_capability, int num_sms, int (&clusters)[4]);

// x [num_tokens, cols] fp16 or bf16 -> out [num_tokens, rows] fp16, bf16 or fp32; fp32 sums.
// levels[segment * levels_stride + token] in 1..4, on the device; with levels_stride 0 they are
// read while the kernels before it still run. Only slices up to the highest level of a segment in
// the batch (in a tile of tokens, for kPrefill) are read.
// cudaErrorInvalidValue: a shape, stride, alignment (x: 16 bytes, columns a multiple of
// kGroupSize, segments of whole row tiles), dtype or workspace that the kernels cannot take.
cudaError_t LaunchSlicedMatmul(const SlicedMatmulLaunch& launch, const Tensor& x,
                               const SlicedWeight& weight, const uint8_t* levels,
                               int64_t levels_stride, const Tensor& out);

// kPrefill's kernel for tokens that all read `level`, and whose x is left in images in the
// workspace by what `leave` enqueues; of x only the shape matters. The bits are the same.
using LeavePrefillImages = absl::FunctionRef<cudaError_t(PrefillImages images)>;
bool TakesPrefillImages(const SlicedMatmulLaunch& launch, const Tensor& x,
                        const SlicedWeight& weight, const Tensor& out);
cudaError_t LaunchSlicedMatmul(const SlicedMatmulLaunch& launch, const Tensor& x,
                               const SlicedWeight& weight, int level, LeavePrefillImages leave,
                               const Tensor& out);

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_H_
