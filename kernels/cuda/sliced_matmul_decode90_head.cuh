// The head of a kernel that makes a linear's x and routes by itself
// (sliced_matmul_decode90_route.cuh), up to the sums of W1 x: the eight blocks of a cluster share
// the columns of W1 as they share the matmul's.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_HEAD_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_HEAD_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/sliced_matmul_decode90_input.cuh"

namespace mobi::cuda {

inline constexpr int kMaxTurns = 8;                // of W1
inline constexpr int kHeldTurns = 4;               // in registers; the others: Later
inline constexpr int kW1RowBytes = kTurnCols * 2;  // of a turn
inline constexpr int kW1TurnBytes = kMaxFusedRouterHidden * kW1RowBytes;

// Of at most eight tokens, a warpgroup of its own chooses levels while the others multiply at
// those that the same tokens' linear had the last time.
template <int N>
inline constexpr bool kRunsAhead = N <= 8;
// Of at most four, it also multiplies W1, for which shared memory has room, as it has for x as
// halves beside x as whole numbers.
template <int N>
inline constexpr bool kChoosersHaveW1 = N <= 4;
inline constexpr int kMultiplyBarrier = 1, kChooseBarrier = 2;

// What the head of the kernel keeps in shared memory.
template <int N, int W>
struct RouteHead {
  static constexpr int kSumWidth = kMaxFusedRouterHidden + 1;
  // Who chooses: a warpgroup of its own, or all.
  static constexpr int kFirstThread = kRunsAhead<N> ? 128 * W : 0;
  static constexpr int kThreads = kRunsAhead<N> ? 128 : 128 * W;
  static __device__ __forceinline__ int Thread() {
    return static_cast<int>(threadIdx.x) - kFirstThread;
  }
  NormShared<N> norm;
  float sums[kRouteWarps][N][kSumWidth];  // W1 x and the sum of squares, by columns of a warp
  float partials[kRouteRanks][N][kSumWidth];
  float hidden[N][kMaxFusedRouterHidden];
  float losses[N][kMaxScores];
  float w2[kMaxScores][kMaxFusedRouterHidden + 1];
  float b2[kMaxScores];
  float b1[kMaxFusedRouterHidden];
  float u[kMaxFusedRouterHidden];
  // The batch, fetched while x is.
  float price[N];
  double inverse_price[N];
  int pinned_level;  // the highest that is read whatever the others choose; 0: none
  uint8_t min_level[N], max_level[N];
  uint8_t levels[kMaxSegments][N];  // 0 where there is no token
  uint32_t present;                 // 4 bits per segment: levels that occur among the tokens
  int pinned[kThreads / 32];
  double together[kMaxScores];
};

template <int N, int W>
using InputOfHead = Decode90Input<N, W, kRunsAhead<N>, kRunsAhead<N> ? 4 : 0>;

template <int N, int W>
struct Decode90Head : InputOfHead<N, W> {
  using Base = InputOfHead<N, W>;
  using Base::kAllWarps;
  using Base::kWarps;
  using Base::lane;
  using Base::num_tokens;
  using Base::plan;
  using Base::rank;
  using Base::shared;
  using Base::tid;
  using Base::turns;
  using Base::warp;
  using Head = RouteHead<N, W>;
  static_assert(32 * kAllWarps == Head::kFirstThread + Head::kThreads);
  static constexpr int kRouters = Head::kThreads / 32;  // warps that choose, the last ones
  static constexpr int kEights = (N + 7) / 8;           // of tokens, W1's operand
  static constexpr int kW1Warps = 2 * kRouteWarps;  // a warp has one of two tiles of hidden units
  static_assert(kWarps >= kW1Warps);

  const RouteParams& r;
  Head& s;
  uint4 w1[kHeldTurns][2];

  __device__ __forceinline__ Decode90Head(const SlicedProblem& problem, const Decode90Plan& plan,
                                          const RouteParams& route, uint8_t* memory)
      : Base(problem, plan, route, memory),
        r(route),
        s(*reinterpret_cast<Head*>(memory + plan.head)) {
    this->chosen = SumsArrive() + 8;
    this->choice = &s.present;
  }

  __device__ __forceinline__ bool Chooses() const { return warp >= kAllWarps - kRouters; }

