// x of the decode path in shared memory: from rows of 16-bit elements to fp16 in the order of the
// mma operand, with the sums over each group that biases and offsets meet. A part's x is staged by
// the warps that use it: half a warp carries one group of one token, 16 bytes a lane.
// Layout: [part][group][tile of 8 tokens][word 0..3][token of the tile * 4 + t] of 16 bytes, the 8
// columns that word `word` of lane t of a weight tile covers; the last index is swizzled with the
// word, so that neither the writes here nor the reads of a warp meet a bank twice.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_STAGE_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_STAGE_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_plan.cuh"
#include "kernels/cuda/sliced_matmul_unpack.cuh"

namespace mobi::cuda {

// bf16 to fp16 by a power of two that brings the group's largest element to [2^14, 2^15), so that
// nothing overflows and what underflows is 2^-29 of it. `unit` undoes it.
__device__ __forceinline__ uint4 ScaledHalves(uint4 v, float& unit) {
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
  float values[8], largest = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    values[2 * k] = __uint_as_float(words[k] << 16);
    values[2 * k + 1] = __uint_as_float(words[k] & 0xFFFF0000u);
    largest = fmaxf(largest, fmaxf(fabsf(values[2 * k]), fabsf(values[2 * k + 1])));
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  }
  const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23), 15);
  const float factor = __uint_as_float(static_cast<uint32_t>(268 - exponent) << 23);
  unit = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const half2 pair = __floats2half2_rn(values[2 * k] * factor, values[2 * k + 1] * factor);
    words[k] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <int NT, bool kBf16>
struct XPart {
  static constexpr int kTokens = 8 * NT;
  static constexpr int kBatch = 4;  // loads under way per thread

  const SlicedProblem& p;
  const DecodePlan& plan;
  const DecodePlace& place;
  uint8_t* shared;
  uint32_t offset[4];  // of this lane's 16 bytes of word w
  uint32_t stride;     // bytes from group to group

