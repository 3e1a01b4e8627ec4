// x of a linear that a decode kernel makes by itself: a norm, SwiGLU, or what is there. Every
// cluster makes it for itself; each of its eight blocks has the columns that it multiplies.
//
// Order of sums: that of route.cu, whose eight blocks have the same columns.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_INPUT_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_INPUT_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/routed_matmul.h"
#include "kernels/cuda/sliced_matmul_decode90.cuh"

namespace mobi::cuda {

static_assert(kRouteRanks == kParts);
inline constexpr int kTurnCols = kRouteWarps * 32;            // of a block, 8 to each lane
inline constexpr int kAllTurnCols = kRouteRanks * kTurnCols;  // of the cluster
inline constexpr int kMeasuredAlone = 2;                      // tokens whose rows a block reads
inline constexpr int kMaxNormTurns = 4;                       // of a norm's weight, held in shared

// Host side: whether a kernel of up to kMostFusedTokens can make this x.
inline bool CanMakeInput90(const SlicedMatmulLaunch& launch, const RouteSource& source,
                           const Tensor& x) {
  if (launch.clusters[kPartsLog] == 0 || x.dtype != DType::kF16 || x.rows < 1 ||
      x.rows > kMostFusedTokens || x.cols % kAllTurnCols != 0 || !Vectorizable(x)) {
    return false;
  }
  switch (source.input) {
    case RouteInput::kPlain:
      return true;
    case RouteInput::kNorm:  // whose sum is the residual already
      return source.delta.data == nullptr && x.cols <= int64_t{kMaxNormTurns} * kAllTurnCols &&
             Vectorizable(source.source) && Vectorizable(source.norm_weight);
    case RouteInput::kSwiGlu:
      return Vectorizable(source.source);
  }
  return false;
}

// What a norm keeps in shared memory.
template <int N>
struct NormShared {
  float squares[N][kRouteRanks * kRouteWarps];  // of its input
  float weight[kMaxNormTurns * kTurnCols];      // of this block's columns
};

// W warpgroups multiply; with kMoreWarps others they make x.
template <int N, int W, bool kAhead, int kMoreWarps>
struct Decode90Input : DecodeWarp90<N, W, false, kAhead> {
  using Base = DecodeWarp90<N, W, false, kAhead>;
  using Base::first_group;
  using Base::GroupOf;
  using Base::Items;
  using Base::kWarps;
  using Base::lane;
  using Base::num_tokens;
  using Base::plan;
  using Base::rank;
  using Base::shared;
  using Base::TokenOf;
  using Base::warp;
  static constexpr int kAllWarps = kWarps + kMoreWarps, kAllThreads = 32 * kAllWarps;

  const InputParams& input;
  NormShared<N>& norm;
  int tid, turns;

  __device__ __forceinline__ Decode90Input(const SlicedProblem& problem, const Decode90Plan& plan,
                                           const InputParams& input, uint8_t* memory)
      : Base(problem, plan, memory),
        input(input),
        norm(*reinterpret_cast<NormShared<N>*>(memory + plan.head)) {
    tid = threadIdx.x;
    turns = input.cols / kAllTurnCols;
  }

  // Counts the squares of a norm's input that the cluster's blocks send.
  __device__ __forceinline__ uint32_t SquaresArrive() const {
    return ptx::SharedAddress(shared) + plan.head_barriers;
  }
  __device__ __forceinline__ bool SharesSquares() const {
    return input.input == RouteInput::kNorm && num_tokens > kMeasuredAlone;
  }
  // By one thread, before the barriers' fence.
  __device__ __forceinline__ void InitSquaresBarrier() const {
    ptx::BarrierInit(SquaresArrive(), 1);
  }
  // By the same, after it.
  __device__ __forceinline__ void ExpectSquares() const {
    ptx::BarrierArriveExpecting(SquaresArrive(), kRouteRanks * num_tokens * kRouteWarps * 4);
  }

  // The cluster that writes what concerns all: the last, whose run is not a long one.
  __device__ __forceinline__ bool Speaks() const { return blockIdx.x >= gridDim.x - kParts; }

  // Asks for this block's weights of a norm, as one of `threads`.
  __device__ __forceinline__ void LoadNorm(int thread, int threads) const {
    if (input.input != RouteInput::kNorm) return;
    const int of_block = turns * kTurnCols;
    for (int i = thread * 4; i < of_block; i += threads * 4) {
      ptx::CopyAsync16(ptx::SharedAddress(norm.weight + i),
                       input.norm_weight + rank * of_block + i);
    }
  }

  // Sums of squares of the tokens' rows, by the warps that multiply. Of few tokens, every block
  // reads the whole rows.
  __device__ __forceinline__ void Measure() const {
    if (SharesSquares()) return ShareSquares();
    constexpr int kLanes = kRouteRanks * kRouteWarps * 4;
    static_assert(kMeasuredAlone * kLanes <= 32 * kWarps);
    const int token = tid / kLanes, at = tid % kLanes;
    if (token >= num_tokens) return;
    const float squares = Squares(token, at / 32, at % 32);
    if (at % 4 == 0) norm.squares[token][at / 4] = squares;
  }