  // Counts the sums that the cluster's blocks send.
  __device__ __forceinline__ uint32_t SumsArrive() const { return Base::SquaresArrive() + 8; }
  // The first column, of the block's, of this lane's eight in a turn.
  __device__ __forceinline__ int TurnCol(int turn) const {
    return turn * kTurnCols + warp % kRouteWarps * 32 + lane % 4 * 8;
  }

  // ---- Before the previous kernel has ended: weights.

  // This lane's 16 bytes of turn kHeldTurns + turn, row half h, in the ring: not in use yet.
  __device__ __forceinline__ uint8_t* Later(int turn, int h) const {
    return shared + plan.ring + ((turn * 2 + h) * kW1Warps * 32 + tid) * 16;
  }

  // Where 16 bytes of W1 are in shared memory, `turn` of those that are there. Lanes that read four
  // neighbours of two rows meet different banks.
  __device__ __forceinline__ uint8_t* W1At(int turn, int row, int chunk) const {
    return shared + plan.w1 + turn * kW1TurnBytes + row * kW1RowBytes +
           (chunk ^ (row & 1) << 2) * 16;
  }

  // Asks for W1 from that turn on, as many turns as there is room for, by the warps that choose.
  __device__ __forceinline__ void LoadSharedW1(int first) const {
    static_assert(kW1RowBytes == 32 * 16 && kRouters % 2 == 0);
    const int row = Head::Thread() / 32, stride = static_cast<int>(r.w1_stride);
    const half* from = r.w1 + row * stride + (rank * turns + first) * kTurnCols + lane * 8;
    uint32_t to = ptx::SharedAddress(W1At(0, row, lane));
#pragma unroll 1
    for (int turn = min(plan.w1_turns, turns - first); turn > 0; --turn) {
#pragma unroll
      for (int i = 0; i < kMaxFusedRouterHidden; i += kRouters) {
        if (row + i < r.num_hidden) ptx::CopyAsync16(to + i * kW1RowBytes, from + i * stride);
      }
      to += kW1TurnBytes, from += kTurnCols;
    }
    ptx::CommitCopies();
  }

  // Where all multiply W1: this warp's rows.
  __device__ __forceinline__ void LoadW1() {
    if (warp >= kW1Warps) return;
    // Rows beyond the last repeat it; nothing of them is used.
    const int first_row = warp / kRouteWarps * 16 + lane / 4, last_row = r.num_hidden - 1;
    const half* const from = r.w1 + rank * turns * kTurnCols + TurnCol(0);
    const half* const rows[2] = {
        from + min(first_row, last_row) * static_cast<int>(r.w1_stride),
        from + min(first_row + 8, last_row) * static_cast<int>(r.w1_stride)};
#pragma unroll
    for (int turn = 0; turn < kMaxTurns; ++turn) {
      if (turn >= turns) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const half* const at = rows[h] + turn * kTurnCols;
        if (turn < kHeldTurns) {
          w1[turn][h] = *reinterpret_cast<const uint4*>(at);
        } else {
          ptx::CopyAsync16(ptx::SharedAddress(Later(turn - kHeldTurns, h)), at);
        }
      }
    }
  }

  // The rest is of the warps that choose.
  __device__ __forceinline__ void LoadHead() const {
    Base::LoadNorm(Head::Thread(), Head::kThreads);
    const bool hidden = lane < r.num_hidden;
    const int first = Head::Thread() / 32;
    for (int row = first; row < r.num_segments * kNumLevels; row += kRouters) {
      if (hidden) {
        ptx::CopyAsync4(ptx::SharedAddress(&s.w2[row][lane]),
                        r.w2 + row * static_cast<int>(r.w2_stride) + lane);
      }
      if (lane == 0) ptx::CopyAsync4(ptx::SharedAddress(s.b2 + row), r.b2 + row);
    }
    if (first == 0 && hidden) ptx::CopyAsync4(ptx::SharedAddress(s.b1 + lane), r.b1 + lane);
    if (first == 1 && hidden) ptx::CopyAsync4(ptx::SharedAddress(s.u + lane), r.u + lane);
    ptx::CommitCopies();
    for (int i = Head::Thread(); i < kMaxSegments * N; i += Head::kThreads)
      s.levels[i / N][i % N] = 0;
    if (Head::Thread() == 0) s.present = 0;
  }