  __device__ __forceinline__ XPart(const SlicedProblem& p, const DecodePlan& plan,
                                   const DecodePlace& place, uint8_t* shared)
      : p(p), plan(plan), place(place), shared(shared) {
    const uint32_t slots = Slots(), slot = place.lane & (slots - 1);
    stride = NT * 4 * slots * 16;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      offset[w] = plan.x + place.part * plan.chunk_groups * stride +
                  (w * slots + (slot ^ ((2 * w) & (slots - 1)))) * 16;
    }
  }

  __device__ __forceinline__ uint32_t Slots() const { return NT == 1 ? 4 << plan.token_log : 32; }

  __device__ __forceinline__ int ChunkGroups(int chunk) const {
    return max(min(plan.chunk_groups, place.num_groups - chunk * plan.chunk_groups), 0);
  }

  // ---- Reads, g counting groups of the part's chunk.

  __device__ __forceinline__ uint4 Load(int g, int j, int w) const {
    return *reinterpret_cast<const uint4*>(shared + (g * stride + offset[w]) + j * 2048);
  }

  // Index of tokens 2t, 2t + 1 of tile j in the tables of sums.
  __device__ __forceinline__ int At(int g, int j) const {
    return (place.part * plan.chunk_groups + g) * kTokens + 8 * j + place.lane % 4 * 2;
  }

  __device__ __forceinline__ float2 LoadSums(int g, int j) const {
    return *reinterpret_cast<const float2*>(shared + plan.sums + At(g, j) * 4);
  }

  // {row g, row g + 8} of token 2t, then of token 2t + 1.
  __device__ __forceinline__ float4 LoadBias(int g, int j) const {
    return *reinterpret_cast<const float4*>(shared + plan.bias + At(g, j) * 8);
  }

  __device__ __forceinline__ float2 LoadUnit(int g, int j) const {
    if constexpr (!kBf16) return make_float2(1, 1);
    return *reinterpret_cast<const float2*>(shared + plan.unit + At(g, j) * 4);
  }

  // ---- Staging.

  // A batch: this thread's 16 bytes of up to kBatch tokens, token, token + teams, ..; of the two
  // groups from `group` on, half a warp each. Reads past L1, which may hold what this memory held
  // under an earlier kernel.
  __device__ __forceinline__ void Read(int chunk_first, int groups, int group, int token,
                                       uint4 (&v)[kBatch]) const {
    const bool inside = group + place.lane / 16 < groups;
    const uint16_t* from = p.x + (place.first_token + token) * p.x_stride +
                           (chunk_first + group) * kGroupSize + place.lane * 8;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u > 0 && token + (u << plan.cluster_log) >= place.num_tokens) break;
      v[u] = make_uint4(0, 0, 0, 0);
      if (inside && token + (u << plan.cluster_log) < place.num_tokens) {
        v[u] = __ldcg(reinterpret_cast<const uint4*>(from));
      }
      from += p.x_stride << plan.cluster_log;
    }
  }

  __device__ __forceinline__ void Write(int groups, int group, int token,
                                        uint4 (&v)[kBatch]) const {
    const int slots = static_cast<int>(Slots()), word = place.lane % 4, t = place.lane % 16 / 4;
    group += place.lane / 16;
    const int of_all = place.part * plan.chunk_groups + group;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u > 0 && token >= place.num_tokens) break;
      float unit = 1;
      if constexpr (kBf16) v[u] = ScaledHalves(v[u], unit);
      if (group < groups && token < place.num_tokens) {
        const int slot = (token % 8 * 4 + t) ^ ((2 * word) & (slots - 1));
        const int at = ((of_all * NT + token / 8) * 4 + word) * slots + slot;
        *reinterpret_cast<uint4*>(shared + plan.x + at * 16) = v[u];
        if (kBf16 && place.lane % 16 == 0) {
          reinterpret_cast<float*>(shared + plan.unit)[of_all * kTokens + token] = unit;
        }
      }
      token += 1 << plan.cluster_log;
    }
  }

  // The first batch of a chunk; Finish takes it.
  __device__ __forceinline__ void Begin(int chunk, uint4 (&v)[kBatch]) const {
    Read(place.first_group + chunk * plan.chunk_groups, ChunkGroups(chunk), 0, place.team, v);
  }

  // Writes the chunk, sums it up, and returns when all that the warp needs of it is there.
  __device__ __forceinline__ void Finish(int chunk, uint4 (&v)[kBatch]) const {
    const int groups = ChunkGroups(chunk);
    const int chunk_first = place.first_group + chunk * plan.chunk_groups;
    for (int group = 0; group < groups; group += 2) {
      for (int token = place.team; token < place.num_tokens; token += kBatch << plan.cluster_log) {
        if (group > 0 || token != place.team) Read(chunk_first, groups, group, token, v);
        Write(groups, group, token, v);
      }
    }
    SyncTeams();
    Sum(groups);
    SyncTeams();
  }

  // A part's warps are the teams' warps of that part.
  __device__ __forceinline__ void SyncTeams() const {
    if (plan.cluster_log == 0) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // By tensor core: rows 0 and 1 of the weight operand are level 1's half step less its biases
  // (rows g and g + 8), row 2 is ones. Four chains at a time; teams repeat each other.
  __device__ __forceinline__ void Sum(int groups) const {
    constexpr int kChains = 4;
    const int row = place.lane / 4;
    uint32_t a[2][4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float value = row == 0   ? 0.125f - LevelOneBias(pair, 0)
                          : row == 1 ? 0.125f - LevelOneBias(pair, 1)
                          : row == 2 ? 1.0f
                                     : 0.0f;
      const half2 both = __float2half2_rn(value);
      a[pair / 2][pair % 2 * 2] = *reinterpret_cast<const uint32_t*>(&both);
      a[pair / 2][pair % 2 * 2 + 1] = 0;
    }
    for (int first = 0; first < groups * NT; first += kChains) {
      float d[kChains][4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int c = 0; c < kChains; ++c) {
          const int chain = min(first + c, groups * NT - 1);  // beyond the end: not stored
          const uint4 b = Load(chain / NT, chain % NT, w);
          if (w == 0) {
            ptx::MmaFromZero(d[c], a[0], b.x, b.y);
          } else {
            ptx::Mma(d[c], a[0], b.x, b.y);
          }
          ptx::Mma(d[c], a[1], b.z, b.w);
        }
      }
#pragma unroll
      for (int c = 0; c < kChains; ++c) {
        const int g = (first + c) / NT, j = (first + c) % NT;
        ptx::KeepBefore(d[c][0], d[c][1]);  // an mma must not move into the branch of some lanes
        if (first + c < groups * NT && row < 3) {
          const float2 unit = LoadUnit(g, j);
          const int at = At(g, j);
          float* const to = reinterpret_cast<float*>(shared + (row < 2 ? plan.bias : plan.sums)) +
                            (row < 2 ? 2 * at + row : at);
          to[0] = d[c][0] * unit.x;
          to[row < 2 ? 2 : 1] = d[c][1] * unit.y;
        }
      }
    }
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_STAGE_CUH_
