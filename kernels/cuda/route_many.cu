// The router of many tokens, as a prompt has them: sixteen to a cluster of 8, 4, 2 blocks or one,
// the fewer the more tokens there are, so that W1 is read for more tokens at once and one round of
// clusters fills the device. Rows of x and W1 come to shared memory 512 bytes at a time: as
// operands of the mma a warp would read 64 bytes of each of eight rows, which costs L1 twice as
// much. Every sum is added in the order of route.cu's kernel: eight ranks of columns, of each the
// sums of eight warps. A block has one or more ranks, one after another.
//
// A cluster whose tokens' levels are all given in advance only makes x.
#include "kernels/cuda/ops.h"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/route_input.cuh"

namespace mobi::cuda {
namespace {

constexpr int kManyThreads = 512;  // the halves have eight tokens each
constexpr int kTokens = kManyThreads / kRouteThreads * 8;
constexpr int kHiddenTiles = 2, kWidth = 16 * kHiddenTiles + 1;
static_assert(16 * kHiddenTiles == kMaxFusedRouterHidden);

// ---- Shared memory: ManyShared, sums of a rank by warp, stages.

struct alignas(16) ManyShared {
  static constexpr int kThreads = kManyThreads, kSumWidth = kWidth;
  float partials[kRouteRanks][kTokens][kWidth];  // of the tokens that this block finishes
  float sums[1][kTokens][kWidth];
  float own_squares[kRouteRanks][kRouteWarps][kTokens];  // of the residual, in this block's ranks
  float squares[kRouteRanks][kTokens];                   // of all ranks
  float losses[kTokens][kMaxScores];
  float w2[kMaxScores][kMaxRouterHidden + 1];
  float b2[kMaxScores];
  float b1[kMaxRouterHidden];
  float u[kMaxRouterHidden];
  int highest[kMaxSegments];
  int pinned[kThreads / 32];
  double together[kMaxScores];
  int flag;
};
static_assert(sizeof(ManyShared) % 16 == 0);

using WarpSums = float[kRouteWarps][kTokens][kWidth];
static_assert(sizeof(WarpSums) % 16 == 0);
// Turns between two barriers: with one turn to a rank one, so that a rank's sums are sent before
// their place is needed again.
__host__ __device__ constexpr int TurnsAtOnce(int turns) { return turns > 1 ? 2 : 1; }
constexpr int kSumBuffers = 2;
constexpr int kStages = 4;

// One turn of some rows; padded so that eight lanes, which read two rows, meet all banks.
template <int kRows>
using StagedRows = uint8_t[kRows][kColsPerTurn * 2 + 64];

// A turn of W1 (before, of what is added to the residual), of what x is made of, of the norm.
template <RouteInput kInput>
struct alignas(16) ManyStage {
  StagedRows<16 * kHiddenTiles> w1;
  StagedRows<kTokens> x[kInput == RouteInput::kSwiGlu ? 2 : 1];
  float norm[kInput == RouteInput::kNorm ? kColsPerTurn : 4];
};

// ---- Who does what.

struct ManyPlace {
  int tid, warp, half, g, t;  // warp: of the half
  int blocks, block;          // of the cluster
  int first_token, count;
  int first_rank, ranks, turns;
  int block_col, block_cols;

  __device__ __forceinline__ ManyPlace(const RouteParams& p)
      : tid(static_cast<int>(threadIdx.x)),
        warp(tid / 32 % kRouteWarps),
        half(tid / kRouteThreads),
        g(tid % 32 / 4),
        t(tid % 4),
        blocks(static_cast<int>(gridDim.x)),
        block(static_cast<int>(blockIdx.x)),
        first_token(static_cast<int>(blockIdx.y) * kTokens),
        count(min(kTokens, p.batch.num_tokens - first_token)),
        ranks(kRouteRanks / blocks),
        turns(TurnsOf(p.cols)) {
    first_rank = block * ranks;
    block_col = first_rank * turns * kColsPerTurn;
    block_cols = min(max(p.cols - block_col, 0), ranks * turns * kColsPerTurn);
  }