  // By one thread, for all of the cluster.
  __device__ __forceinline__ void MakeHeadBarriers() const {
    if (Head::Thread() != 0) return;
    Base::InitSquaresBarrier();
    ptx::BarrierInit(SumsArrive(), 1);
    ptx::BarrierInit(this->chosen, 32);
    ptx::FenceBarrierInit();
    ptx::BarrierArriveExpecting(SumsArrive(), kRouteRanks * num_tokens * Head::kSumWidth * 4);
    Base::ExpectSquares();
  }

  // ---- x.

  // How this lane's token is routed: asked for with x, used long after. By a warp that has time.
  __device__ __forceinline__ bool KeepsBatch() const { return warp == kWarps - 1; }
  struct OfBatch {
    float price;
    uint8_t min_level, max_level;
  };
  __device__ __forceinline__ OfBatch LoadBatch() const {
    OfBatch own{};
    if (KeepsBatch() && lane < num_tokens) {
      own = {__ldcg(r.batch.price + lane), __ldcg(r.batch.min_level + lane),
             __ldcg(r.batch.max_level + lane)};
    }
    return own;
  }
  __device__ __forceinline__ void StoreBatch(const OfBatch& own) const {
    if (!KeepsBatch()) return;
    if (lane < num_tokens) {
      s.price[lane] = own.price;
      s.min_level[lane] = own.min_level, s.max_level[lane] = own.max_level;
    }
    if constexpr (kRunsAhead<N>) {  // what one warp needs to choose for all
      const uint32_t pinned = own.min_level == own.max_level ? own.max_level : 0;
      const int highest = static_cast<int>(__reduce_max_sync(kFullWarp, pinned));
      if (lane == 0) s.pinned_level = max(highest, r.others_level);
      if (lane < num_tokens) s.inverse_price[lane] = 1.0 / own.price;
    }
  }

  // Items go to all warps, first to those that choose. Halves and whole numbers have each a place
  // of their own, or whole numbers come later in the place of halves: EncodeHalves.
  __device__ __forceinline__ void MakeX() const {
    const int first_item = kRunsAhead<N> ? (warp + kRouters) % kAllWarps : warp;
    const auto v = Base::ReadSource(first_item);
    const OfBatch own = LoadBatch();
    ptx::ClusterWait();  // every block has begun, and may be sent to
    if (!kRunsAhead<N>) ptx::ClusterArriveRelaxed();
    if (r.input == RouteInput::kNorm) {
      if (warp < kWarps) Base::Measure();
      AwaitHead();
      __syncthreads();
    }
    Base::MakeItems(first_item, v, [&](int group, int token, const uint4& made) {
      if (token < num_tokens) *this->OwnHalves(group, token) = made;
      if constexpr (kChoosersHaveW1<N>) Base::Encode(group, token, made);
    });
    StoreBatch(own);
    AwaitHead();
  }

  // What LoadHead has asked for is here, and W1 where all multiply it.
  __device__ __forceinline__ void AwaitHead() const {
    if constexpr (!kChoosersHaveW1<N>) {
      ptx::WaitCopies<0>();
    } else if (Chooses()) {
      ptx::WaitCopies<1>();  // W1 may be under way
    }
  }

  // ---- The router.

