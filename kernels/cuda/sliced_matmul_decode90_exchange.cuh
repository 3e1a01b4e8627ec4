// Exchange of the parts' sums in the decode path on compute capability 9.0, once a round. Each
// block of the cluster adds the parts of its rows of a unit, chunks of eight. Buffers are
// [unit of the round][buffer][part][chunk][8 x tokens], of N tokens or, where N is 8, of the pairs
// that there are; a barrier in shared memory counts the bytes that arrive. Where memory allows,
// every round has a buffer, and all are added at the end. Otherwise rounds take turns with two, and
// the cluster's barrier frees them: a thread arrives at it when it has added the round before.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_EXCHANGE_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_EXCHANGE_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_decode90_plan.cuh"
#include "kernels/cuda/sliced_matmul_exchange.cuh"

namespace mobi::cuda {

// N tokens, W warpgroups; kEach: every round has a buffer, as the compiler sees.
template <int N, int W, bool kEach>
struct Decode90Exchange : Decode90Place {
  static constexpr int NT = N / 8;
  static constexpr int kWarps = 4 * W;
  static constexpr int kAddRows = NT == 1 ? 1 : N / 16;  // that a thread adds at once

  // Where this lane's sums of even rounds go, and where those it adds lie.
  uint32_t remote[2], remote_barrier[2];
  int add_from, add_token, add_row;

  __device__ __forceinline__ bool OneEach() const { return kEach || plan.one_each; }
  __device__ __forceinline__ int ChunkBytes() const { return ExchangedBytes<N>(plan); }
  __device__ __forceinline__ int PartBytes() const { return ChunkBytes() << plan.parts_log; }
  __device__ __forceinline__ uint32_t SumsBarrier(int buffer, int of_slot) const {
    return ptx::SharedAddress(shared) + plan.barriers +
           (kWarps * kMaxStages + of_slot * plan.round_buffers + buffer) * 8;
  }
  __device__ __forceinline__ int BufferOf(int round) const { return OneEach() ? round : round & 1; }

  __device__ __forceinline__ Decode90Exchange(const SlicedProblem& p, const Decode90Plan& plan,
                                              uint8_t* shared)
      : Decode90Place(p, plan, shared, N) {
    const int buffer = plan.buffers + slot * plan.round_buffers * kParts * PartBytes();
    const uint32_t to = ptx::SharedAddress(shared) + buffer + part * PartBytes();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int chunk = 2 * own + h, owner = chunk >> plan.parts_log;
      const int of_owner = chunk & ((1 << plan.parts_log) - 1);
      remote[h] = ptx::MapToRank(to + of_owner * ChunkBytes(), owner) +
                  (NT == 1 ? (lane / 4 << plan.pairs_log) * 8 + lane % 4 * 8 : lane * 16);
      remote_barrier[h] = ptx::MapToRank(SumsBarrier(0, slot), owner);
    }
    // As many threads as values, or as rows of kAddRows values.
    const int thread = threadIdx.x - slot * (128 << plan.parts_log);
    const int row = thread / N * kAddRows;
    add_token = thread % N;
    add_row = row < kChunkRows << plan.parts_log && add_token < num_tokens
                  ? (rank * kChunkRows << plan.parts_log) + row
                  : p.rows;
    add_from = buffer + row / kChunkRows * ChunkBytes() +
               (NT == 1 ? (row % kChunkRows * 2 << plan.pairs_log) + add_token
                        : add_token / 16 * 128 + (row % kChunkRows * 4 + add_token % 8 / 2) * 4 +
                              add_token / 8 % 2 * 2 + add_token % 2) *
                   4;
  }

  // Before the first round.
  __device__ __forceinline__ void ExpectFirst() const {
#pragma unroll 1
    for (int round = 0; round < plan.round_buffers; ++round) Expect(round);
  }

  // Lets the round's barrier wait for all parts. One thread per unit.
  __device__ __forceinline__ void Expect(int round) const {
    if (threadIdx.x == slot * (128 << plan.parts_log) && round < MyRounds()) {
      ptx::BarrierArriveExpecting(SumsBarrier(BufferOf(round), slot), kParts * PartBytes());
    }
  }

  // Sends the sums of a round on their way and clears them.
  __device__ __forceinline__ void Finish(int round, float (&y)[NT][4]) const {
    if (round == 0 || !OneEach()) ptx::ClusterWait();
    const uint32_t other = BufferOf(round) * kParts * PartBytes(), bar = BufferOf(round) * 8;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (NT == 1) {
        if (lane % 4 >> plan.pairs_log == 0) {
          ptx::StoreClusterAsync(remote[h] + other, make_float2(y[0][2 * h], y[0][2 * h + 1]),
                                 remote_barrier[h] + bar);
        }
      } else {
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
          ptx::StoreClusterAsync(
              remote[h] + other + j * 256,
              make_float4(y[j][2 * h], y[j][2 * h + 1], y[j + 1][2 * h], y[j + 1][2 * h + 1]),
              remote_barrier[h] + bar);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) y[j][0] = y[j][1] = y[j][2] = y[j][3] = 0;
    if (OneEach()) return;
    if (round > 0) Add(round - 1);
    if (round + 1 < rounds) ptx::ClusterArriveRelaxed();
  }

  // What is left after this warpgroup's last unit.
  __device__ __forceinline__ void FinishAll() const {
    if (OneEach()) {
      if (MyRounds() == 0) ptx::ClusterWait();
#pragma unroll 1
      for (int round = 0; round < MyRounds(); ++round) Add(round);
      return;
    }
    if (!HasUnit(rounds - 1)) {
      ptx::ClusterWait();
      if (rounds == 1) return;
      Add(rounds - 2);
    } else {
      Add(rounds - 1);
    }
  }

  // Adds the parts of this block's rows of the unit and stores them.
  __device__ __forceinline__ void Add(int round) const {
    const int row = UnitOf(round) * kUnitRows + add_row;
    float residual[kAddRows];
    if (p.residual != nullptr && row < p.rows) {  // before the wait, to save a round trip
      LoadResidual<kAddRows>(p, first_token + add_token, row, residual);
    }
    ptx::BarrierWait(SumsBarrier(BufferOf(round), slot), OneEach() ? 0 : round >> 1 & 1);
    if (row < p.rows) {
      const uint8_t* const from = shared + add_from + BufferOf(round) * kParts * PartBytes();
      float sum[kAddRows];
#pragma unroll
      for (int r = 0; r < kAddRows; ++r) {
        float value[kParts];
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          value[k] = *reinterpret_cast<const float*>(from + k * PartBytes() + r * 64);
        }
        sum[r] = SumOfParts(value);
      }
      StoreRows<kAddRows>(p, first_token + add_token, row, sum);
      if (p.residual != nullptr) {
        AddToResidual<kAddRows>(p, first_token + add_token, row, residual, sum);
      }
    }
    if (!OneEach()) Expect(round + 2);
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_EXCHANGE_CUH_
