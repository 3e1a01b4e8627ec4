// Exchange of the parts' sums in the decode path on compute capability 9.0, once a round. Each
// block of the cluster adds the parts of its rows of a unit, chunks of eight. Buffers are
// [unit of the round][buffer][part][chunk][8 x tokens], of N tokens or, where N is 4, of those that
// there are; a barrier in shared memory counts the bytes that arrive. Where memory allows,
// every round has a buffer, and all are added at the end. Otherwise rounds take turns with two, and
// the cluster's barrier frees them: a thread arrives at it when it has added the round before.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_EXCHANGE_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_EXCHANGE_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_decode90_plan.cuh"
#include "kernels/cuda/sliced_matmul_exchange.cuh"

namespace mobi::cuda {

template <int n>
inline constexpr int kLog = n == 1 ? 0 : 1 + kLog<n / 2>;
template <>
inline constexpr int kLog<1> = 0;

// N tokens, W warpgroups; kAhead: they run ahead of a router (sliced_matmul_decode90_route.cuh),
// and every round has a buffer.
template <int N, int W, bool kAhead>
struct Decode90Exchange : Decode90Place {
  static constexpr int NT = N / 4;  // tiles of tokens
  static constexpr int kWarps = 4 * W;

  // Where this lane's sums of even rounds go.
  uint32_t remote[2], remote_barrier[2];

  __device__ __forceinline__ bool OneEach() const { return kAhead || plan.one_each; }
  __device__ __forceinline__ int ChunkBytes() const { return ExchangedBytes<N>(plan); }
  __device__ __forceinline__ int PartBytes() const { return ChunkBytes() << plan.parts_log; }
  __device__ __forceinline__ uint32_t SumsBarrier(int buffer, int of_slot) const {
    return ptx::SharedAddress(shared) + plan.barriers + (of_slot * plan.round_buffers + buffer) * 8;
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
                  (NT == 1 ? (lane / 4 << plan.tokens_log) * 4 + lane % 4 * 4 : lane * 4 * NT);
      remote_barrier[h] = ptx::MapToRank(SumsBarrier(0, slot), owner);
    }
  }

  // Of a unit's warpgroups.
  __device__ __forceinline__ int SlotThreads() const { return 128 << plan.parts_log; }
  __device__ __forceinline__ int SlotThread() const {
    return static_cast<int>(threadIdx.x) - slot * SlotThreads();
  }

  // Before the first round: by one thread per unit, for the cluster. First of all, as the fence
  // waits for what the thread has loaded.
  __device__ __forceinline__ void MakeBarriers() const {
    if (SlotThread() != 0) return;
    for (int i = 0; i < plan.round_buffers; ++i) ptx::BarrierInit(SumsBarrier(i, slot), 1);
    ptx::FenceBarrierInit();
    for (int i = 0; i < plan.round_buffers; ++i) Expect(i);
  }

  // Lets the round's barrier wait for all parts. One thread per unit.
  __device__ __forceinline__ void Expect(int round) const {
    if (round < MyRounds()) {
      ptx::BarrierArriveExpecting(SumsBarrier(BufferOf(round), slot), kParts * PartBytes());
    }
  }

  // Sends the sums of a round on their way and clears them.
  __device__ __forceinline__ void Finish(int round, float (&y)[NT][2]) const {
    if (!kAhead && (round == 0 || !OneEach())) ptx::ClusterWait();
    const uint32_t other = BufferOf(round) * kParts * PartBytes(), bar = BufferOf(round) * 8;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t to = remote[h] + other, barrier = remote_barrier[h] + bar;
      if constexpr (NT == 1) {
        if (lane % 4 >> plan.tokens_log == 0) ptx::StoreClusterAsync(to, y[0][h], barrier);
      } else if constexpr (NT == 2) {
        ptx::StoreClusterAsync(to, make_float2(y[0][h], y[1][h]), barrier);
      } else {
        static_assert(NT == 4);
        ptx::StoreClusterAsync(to, make_float4(y[0][h], y[1][h], y[2][h], y[3][h]), barrier);
      }
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) y[j][0] = y[j][1] = 0;
    if (OneEach()) return;
    if (round > 0) Add(round - 1);
    if (round + 1 < rounds) ptx::ClusterArriveRelaxed();
  }

  // What is left after this warpgroup's last unit.
  __device__ __forceinline__ void FinishAll() const {
    if (OneEach()) {
      if (!kAhead && MyRounds() == 0) ptx::ClusterWait();
      return AddRounds(0, MyRounds());
    }
    if (!HasUnit(rounds - 1)) {
      ptx::ClusterWait();
      if (rounds == 1) return;
      Add(rounds - 2);
    } else {
      Add(rounds - 1);
    }
  }

  // Adds the parts of a round, and lets its buffer be filled again.
  __device__ __forceinline__ void Add(int round) const {
    AddRounds(round, 1);
    if (SlotThread() == 0) Expect(round + 2);
  }

  // Adds the parts of this block's rows of the rounds' units and stores them.
  __device__ __forceinline__ void AddRounds(int first, int count) const {
    const int tokens_log = NT == 1 ? plan.tokens_log : kLog<N>;
    const int rows_log = kLog<kChunkRows> + plan.parts_log;
    const int round_log = tokens_log + rows_log;
#pragma unroll 1
    for (int e = SlotThread(); e < count << round_log; e += SlotThreads()) {
      const int token = e & ((1 << tokens_log) - 1);
      const int row = e >> tokens_log & ((1 << rows_log) - 1);
      AddRow(first + (e >> round_log), row, token);
    }
  }

  // Row 0 is the first of this block's.
  __device__ __forceinline__ void AddRow(int round, int of_block, int token) const {
    const int row = UnitOf(round) * kUnitRows + (rank * kChunkRows << plan.parts_log) + of_block;
    const bool valid = token < num_tokens && row < p.rows;
    float residual;
    if (p.residual != nullptr && valid) {  // before the wait, to save a round trip
      residual = LoadResidual(p, first_token + token, row);
    }
    ptx::BarrierWait(SumsBarrier(BufferOf(round), slot), OneEach() ? 0 : round >> 1 & 1);
    if (!valid) return;
    const uint8_t* const from =
        shared + plan.buffers +
        (slot * plan.round_buffers + BufferOf(round)) * kParts * PartBytes() +
        of_block / kChunkRows * ChunkBytes() + PlaceInChunk(of_block % kChunkRows, token) * 4;
    float parts[kParts];
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      parts[k] = *reinterpret_cast<const float*>(from + k * PartBytes());
    }
    const float sum = SumOfParts(parts);
    StoreOut(p, first_token + token, row, sum);
    if (p.residual != nullptr) AddToResidual(p, first_token + token, row, residual, sum);
  }

  // In floats, as Finish sends them.
  __device__ __forceinline__ int PlaceInChunk(int row, int token) const {
    if constexpr (NT == 1) return (row << plan.tokens_log) + token;
    return (row * 4 + token % 4) * NT + token / 4;
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_EXCHANGE_CUH_