  // Whether this warp has columns in a step: columns come in groups, so all of its 32 or none.
  __device__ __forceinline__ bool Has(int step) const {
    return step * kColsPerTurn + warp * 32 < block_cols;
  }
  // This lane's token of the block, its first column in a step, counted from the block's first.
  __device__ __forceinline__ int slot() const { return 8 * half + g; }
  __device__ __forceinline__ bool HasToken() const { return slot() < count; }
  __device__ __forceinline__ int Col(int step) const {
    return step * kColsPerTurn + warp * 32 + 8 * t;
  }
};

// Copies of one matrix' rows to stages: a thread brings 16 bytes of every sixteenth row.
template <int kRows>
struct RowCopies {
  static constexpr int kChunks = kColsPerTurn / 8, kAtOnce = kManyThreads / kChunks;
  static_assert(kRows % kAtOnce == 0);
  const uint8_t* from[kRows / kAtOnce];

  // row(r): where row r of the matrix begins.
  template <typename Row>
  __device__ __forceinline__ RowCopies(const ManyPlace& place, const Row& row) {
#pragma unroll
    for (int i = 0; i < kRows / kAtOnce; ++i) {
      from[i] = reinterpret_cast<const uint8_t*>(row(place.tid / kChunks + i * kAtOnce) +
                                                 place.block_col + 8 * (place.tid % kChunks));
    }
  }

