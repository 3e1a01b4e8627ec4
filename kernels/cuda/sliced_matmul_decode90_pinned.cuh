// A linear of a decode step whose tokens are all pinned, in one kernel: the op that makes x (a
// norm, SwiGLU) and the sliced matmul. Levels were there before the step, so nothing is routed, and
// the first weights are under way before the previous kernel has ended. The results are bit for bit
// those of the ops one by one.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_PINNED_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_PINNED_CUH_

#include <cstdint>

#include "kernels/cuda/sliced_matmul_decode90_input.cuh"

namespace mobi::cuda {

template <int N, int W>
struct PinnedDecode90 : Decode90Input<N, W, /*kAhead=*/false, /*kMoreWarps=*/0> {
  using Base = Decode90Input<N, W, false, 0>;
  using Base::Base;
  using Base::input;
  using Base::warp;

  __device__ __forceinline__ void Run() {
    if (warp == Base::kWarps - 1) MakeSquaresBarrier();
    this->MakeBarriers();
    this->LoadNorm(this->tid, Base::kAllThreads);
    ptx::CommitCopies();
    ptx::ClusterArriveRelaxed();  // this block's barriers are ready
    this->ReadLevels();
    this->Begin();
    ptx::WaitForPrevious();
    MakeX();
    __syncthreads();
    this->RunAll();
  }

  // By a warp, so that racecheck follows.
  __device__ __forceinline__ void MakeSquaresBarrier() const {
    if (this->lane == 0) {
      Base::InitSquaresBarrier();
      ptx::FenceBarrierInit();
    }
    __syncwarp();
    if (this->lane == 0) Base::ExpectSquares();
  }

  __device__ __forceinline__ void MakeX() const {
    const auto v = Base::ReadSource(warp);
    if (Base::SharesSquares()) {
      ptx::ClusterWait();  // every block has begun, and may be sent to
      ptx::ClusterArriveRelaxed();
    }
    if (input.input == RouteInput::kNorm) {
      Base::Measure();
      ptx::WaitCopies<kStages>();  // the norm's weights are here; the ring's may be under way
      __syncthreads();
    }
    Base::MakeItems(warp, v, [&](int group, int token, const uint4& made) {
      Base::Encode(group, token, made);
    });
    if constexpr (!Base::kByMma) ptx::FenceAsyncProxy();
  }
};

// Grid: the blocks of the clusters of eight.
template <int N, int W>
__global__ void __launch_bounds__(128 * W, 1)
    PinnedDecode90Kernel(const __grid_constant__ SlicedProblem p,
                         const __grid_constant__ Decode90Plan plan,
                         const __grid_constant__ InputParams input) {
#if MOBI_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  ptx::LaunchDependents();
  PinnedDecode90<N, W>(p, plan, input, shared).Run();
#endif
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_PINNED_CUH_