  // Sixteen hidden units, this lane's eight columns of two of them, times eight tokens.
  static __device__ __forceinline__ void MultiplyTile(const uint4 (&rows)[2], const uint4& x,
                                                      float (&sums)[4]) {
    const uint32_t low[4] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y};
    const uint32_t high[4] = {rows[0].z, rows[1].z, rows[0].w, rows[1].w};
    Mma<half>(sums, low, x.x, x.y);
    Mma<half>(sums, high, x.z, x.w);
  }
  // Of the columns of one of route.cu's warps.
  __device__ __forceinline__ void KeepTile(int of_warp, int tile, int eight,
                                           const float (&sums)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * eight + lane % 4 * 2 + i % 2;
      if (token < N) s.sums[of_warp][token][16 * tile + lane / 4 + 8 * (i / 2)] = sums[i];
    }
  }
  __device__ __forceinline__ void KeepSquares(int of_warp, int eight, float squares) const {
    const int token = 8 * eight + lane / 4;
    const float of_token = QuadSum(squares);
    if (lane % 4 == 0 && token < N) s.sums[of_warp][token][Head::kSumWidth - 1] = of_token;
  }

  // sums = W1 x and the sums of squares, over the columns of each warp. Tokens beyond the last
  // bring what lies in memory; nothing of them is used.
  __device__ __forceinline__ void MultiplyW1() {
    if (warp >= kW1Warps) return;
    const int g = lane / 4, t = lane % 4, of_hidden = warp / kRouteWarps, w = warp % kRouteWarps;
    float sums[kEights][4] = {}, squares[kEights] = {};
    // Where Make put this lane's eight columns of the first turn.
    const int group = w / 4, of_token = w % 4;
    constexpr int kTurnGroups = kTurnCols / kGroupSize;
#pragma unroll
    for (int turn = 0; turn < kMaxTurns; ++turn) {
      if (turn >= turns) break;
      uint4 rows[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        rows[h] = turn < kHeldTurns ? w1[turn % kHeldTurns][h]
                                    : *reinterpret_cast<const uint4*>(Later(turn - kHeldTurns, h));
      }
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        const uint4 x =
            *this->HalvesAt(group + turn * kTurnGroups, min(8 * n + g, N - 1), t, of_token);
        if (of_hidden == 0) Base::AddSquares(x, squares[n]);
        MultiplyTile(rows, x, sums[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      KeepTile(w, of_hidden, n, sums[n]);
      if (of_hidden == 0) KeepSquares(w, n, squares[n]);
    }
  }

  // The same by the warps that choose, each for two of route.cu's. Rows of W1 beyond the last are
  // what lies in memory; nothing of them is used.
  __device__ __forceinline__ void MultiplySharedW1() const {
    const int g = lane / 4, t = lane % 4, first_warp = Head::Thread() / 32 * 2;
    float sums[2][2][4] = {}, squares[2] = {};
    constexpr int kTurnGroups = kTurnCols / kGroupSize;
#pragma unroll 1
    for (int first = 0; first < turns; first += plan.w1_turns) {
      if (first > 0) {
        ptx::NamedBarrier(kChooseBarrier, Head::kThreads);  // all have read the turns before
        LoadSharedW1(first);
      }
      ptx::WaitCopies<0>();
      ptx::NamedBarrier(kChooseBarrier, Head::kThreads);
      const int count = min(plan.w1_turns, turns - first);
#pragma unroll 1
      for (int turn = 0; turn < count; ++turn) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int w = first_warp + i;
          const uint4 x =
              *this->HalvesAt(w / 4 + (first + turn) * kTurnGroups, min(g, N - 1), t, w % 4);
          Base::AddSquares(x, squares[i]);
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            if (16 * tile >= r.num_hidden) break;
            uint4 rows[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int row = 16 * tile + 8 * h + g;
              rows[h] = *reinterpret_cast<const uint4*>(W1At(turn, row, 4 * w + t));
            }
            MultiplyTile(rows, x, sums[i][tile]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      KeepSquares(first_warp + i, 0, squares[i]);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) KeepTile(first_warp + i, tile, 0, sums[i][tile]);
    }
    ptx::NamedBarrier(kChooseBarrier, Head::kThreads);
  }

  // Every block of the cluster gets every block's sums.
  __device__ __forceinline__ void Share() const {
    const int values = num_tokens * Head::kSumWidth;
#pragma unroll 1
    for (int e = Head::Thread(); e < values; e += Head::kThreads) {
      const int token = e / Head::kSumWidth, at = e % Head::kSumWidth;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kRouteWarps; ++w) sum += s.sums[w][token][at];
      const uint32_t to = ptx::SharedAddress(&s.partials[rank][token][at]);
#pragma unroll
      for (int receiver = 0; receiver < kRouteRanks; ++receiver) {
        ptx::StoreClusterAsync(ptx::MapToRank(to, receiver), sum,
                               ptx::MapToRank(SumsArrive(), receiver));
      }
    }
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_HEAD_CUH_