  template <int kRoom>
  __device__ __forceinline__ void Copy(const ManyPlace& place, int step,
                                       StagedRows<kRoom>& to) const {
    static_assert(kRoom >= kRows);
    const int chunk = place.tid % kChunks;
    if (step * kColsPerTurn + 8 * chunk >= place.block_cols) return;
#pragma unroll
    for (int i = 0; i < kRows / kAtOnce; ++i) {
      ptx::CopyAsync16(ptx::SharedAddress(&to[place.tid / kChunks + i * kAtOnce][chunk * 16]),
                       from[i] + step * (kColsPerTurn * 2));
    }
  }
};

// Eight elements of a row in a stage.
template <int kRows>
__device__ __forceinline__ uint4 Staged(const StagedRows<kRows>& rows, int row,
                                        const ManyPlace& place) {
  return *reinterpret_cast<const uint4*>(&rows[row][(place.warp * 32 + 8 * place.t) * 2]);
}

// copy(stage, step) begins the copies of a step; use(stage, step) is called when they are there,
// after begin() with all that was used before a barrier ago. Ends with a barrier.
template <typename Stage, typename Copy, typename Begin, typename Use>
__device__ __forceinline__ void ForEachStep(const ManyPlace& place, Stage* stages, const Copy& copy,
                                            const Begin& begin, const Use& use) {
  const int steps = place.ranks * place.turns, at_once = TurnsAtOnce(place.turns);
  const auto copy_some = [&](int first, int at) {
    if (first < steps) copy(stages[at], first);
    if (at_once > 1 && first + 1 < steps) copy(stages[at + 1], first + 1);
    ptx::CommitCopies();
  };
  copy_some(0, 0);
  for (int first = 0, at = 0; first < steps; first += at_once, at ^= 2) {
    ptx::WaitCopies<0>();
    __syncthreads();  // these steps' are there, and all have left the stages of those before
    copy_some(first + at_once, at ^ 2);
    begin();
    use(stages[at], first);
    if (at_once > 1 && first + 1 < steps) use(stages[at + 1], first + 1);
  }
  __syncthreads();
}

// ---- The parts of the kernel.

// A token's row; the last token's in place of one that there is not, whose results nobody reads.
template <typename T>
__device__ __forceinline__ T* TokenRow(const ManyPlace& place, T* rows, int64_t stride, int slot) {
  return rows + (place.first_token + min(slot, place.count - 1)) * stride;
}

// residual += delta, and 1 / rms of this lane's token.
template <typename T, typename Stage>
__device__ __forceinline__ float AddAndMeasureMany(const RouteParams& p, const ManyPlace& place,
                                                   Stage* stages, ManyShared& s) {
  T* const residual = static_cast<T*>(p.source);
  const T* const delta = static_cast<const T*>(p.delta);
  T* const own = TokenRow(place, residual, p.source_stride, place.slot()) + place.block_col;
  const RowCopies<kTokens> old(
      place, [&](int r) { return TokenRow<const T>(place, residual, p.source_stride, r); });
  const RowCopies<kTokens> more(
      place, [&](int r) { return TokenRow<const T>(place, delta, p.delta_stride, r); });
  float squares = 0;
  int turn = 0, rank = 0;
  ForEachStep(
      place, stages,
      [&](Stage& stage, int step) {
        old.Copy(place, step, stage.x[0]);
        if (delta != nullptr) more.Copy(place, step, stage.w1);
      },
      [] {},
      [&](const Stage& stage, int step) {
        if (place.Has(step)) {
          uint4 kept = Staged(stage.x[0], place.slot(), place);
          AddElements<T>(p, Staged(stage.w1, place.slot(), place), kept, own + place.Col(step),
                         &squares, place.HasToken());
        }
        if (++turn < place.turns) return;
        squares = QuadSum(squares);
        if (place.t == 0) s.own_squares[rank][place.warp][place.slot()] = squares;
        squares = 0;
        turn = 0;
        ++rank;
      });
  for (int e = place.tid; e < kRouteRanks * kTokens; e += kManyThreads) {  // to every block
    const int token = e % kTokens, of_block = e / kTokens % place.ranks;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += s.own_squares[of_block][w][token];
    StoreRemote(&s.squares[place.first_rank + of_block][token], e / kTokens / place.ranks, sum);
  }
  ClusterSync();
  float sum = 0;
#pragma unroll
  for (int r = 0; r < kRouteRanks; ++r) sum += s.squares[r][place.slot()];
  return rsqrtf(sum / static_cast<float>(p.cols) + p.eps);
}

// Whether a token of this cluster has a choice. The batch was there before the step's first kernel.
__device__ __forceinline__ bool AnyChooses(const RoutingBatch& batch, const ManyPlace& place) {
  static_assert(kTokens <= 32);
  const int lane = place.tid % 32, token = place.first_token + lane;
  return __any_sync(kFullWarp,
                    lane < place.count && batch.min_level[token] != batch.max_level[token]) != 0;
}

// Makes x and, if kRoutes, sends each rank's sums of W1 x and of x's squares.
template <bool kRoutes, typename T, RouteInput kInput, typename Stage>
__device__ __forceinline__ void MultiplyMany(const RouteParams& p, const ManyPlace& place,
                                             float scale, Stage* stages, WarpSums* sums,
                                             ManyShared& s) {
  constexpr bool kPlain = kInput == RouteInput::kPlain;
  const T* const from = static_cast<const T*>(kPlain ? p.x : p.source);
  const int64_t stride = kPlain ? p.x_stride : p.source_stride;
  T* const x = TokenRow(place, static_cast<T*>(p.x), p.x_stride, place.slot()) + place.block_col;
  const RowCopies<16 * kHiddenTiles> w1(place, [&](int r) {
    return p.w1 + min(r, p.num_hidden - 1) * p.w1_stride;  // beyond: sums that nobody reads
  });
  const RowCopies<kTokens> source(place,
                                  [&](int r) { return TokenRow<const T>(place, from, stride, r); });
  RouteSums<kHiddenTiles, 1> own;
  int turn = 0, rank = 0, sent = 0;
  const auto send = [&] {
    for (; sent < rank; ++sent) {
      SendRankSums(sums[sent % kSumBuffers], place.count, place.blocks,
                   s.partials[place.first_rank + sent], kManyThreads);
    }
  };
  ForEachStep(
      place, stages,
      [&](Stage& stage, int step) {
        if constexpr (kRoutes) w1.Copy(place, step, stage.w1);
        source.Copy(place, step, stage.x[0]);
        if constexpr (kInput == RouteInput::kSwiGlu) {
          RowCopies<kTokens> up = source;
          up.from[0] += p.cols * sizeof(T);
          up.Copy(place, step, stage.x[1]);
        }
        if constexpr (kInput == RouteInput::kNorm) {
          const int col = step * kColsPerTurn + 4 * place.tid;
          if (4 * place.tid >= kColsPerTurn || col >= place.block_cols) return;
          ptx::CopyAsync16(ptx::SharedAddress(stage.norm + 4 * place.tid),
                           p.norm_weight + place.block_col + col);
        }
      },
      send,
      [&](const Stage& stage, int step) {
        if (place.Has(step)) {
          uint4 w[kHiddenTiles][2];
#pragma unroll
          for (int r = 0; kRoutes && r < 2 * kHiddenTiles; ++r) {
            w[r / 2][r % 2] = Staged(stage.w1, 8 * r + place.g, place);
          }
          RawElements raw{Staged(stage.x[0], place.slot(), place), {}};
          if constexpr (kInput == RouteInput::kSwiGlu) {
            raw.second = Staged(stage.x[1], place.slot(), place);
          }
          float v[8];
          MakeInput<T, kInput>(raw, stage.norm + place.warp * 32 + 8 * place.t, scale,
                               x + place.Col(step), v, place.HasToken());
          if constexpr (kRoutes) {
            const uint4 halves[1] = {AsHalves<T>(v, &own.squares[0])};
            MultiplyTurn<kHiddenTiles, 1>(w, halves, own.w1_x);
          }
        }
        if (!kRoutes || ++turn < place.turns) return;
        own.Keep(sums[rank % kSumBuffers][place.warp] + 8 * place.half);
        own = {};
        turn = 0;
        ++rank;
      });
  send();
}

template <typename T, RouteInput kInput>
__global__ void __launch_bounds__(kManyThreads, 1)
    RouteManyKernel(const __grid_constant__ RouteParams p) {
#if MOBI_SM90
  using Stage = ManyStage<kInput>;
  constexpr bool kNorm = kInput == RouteInput::kNorm;
  extern __shared__ __align__(16) uint8_t memory[];
  const ManyPlace place(p);
  auto& s = *reinterpret_cast<ManyShared*>(memory);
  auto* const sums = reinterpret_cast<WarpSums*>(memory + sizeof(s));
  auto* const stages = reinterpret_cast<Stage*>(sums + kSumBuffers);
  const int tid = place.tid;
  ptx::ClusterArriveRelaxed();
  AllowNext();
  const bool routes = AnyChooses(p.batch, place);
  if (routes) LoadRouter(p, s);
  if (tid < kMaxSegments) s.highest[tid] = 0;
  WaitForPrevious();
  ptx::ClusterWait();  // every block of the cluster has begun
  float scale = 0;
  if constexpr (kNorm) scale = AddAndMeasureMany<T>(p, place, stages, s);
  const RouteTokens tokens{place.first_token, place.block, place.blocks, place.count};
  const int slots = max(tokens.mine(), 0);
  if (routes) {
    MultiplyMany<true, T, kInput>(p, place, scale, stages, sums, s);
    ClusterSync();
    AddRanks(slots, s);
    ScoreTokens(p, slots, s, s.losses);
  } else {
    for (int e = tid; e < kTokens * kMaxScores; e += kManyThreads) (&s.losses[0][0])[e] = 0;
    if constexpr (kInput == RouteInput::kPlain) {
      __syncthreads();
    } else {
      MultiplyMany<false, T, kInput>(p, place, scale, stages, sums, s);
    }
  }
  ChooseOwn(p, p.batch, tokens, slots, s.losses, s,
            [&](int token, int score, float loss) { p.losses[token * kMaxScores + score] = loss; });
  FinishSeveral(p, p.batch, p.counters, gridDim.x * gridDim.y, s);
#endif
}

// Blocks to a cluster: as many as leave room for all clusters at once, one block to a
// multiprocessor. Of larger clusters a tenth of the device may find no place.
uint32_t ClusterSize(uint32_t groups, int num_sms) {
  const auto room = static_cast<uint32_t>(num_sms);
  for (const uint32_t size : {8u, 4u}) {
    if (groups * size <= room * 9 / 10) return size;
  }
  return groups * 2 <= room ? 2 : 1;
}

template <typename T, RouteInput kInput>
cudaError_t LaunchInput(const LaunchContext& context, const RouteParams& params) {
  const uint32_t groups = CeilDiv(params.batch.num_tokens, kTokens);
  const uint32_t size = ClusterSize(groups, context.num_sms);
  const size_t shared_bytes =
      sizeof(ManyShared) + kSumBuffers * sizeof(WarpSums) + kStages * sizeof(ManyStage<kInput>);
  return LaunchClusters(context, size, RouteManyKernel<T, kInput>, dim3(size, groups), kManyThreads,
                        shared_bytes, params);
}

}  // namespace

cudaError_t LaunchRouteMany(const LaunchContext& context, const RouteParams& params, DType x) {
  RouteParams with_scratch = params;
  const size_t loss_bytes = size_t(params.batch.num_coherent) * kMaxScores * sizeof(float);
  if (loss_bytes > context.scratch_bytes || 1 + kMaxSegments > context.num_counters) {
    return cudaErrorInvalidValue;
  }
  with_scratch.losses = reinterpret_cast<float*>(context.scratch);
  with_scratch.counters = context.counters;
  return WithRouteInput(x, params.input, [&](auto element, auto input) {
    return LaunchInput<decltype(element), input()>(context, with_scratch);
  });
}

}  // namespace mobi::cuda
