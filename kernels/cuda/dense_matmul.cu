// out = x weight^T. The weight's rows are the 16-row operand of the mma, tokens its 8-wide one. The
// eight warps of a block share the columns in runs of 64; their sums are added in order. So one
// element of the result is one fixed chain of sums, whatever tile of tokens it is computed in.
// Both operands are read straight from global memory, 16 bytes a lane: lane t of a quad takes
// columns 8 t .. 8 t + 7 of every 32, the same of both, and an mma may meet columns in any order.
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRun = 64;  // columns of one warp's turn
constexpr int kRows = 16;

struct DenseParams {
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  void* out;
  int64_t out_stride;
  int64_t num_tokens;
  int64_t rows;
  int64_t cols;
  uint32_t token_groups;
  bool x_vector;
  bool weight_vector;
  bool out_fp32;  // else the activation type
};

// Eight neighbours of a row as four packed pairs of T; zeros where there are none.
template <typename From, typename T>
__device__ __forceinline__ uint4 LoadPacked(const From* p, int64_t valid, bool vector) {
  if constexpr (std::is_same_v<From, T>) {
    if (vector) return valid > 0 ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
  }
  float v[8];
  Load8(p, valid, vector, v);
  return make_uint4(Pack<T>(v[0], v[1]), Pack<T>(v[2], v[3]), Pack<T>(v[4], v[5]),
                    Pack<T>(v[6], v[7]));
}

// kAtOnce: how many of a run's halves are in registers at a time, 1 or 2.
template <typename T, typename Weight, int kRowTiles, int kTokenTiles, int kAtOnce>
__global__ void __launch_bounds__(kWarps * 32)
    DenseMatmulKernel(const __grid_constant__ DenseParams p) {
  constexpr int kTokens = 8 * kTokenTiles;
  __shared__ float partial[kWarps][kTokens][kRows + 1];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_token = int64_t{blockIdx.x % p.token_groups} * kTokens;
  const int64_t first_row = int64_t{blockIdx.x / p.token_groups} * kRows * kRowTiles;
  AllowNext();
  WaitForPrevious();

  float sums[kRowTiles][kTokenTiles][4] = {};
  const auto add = [&](int64_t begin) {
    uint4 a[kRowTiles][2][kAtOnce], b[kTokenTiles][kAtOnce];
#pragma unroll
    for (int half_run = 0; half_run < kAtOnce; ++half_run) {
      const int64_t col = begin + 32 * half_run + 8 * t, valid = p.cols - col;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t row = first_row + kRows * r + g + 8 * i;
          a[r][i][half_run] = LoadPacked<Weight, T>(
              static_cast<const Weight*>(p.weight) + row * p.weight_stride + col,
              row < p.rows ? valid : 0, p.weight_vector);
        }
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const int64_t token = first_token + 8 * n + g;
        b[n][half_run] = LoadPacked<T, T>(static_cast<const T*>(p.x) + token * p.x_stride + col,
                                          token < p.num_tokens ? valid : 0, p.x_vector);
      }
    }
#pragma unroll
    for (int half_run = 0; half_run < kAtOnce; ++half_run) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint4 low = a[r][0][half_run], high = a[r][1][half_run];
        const uint32_t first[4] = {low.x, high.x, low.y, high.y};
        const uint32_t second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          Mma<T>(sums[r][n], first, b[n][half_run].x, b[n][half_run].y);
          Mma<T>(sums[r][n], second, b[n][half_run].z, b[n][half_run].w);
        }
      }
    }
  };
#pragma unroll 2
  for (int64_t run = warp * kRun; run < p.cols; run += kWarps * kRun) {
    add(run);
    if constexpr (kAtOnce == 1) add(run + kRun / 2);
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    if (r > 0) __syncthreads();
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partial[warp][8 * n + 2 * t + i % 2][g + 8 * (i / 2)] = sums[r][n][i];
      }
    }
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < kTokens * kRows; e += kWarps * 32) {
      const int64_t token = first_token + e / kRows, row = first_row + kRows * r + e % kRows;
      if (token >= p.num_tokens || row >= p.rows) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][e / kRows][e % kRows];
      const int64_t at = token * p.out_stride + row;
      if (p.out_fp32) {
        static_cast<float*>(p.out)[at] = sum;
      } else {
        static_cast<T*>(p.out)[at] = FromFloat<T>(sum);
      }
    }
  }
}

template <typename T, typename Weight, int kRowTiles, int kTokenTiles, int kAtOnce>
cudaError_t LaunchTiles(const LaunchContext& context, DenseParams params) {
  params.token_groups = CeilDiv(params.num_tokens, 8 * kTokenTiles);
  const uint32_t row_groups = CeilDiv(params.rows, kRows * kRowTiles);
  return Launch(context, DenseMatmulKernel<T, Weight, kRowTiles, kTokenTiles, kAtOnce>,
                params.token_groups * row_groups, kWarps * 32, 0, params);
}

// Few tokens: many small blocks, to read weights at the speed of memory. More tokens: larger tiles,
// so that x is read less often. Weights of another type than the activations' are rare: one kernel.
template <typename T, typename Weight>
cudaError_t LaunchTyped(const LaunchContext& context, const DenseParams& params) {
  if constexpr (std::is_same_v<T, Weight>) {
    if (params.num_tokens <= 8) return LaunchTiles<T, Weight, 1, 1, 2>(context, params);
    if (params.num_tokens <= 16) return LaunchTiles<T, Weight, 2, 2, 2>(context, params);
    if (params.num_tokens > 32) return LaunchTiles<T, Weight, 4, 8, 1>(context, params);
  }
  return LaunchTiles<T, Weight, 4, 4, 2>(context, params);
}

}  // namespace

cudaError_t LaunchDenseMatmul(const LaunchContext& context, Tensor x, Tensor weight, Tensor out) {
  DenseParams params{};
  params.x = x.data, params.x_stride = x.stride;
  params.weight = weight.data, params.weight_stride = weight.stride;
  params.out = out.data, params.out_stride = out.stride;
  params.num_tokens = x.rows, params.rows = weight.rows, params.cols = weight.cols;
  params.x_vector = Vectorizable(x), params.weight_vector = Vectorizable(weight);
  params.out_fp32 = out.dtype == DType::kF32;
  return WithActivation(x.dtype, [&](auto element) {
    return WithFloat(weight.dtype, [&](auto stored) {
      return LaunchTyped<decltype(element), decltype(stored)>(context, params);
    });
  });
}

}  // namespace mobi::cuda