  // Of many, a block reads its own columns, a warp one token, and the cluster shares the sums.
  __device__ __forceinline__ void ShareSquares() const {
#pragma unroll 1
    for (int token = warp; token < num_tokens; token += kWarps) {
      const float squares = Squares(token, rank, lane);
      const uint32_t to = ptx::SharedAddress(&norm.squares[token][rank * kRouteWarps + lane / 4]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = lane % 4 * 2 + i;
        ptx::StoreClusterAsync(ptx::MapToRank(to, k), squares, ptx::MapToRank(SquaresArrive(), k));
      }
    }
    ptx::BarrierWait(SquaresArrive(), 0);
  }

  // Of the columns of one of route.cu's warps, all of its four lanes get them.
  __device__ __forceinline__ float Squares(int token, int of_rank, int at) const {
    const auto* const row = static_cast<const half*>(input.source) +
                            token * static_cast<int>(input.source_stride) +
                            of_rank * turns * kTurnCols + at * 8;
    uint4 words[kMaxNormTurns];
#pragma unroll
    for (int turn = 0; turn < kMaxNormTurns; ++turn) {
      if (turn >= turns) break;
      words[turn] = __ldcg(reinterpret_cast<const uint4*>(row + turn * kTurnCols));
    }
    float squares = 0;
#pragma unroll
    for (int turn = 0; turn < kMaxNormTurns; ++turn) {
      if (turn >= turns) break;
      AddSquares(words[turn], squares);
    }
    return QuadSum(squares);
  }

  // 1 / rms of this half warp's token.
  __device__ __forceinline__ float Scale(int token) const {
    float sum = 0, total = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += norm.squares[token][lane % 8 * kRouteWarps + w];
#pragma unroll
    for (int k = 0; k < kRouteRanks; ++k) {
      total += __shfl_sync(kFullWarp, sum, lane / 16 * 16 + k);
    }
    return rsqrtf(total / static_cast<float>(input.cols) + input.eps);
  }

  static __device__ __forceinline__ void AddSquares(const uint4& words, float& squares) {
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v = Unpack<half>(pairs[i]);
      squares = fmaf(v.x, v.x, squares);
      squares = fmaf(v.y, v.y, squares);
    }
  }

  // Eight columns of a token: of x, or of what x is made of.
  struct Eight {
    uint4 first;
    uint4 up;  // SwiGLU's second half
  };
  // An item is a group of two tokens, half a warp each, as in StageX.
  __device__ __forceinline__ Eight ReadSource(int item) const {
    Eight v{};
    const int token = TokenOf(item), col = GroupOf(item) * kGroupSize + lane % 16 * 8;
    if (item >= Items() || token >= num_tokens) return v;
    const bool plain = input.input == RouteInput::kPlain;
    const auto* const from =
        static_cast<const half*>(plain ? input.x : input.source) +
        token * static_cast<int>(plain ? input.x_stride : input.source_stride) +
        first_group * kGroupSize + col;
    v.first = __ldcg(reinterpret_cast<const uint4*>(from));
    if (input.input == RouteInput::kSwiGlu) {
      v.up = __ldcg(reinterpret_cast<const uint4*>(from + input.cols));
    }
    return v;
  }

  // The item's elements of x, to keep(group, token, elements).
  template <typename Keep>
  __device__ __forceinline__ void Make(int item, Eight v, const Keep& keep) const {
    const int group = GroupOf(item), token = TokenOf(item);
    const int col = group * kGroupSize + lane % 16 * 8;
    uint32_t words[4] = {v.first.x, v.first.y, v.first.z, v.first.w};
    if (input.input == RouteInput::kNorm) {
      const float scale = Scale(token);
      float weight[8];
      Load8(norm.weight + col, 8, true, weight);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 pair = Unpack<half>(words[i]);
        pair.x *= scale * weight[2 * i];
        pair.y *= scale * weight[2 * i + 1];
        words[i] = Pack<half>(pair.x, pair.y);
      }
    } else if (input.input == RouteInput::kSwiGlu) {
      const uint32_t ups[4] = {v.up.x, v.up.y, v.up.z, v.up.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 gate = Unpack<half>(words[i]), up = Unpack<half>(ups[i]);
        words[i] = Pack<half>(Silu(gate.x) * up.x, Silu(gate.y) * up.y);
      }
    }
    const uint4 made = make_uint4(words[0], words[1], words[2], words[3]);
    keep(group, token, made);
    if (token < num_tokens && input.input != RouteInput::kPlain && Speaks()) {
      *reinterpret_cast<uint4*>(static_cast<half*>(input.x) + token * input.x_stride +
                                first_group * kGroupSize + col) = made;
    }
  }

  // All items of a warp; v: of the first. Elements of no token are kept, too.
  template <typename Keep>
  __device__ __forceinline__ void MakeItems(int first, Eight v, const Keep& keep) const {
#pragma unroll 1
    for (int item = first; item < Items(); item += kAllWarps) {
      const Eight next = ReadSource(item + kAllWarps);
      Make(item, v, keep);
      v = next;
    }
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_INPUT_CUH_
