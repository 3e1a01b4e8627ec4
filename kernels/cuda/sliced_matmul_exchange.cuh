// Exchange of the parts' sums in the decode path, and the store of the result.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_EXCHANGE_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_EXCHANGE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_plan.cuh"

namespace mobi::cuda {

// A sum in out's type.
template <typename T>
__device__ __forceinline__ T Rounded(float value);
template <>
__device__ __forceinline__ half Rounded<half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 Rounded<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ float Rounded<float>(float value) {
  return value;
}

__device__ __forceinline__ void StoreOut(const SlicedProblem& p, int token, int row, float value) {
  const int64_t at = token * p.out_stride + row;
  if (p.out_type == DType::kF16) {
    static_cast<half*>(p.out)[at] = Rounded<half>(value);
  } else if (p.out_type == DType::kBF16) {
    static_cast<__nv_bfloat16*>(p.out)[at] = Rounded<__nv_bfloat16>(value);
  } else {
    static_cast<float*>(p.out)[at] = value;
  }
}

// The parts' sums of one output, one after another: the one order of all launches.
__device__ __forceinline__ float SumOfParts(const float (&v)[kParts]) {
  float sum = v[0];
#pragma unroll
  for (int k = 1; k < kParts; ++k) sum += v[k];
  return sum;
}

__device__ __forceinline__ float LoadResidual(const SlicedProblem& p, int token, int row) {
  const int64_t at = token * p.residual_stride + row;
  return p.out_type == DType::kF16
             ? __half2float(__ldcg(static_cast<const half*>(p.residual) + at))
             : __bfloat162float(__ldcg(static_cast<const __nv_bfloat16*>(p.residual) + at));
}

// residual += value, which is rounded first as StoreOut rounds it.
__device__ __forceinline__ void AddToResidual(const SlicedProblem& p, int token, int row,
                                              float residual, float value) {
  const int64_t at = token * p.residual_stride + row;
  if (p.out_type == DType::kF16) {
    static_cast<half*>(p.residual)[at] =
        __float2half_rn(residual + __half2float(__float2half_rn(value)));
  } else {
    static_cast<__nv_bfloat16*>(p.residual)[at] =
        __float2bfloat16_rn(residual + __bfloat162float(__float2bfloat16_rn(value)));
  }
}

// Every warp leaves the sums of its part of its panels in its block's buffer; after a barrier of
// the cluster, the blocks share the round's panels and add their parts. Rounds take turns
// with two buffers. Buffer: [warp][panel of the team's round][token][row], rows padded so that a
// warp's writes of tokens 2t meet different banks.
template <int NT>
struct Exchange {
  static constexpr int kRow = kPanelRows + 4;

  const SlicedProblem& p;
  const DecodePlan& plan;
  const DecodePlace& place;
  uint8_t* shared;

  __device__ __forceinline__ int PanelFloats() const { return plan.buffer_tokens * kRow; }

  // A warp's sums of the first panel of its team's round.
  __device__ __forceinline__ float* At(int round, int warp) const {
    return reinterpret_cast<float*>(shared + plan.buffers) +
           ((round & 1) * kDecodeWarps + warp) * plan.round_panels * PanelFloats();
  }

  // The sums of one tile, 16 floats from `to`.
  __device__ __forceinline__ void Write(float* to, const float (&y)[NT][4]) const {
    to += place.lane % 4 * 2 * kRow + place.lane / 4;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * j + place.lane % 4 * 2 + e < place.num_tokens) {
          to[(8 * j + e) * kRow] = y[j][e];
          to[(8 * j + e) * kRow + 8] = y[j][2 + e];
        }
      }
    }
  }

  __device__ __forceinline__ void Read(const float* from, float (&y)[NT][4]) const {
    from += place.lane % 4 * 2 * kRow + place.lane / 4;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * j + place.lane % 4 * 2 + e < place.num_tokens) {
          y[j][e] = from[(8 * j + e) * kRow];
          y[j][2 + e] = from[(8 * j + e) * kRow + 8];
        }
      }
    }
  }

  // After a round's writes, and before its sums are read. A block alone needs no more than its own
  // barrier, which Wait is then.
  __device__ __forceinline__ void Arrive() const {
    if (plan.cluster_log > 0) ptx::ClusterArrive();
  }
  __device__ __forceinline__ void Wait() const {
    if (plan.cluster_log > 0) {
      ptx::ClusterWait();
    } else {
      __syncthreads();
    }
  }

  // Adds a round that all have written. A warp takes one token of one panel at a time, a lane one
  // of its 32 rows; panels go round the blocks of the cluster.
  __device__ __forceinline__ void Add(int round) const {
    const int run_panels = (place.num_tiles + kPanelTiles - 1) / kPanelTiles;
    const int begin = round * plan.round_panels << plan.cluster_log;
    const int panels = min(run_panels - begin, plan.round_panels << plan.cluster_log);
    const int teams = 1 << plan.cluster_log, parts_log = kPartsLog - plan.cluster_log;
    const int token_log = NT == 1 ? plan.token_log : kPartsLog;
    const int next_part = plan.round_panels * PanelFloats();
    for (int i = (place.warp >> token_log) * teams + place.rank; i < panels;
         i += (kDecodeWarps >> token_log) * teams) {
      const int row = (begin + i) * kPanelTiles * kTileRows + place.lane;
      if (row >= place.num_tiles * kTileRows) continue;
      // The teams' panels alternate.
      const int team = i & (teams - 1);
      const float* panel =
          At(round, team << parts_log) + (i >> plan.cluster_log) * PanelFloats() + place.lane;
      for (int token = place.warp & ((1 << token_log) - 1); token < place.num_tokens;
           token += kDecodeWarps) {
        float value[kParts];
        if (plan.cluster_log == 0) {
#pragma unroll
          for (int k = 0; k < kParts; ++k) value[k] = panel[k * next_part + token * kRow];
        } else {
          const uint32_t address = ptx::SharedAddress(panel + token * kRow);
#pragma unroll
          for (int k = 0; k < kParts; ++k) {
            const int part = k & ((1 << parts_log) - 1);
            value[k] =
                ptx::LoadCluster(ptx::MapToRank(address + part * next_part * 4, k >> parts_log));
          }
        }
        StoreOut(p, place.first_token + token, place.first_tile * kTileRows + row,
                 SumOfParts(value));
      }
    }
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_EXCHANGE_CUH_
