// Router MLP and choice of levels in one kernel, and on request the op that makes the router's
// input (a norm, SwiGLU), so that a decode step has fewer kernels in its chain. Eight blocks share
// the columns of W1, whose fragments they fetch before they wait for the input. With clusters
// (compute capability 9.0) they exchange sums through shared memory and finish the tokens between
// them; without, through scratch, and the block that arrives last finishes the group. The sums'
// order is the same either way. For a matmul of the batch path the kernel also leaves x as whole
// numbers, which saves that one's own kernel.
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/sliced_matmul_batch90_image.cuh"

namespace mobi::cuda {
namespace {

constexpr int kColsPerTurn = kRouteWarps * 32;

// Of a block's columns.
__host__ __device__ constexpr int TurnsOf(int cols) {
  constexpr int kCols = kRouteRanks * kColsPerTurn;
  return (cols + kCols - 1) / kCols;
}

__device__ __forceinline__ void PrefetchL2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// This lane's part of W1 for a few turns: columns first_col + turn * kColsPerTurn .. + 7 of rows g,
// g + 8, ...
template <int kHiddenTiles, int kTurns>
struct RouterWeights {
  static constexpr int kRows = 2 * kHiddenTiles;
  uint4 held[kTurns][kHiddenTiles][2];
  const half* rows[kRows];  // at first_col; null: there is no such row
  int first_col, cols;

  __device__ __forceinline__ RouterWeights(const RouteParams& p, int first_col)
      : first_col(first_col), cols(p.cols) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
    const half* row = p.w1 + g * p.w1_stride + first_col;
#pragma unroll
    for (int r = 0; r < kRows; ++r, row += 8 * p.w1_stride) {
      rows[r] = 8 * r + g < p.num_hidden ? row : nullptr;
    }
  }

  // Of turns first .. first + kTurns - 1 below `turns`.
  __device__ __forceinline__ void Fetch(int first, int turns) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int at = (first + i) * kColsPerTurn;
      const bool there = first + i < turns && first_col + at < cols;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        held[i][r / 2][r % 2] = there && rows[r] != nullptr
                                    ? *reinterpret_cast<const uint4*>(rows[r] + at)
                                    : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Those after the first kTurns come to L2 ahead of time.
  __device__ __forceinline__ void Prefetch(int turns) const {
    for (int turn = kTurns; turn < turns; ++turn) {
      const int at = turn * kColsPerTurn;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (rows[r] != nullptr && first_col + at < cols) PrefetchL2(rows[r] + at);
      }
    }
  }
};

// sums[hidden tile][token tile] += W1 x for one turn; x as packed halves.
template <int kHiddenTiles, int kTokenTiles>
__device__ __forceinline__ void MultiplyTurn(const uint4 (&w)[kHiddenTiles][2],
                                             const uint4 (&x)[kTokenTiles],
                                             float (&sums)[kHiddenTiles][kTokenTiles][4]) {
#pragma unroll
  for (int r = 0; r < kHiddenTiles; ++r) {
    const uint32_t first[4] = {w[r][0].x, w[r][1].x, w[r][0].y, w[r][1].y};
    const uint32_t second[4] = {w[r][0].z, w[r][1].z, w[r][0].w, w[r][1].w};
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      Mma<half>(sums[r][n], first, x[n].x, x[n].y);
      Mma<half>(sums[r][n], second, x[n].z, x[n].w);
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 PackElements(const float (&v)[8]) {
  return make_uint4(Pack<T>(v[0], v[1]), Pack<T>(v[2], v[3]), Pack<T>(v[4], v[5]),
                    Pack<T>(v[6], v[7]));
}

template <typename T>
__device__ __forceinline__ void UnpackElements(const uint4& from, float (&v)[8]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Unpack<T>(words[i]);
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}

// Eight elements as halves for the mma; their squares are added.
template <typename T>
__device__ __forceinline__ uint4 AsHalves(const float (&v)[8], float* squares) {
#pragma unroll
  for (int i = 0; i < 8; ++i) *squares = fmaf(v[i], v[i], *squares);
  return PackElements<half>(v);
}

// A block's memory beside RouteShared: what its columns alone need.
template <int kTokens>
struct RouteColumns {
  float* norm;    // weights of the norm
  uint8_t* tile;  // x, for the images: [token] of tile_stride bytes; null: not needed
  int tile_stride;

  static constexpr int kPad = 64;  // so that a quarter of a warp's stores meet no bank twice

  static size_t Bytes(int turns, bool norm, bool images) {
    const size_t columns = size_t{kColsPerTurn} * turns;
    return (norm ? columns * sizeof(float) : 0) + (images ? kTokens * (columns * 2 + kPad) : 0);
  }

  __device__ __forceinline__ RouteColumns(uint8_t* memory, int turns, bool has_norm, bool images) {
    const int columns = kColsPerTurn * turns;
    norm = reinterpret_cast<float*>(memory);
    tile = images ? memory + (has_norm ? columns * sizeof(float) : 0) : nullptr;
    tile_stride = columns * 2 + kPad;
  }

  // Begins the copies of `count` weights.
  __device__ __forceinline__ void LoadNorm(const float* weights, int count) const {
    for (int i = 4 * static_cast<int>(threadIdx.x); i < count; i += 4 * kRouteThreads) {
      ptx::CopyAsync16(ptx::SharedAddress(norm + i), weights + i);
    }
  }
};

// A token's rows at this lane's first column.
template <typename T>
struct TokenRows {
  T* x;
  T* source;
  const T* delta;

  __device__ __forceinline__ TokenRows(const RouteParams& p, int64_t token, int first_col)
      : x(static_cast<T*>(p.x) + token * p.x_stride + first_col),
        source(static_cast<T*>(p.source) + token * p.source_stride + first_col),
        delta(static_cast<const T*>(p.delta) + token * p.delta_stride + first_col) {}
};

// What eight elements of x are made of: themselves, the residual's, or those of gate and up.
struct RawElements {
  uint4 first, second;
};

// at: from the lane's first column.
template <typename T, RouteInput kInput>
__device__ __forceinline__ RawElements LoadRaw(const TokenRows<T>& rows, int at, int cols) {
  const auto load = [](const T* from) { return *reinterpret_cast<const uint4*>(from); };
  if constexpr (kInput == RouteInput::kPlain) return {load(rows.x + at), {}};
  if constexpr (kInput == RouteInput::kNorm) return {load(rows.source + at), {}};
  return {load(rows.source + at), load(rows.source + at + cols)};
}

// The elements of x, which are written unless they are there. norm: their weights.
template <typename T, RouteInput kInput>
__device__ __forceinline__ void MakeInput(const RawElements& raw, const float* norm, float scale,
                                          T* x, float (&v)[8]) {
  UnpackElements<T>(raw.first, v);
  if constexpr (kInput == RouteInput::kPlain) return;
  float other[8];
  if constexpr (kInput == RouteInput::kNorm) {
    Load8(norm, 8, true, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale * other[i];
  } else {
    UnpackElements<T>(raw.second, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = Silu(v[i]) * other[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = ToFloat(FromFloat<T>(v[i]));
  Store8(x, 8, true, v);
}

// residual += delta for this lane's elements of turns first .. first + kTurns - 1 below `turns`,
// which it keeps; their squares are added.
template <typename T, int kTurns>
__device__ __forceinline__ void AddTurns(const RouteParams& p, const TokenRows<T>& rows,
                                         int first_col, int first, int turns, uint4 (&kept)[kTurns],
                                         float* squares) {
  const auto is_there = [&](int i) {
    return first + i < turns && first_col + (first + i) * kColsPerTurn < p.cols;
  };
  uint4 more[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    if (!is_there(i)) break;
    const int at = (first + i) * kColsPerTurn;
    kept[i] = *reinterpret_cast<const uint4*>(rows.source + at);
    if (p.delta != nullptr) more[i] = *reinterpret_cast<const uint4*>(rows.delta + at);
  }
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    if (!is_there(i)) break;
    float v[8], add[8];
    UnpackElements<T>(kept[i], v);
    if (p.delta != nullptr) {
      UnpackElements<T>(more[i], add);
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] = ToFloat(FromFloat<T>(v[k] + add[k]));
      kept[i] = PackElements<T>(v);
      *reinterpret_cast<uint4*>(rows.source + (first + i) * kColsPerTurn) = kept[i];
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) *squares = fmaf(v[k], v[k], *squares);
  }
}

// residual += delta for this lane's elements of token g, then the cluster's sums of squares: 1 /
// rms of the token. kept: its elements of the first turns.
template <typename T, int kTurns, typename Shared>
__device__ __forceinline__ float AddAndMeasure(const RouteParams& p, const TokenRows<T>& rows,
                                               int count, int first_col, int turns, int rank,
                                               Shared& s, uint4 (&kept)[kTurns]) {
  constexpr int kTokens = 8;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32;
  const int g = tid % 32 / 4, t = tid % 4;
  float squares = 0;
  if (g < count) {
    AddTurns<T>(p, rows, first_col, 0, turns, kept, &squares);
    for (int first = kTurns; first < turns; first += kTurns) {
      uint4 others[kTurns];
      AddTurns<T>(p, rows, first_col, first, turns, others, &squares);
    }
  }
  squares = QuadSum(squares);
  if (t == 0) s.sums[warp][g][0] = squares;
  __syncthreads();
  for (int e = tid; e < kRouteRanks * kTokens; e += kRouteThreads) {
    const int token = e % kTokens;
    if (token >= count) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += s.sums[w][token][0];
    StoreRemote(&s.squares[rank][token], e / kTokens, sum);
  }
  ptx::WaitCopies<0>();  // of the norm's weights, for all threads after the barrier
  ClusterSync();
  float sum = 0;
#pragma unroll
  for (int r = 0; r < kRouteRanks; ++r) sum += s.squares[r][g];
  return rsqrtf(sum / static_cast<float>(p.cols) + p.eps);
}

// The block's columns of x, from its tile into the images. Half a warp has a token's, every other
// group.
template <typename T>
__device__ __forceinline__ void LeaveImages(const RouteParams& p, const BatchImages& images,
                                            const RouteColumns<8>& columns, int first_token,
                                            int count, int turns) {
  static_assert(kRouteThreads == 2 * 8 * 16 && kColsPerTurn == 2 * kGroupSize);
  const int tid = static_cast<int>(threadIdx.x), token = tid / 16 % 8, half = tid / 128;
  const int first_group = static_cast<int>(blockIdx.x) * 2 * turns + half;
  ImagePlace to(images, first_token + token, first_group);
  const uint8_t* from =
      columns.tile + token * columns.tile_stride + half * kGroupSize * sizeof(T) + tid % 16 * 16;
  for (int turn = 0; turn < turns; ++turn) {
    if ((first_group + 2 * turn) * kGroupSize >= p.cols) break;
    LeaveImage<std::is_same_v<T, bfloat16>>(to, token < count,
                                            *reinterpret_cast<const uint4*>(from));
    to.Advance(2);
    from += kColsPerTurn * sizeof(T);
  }
}

// The choice of the coherent tokens of several groups, and the sum of bytes, by the block that
// comes here last of `blocks`.
template <int kTokens, int kWidth>
__device__ __forceinline__ void FinishSeveral(const RouteParams& p, const RoutingBatch& batch,
                                              uint32_t blocks, RouteShared<kTokens, kWidth>& s) {
  const int tid = static_cast<int>(threadIdx.x);
  uint32_t* const highest = p.counters + gridDim.y + 1;
  if (tid < p.num_segments) atomicMax(highest + tid, static_cast<uint32_t>(s.highest[tid]));
  if (!ArriveLast(p.counters + gridDim.y, blocks, &s.flag)) return;
  uint32_t others = 0;  // arrives while the tokens choose
  if (tid < p.num_segments) others = atomicExch(highest + tid, 0);
  const int count = batch.num_coherent * kMaxScores;
  const float* losses = p.losses;
  if (count <= static_cast<int>(sizeof(s.sums) / sizeof(float))) {
    float* const here = &s.sums[0][0][0];
#pragma unroll 4
    for (int e = tid; e < count; e += kRouteThreads) here[e] = __ldcg(p.losses + e);
    losses = here;
    __syncthreads();
  }
  if (count > 0) ChooseTogether(p, batch, losses, s);
  if (tid < p.num_segments) atomicMax(s.highest + tid, static_cast<int>(others));
  __syncthreads();
  if (tid == 0) CountBytes(p, s.highest);
}

// The end of a group in a cluster: this block's own tokens, then rank 0 for what concerns all.
// meanwhile(): done while the sums are under way. for_matmul: it ends with the losses.
template <int kTokens, int kWidth, typename Meanwhile>
__device__ __forceinline__ void FinishInCluster(const RouteParams& p, int first_token, int count,
                                                int rank, const RoutingBatch& batch,
                                                bool for_matmul, RouteShared<kTokens, kWidth>& s,
                                                const Meanwhile& meanwhile) {
  const int tid = static_cast<int>(threadIdx.x);
  for (int e = tid; e < count * kWidth; e += kRouteThreads) {
    const int token = e / kWidth, at = e % kWidth;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += s.sums[w][token][at];
    StoreRemote(&s.partials[rank][token / kRouteRanks][at], token % kRouteRanks, sum);
  }
  ClusterArrive();
  meanwhile();
  ClusterWait();
  const RouteTokens tokens{first_token, rank, kRouteRanks, count};
  const int slots = max(tokens.mine(), 0);
  for (int e = tid; e < slots * kWidth; e += kRouteThreads) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRouteRanks; ++r) sum += s.partials[r][e / kWidth][e % kWidth];
    s.sums[0][e / kWidth][e % kWidth] = sum;
  }
  __syncthreads();
  auto* own_losses = reinterpret_cast<float(*)[kMaxScores]>(s.sums[1]);
  ScoreTokens(p, slots, s, own_losses);
  if (for_matmul) {
    for (int e = tid; e < slots * kMaxScores; e += kRouteThreads) {
      p.losses[tokens.Token(e / kMaxScores) * kMaxScores + e % kMaxScores] =
          own_losses[e / kMaxScores][e % kMaxScores];
    }
    return;
  }
  const bool several = gridDim.y > 1;
  for (int e = tid; e < slots * p.num_segments; e += kRouteThreads) {
    const int slot = e / p.num_segments, segment = e % p.num_segments;
    const int token = tokens.Token(slot);
    const float* losses = &own_losses[slot][segment * kNumLevels];
    if (token >= batch.num_coherent) {
      SetLevel(p, token, segment, ChooseAlone(p, batch, token, segment, losses), s);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kNumLevels; ++k) {
      const int at = segment * kNumLevels + k;
      if (several) {
        p.losses[token * kMaxScores + at] = losses[k];
      } else {
        StoreRemote(&s.losses[token][at], 0, losses[k]);
      }
    }
  }
  __syncthreads();
  if (several) return FinishSeveral(p, batch, gridDim.y * kRouteRanks, s);
  if (count == 1) {  // rank 0 has had the only token
    if (rank != 0) return;
  } else {
    if (tid < p.num_segments) {
      StoreRemote(&s.rank_highest[rank][tid], 0, static_cast<float>(s.highest[tid]));
    }
    ClusterSync();
    if (rank != 0) return;
    if (tid < p.num_segments) {
      for (int r = 0; r < kRouteRanks; ++r) {
        s.highest[tid] = max(s.highest[tid], static_cast<int>(s.rank_highest[r][tid]));
      }
    }
    __syncthreads();
  }
  if (batch.num_coherent > 0) ChooseTogether(p, batch, s.losses[0], s);
  __syncthreads();
  if (tid == 0) CountBytes(p, s.highest);
}

// The end of a group without clusters: the block that arrives last does it all.
template <int kTokens, int kWidth>
__device__ __forceinline__ void FinishAlone(const RouteParams& p, int first_token, int count,
                                            int rank, const RoutingBatch& batch,
                                            RouteShared<kTokens, kWidth>& s) {
  const int tid = static_cast<int>(threadIdx.x);
  float* partials = p.partials + int64_t{blockIdx.y} * kRouteRanks * kTokens * kWidth;
  for (int e = tid; e < count * kWidth; e += kRouteThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += s.sums[w][e / kWidth][e % kWidth];
    partials[rank * kTokens * kWidth + e] = sum;
  }
  if (!ArriveLast(p.counters + blockIdx.y, kRouteRanks, &s.flag)) return;
  for (int e = tid; e < count * kWidth; e += kRouteThreads) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRouteRanks; ++r) sum += __ldcg(partials + r * kTokens * kWidth + e);
    s.sums[0][e / kWidth][e % kWidth] = sum;
  }
  __syncthreads();
  ScoreTokens(p, count, s, s.losses);
  const bool several = gridDim.y > 1;
  for (int e = tid; e < count * p.num_segments; e += kRouteThreads) {
    const int slot = e / p.num_segments, segment = e % p.num_segments, token = first_token + slot;
    const float* losses = &s.losses[slot][segment * kNumLevels];
    if (token >= batch.num_coherent) {
      SetLevel(p, token, segment, ChooseAlone(p, batch, token, segment, losses), s);
    } else if (several) {
#pragma unroll
      for (int k = 0; k < kNumLevels; ++k) {
        p.losses[token * kMaxScores + segment * kNumLevels + k] = losses[k];
      }
    }
  }
  __syncthreads();
  if (several) return FinishSeveral(p, batch, gridDim.y, s);
  if (batch.num_coherent > 0) ChooseTogether(p, batch, s.losses[0], s);
  __syncthreads();
  if (tid == 0) CountBytes(p, s.highest);
}

// kTurns: how many are in registers at a time.
template <typename T, RouteInput kInput, int kHiddenTiles, int kTokenTiles, int kTurns,
          bool kClusters>
__global__ void __launch_bounds__(kRouteThreads, kTokenTiles == 1 ? 2 : 1)
    RouteKernel(const __grid_constant__ RouteParams p, const __grid_constant__ BatchImages images) {
  constexpr int kTokens = 8 * kTokenTiles, kWidth = 16 * kHiddenTiles + 1;
  constexpr bool kNorm = kInput == RouteInput::kNorm;
  extern __shared__ __align__(16) uint8_t raw[];
  auto& s = *reinterpret_cast<RouteShared<kTokens, kWidth>*>(raw);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int g = lane / 4, t = lane % 4, rank = static_cast<int>(blockIdx.x);
  const int first_token = static_cast<int>(blockIdx.y) * kTokens;
  const int count = min(kTokens, p.batch.num_tokens - first_token);
  const int turns = TurnsOf(p.cols);
  const int block_col = rank * turns * kColsPerTurn;
  const int first_col = block_col + warp * 32 + 8 * t;
  const bool leaves_images = kTokenTiles == 1 && images.bytes != nullptr;
  const RouteColumns<kTokens> columns(raw + sizeof(s), turns, kNorm, leaves_images);
  if constexpr (kClusters) ptx::ClusterArriveRelaxed();
  AllowNext();
  RouterWeights<kHiddenTiles, kTurns> weights(p, first_col);
  weights.Fetch(0, turns);
  weights.Prefetch(turns);
  if constexpr (kNorm) {
    columns.LoadNorm(p.norm_weight + block_col, min(turns * kColsPerTurn, p.cols - block_col));
  }
  LoadRouter(p, s);
  RoutingBatch batch = p.batch;
  const FewTokens few(batch, !leaves_images);
  if (tid < kMaxSegments) s.highest[tid] = 0;
  WaitForPrevious();
  if constexpr (kClusters) ClusterWait();  // every block of the cluster has begun
  if (leaves_images) {
    ClearArrivals(images, blockIdx.y * kRouteRanks + rank, gridDim.y * kRouteRanks);
  }

  const auto rows = [&](int n) { return TokenRows<T>(p, first_token + 8 * n + g, first_col); };
  float scale = 0;
  uint4 residual[kTurns];
  if constexpr (kNorm) {
    static_assert(kTokenTiles == 1);
    scale = AddAndMeasure<T>(p, rows(0), count, first_col, turns, rank, s, residual);
  }
  float sums[kHiddenTiles][kTokenTiles][4] = {};
  float squares[kTokenTiles] = {};
  const auto is_there = [&](int n, int turn) {
    return 8 * n + g < count && turn < turns && first_col + turn * kColsPerTurn < p.cols;
  };
  // Of few tokens several turns are asked for at once: what follows stores, and no load overtakes
  // it.
  constexpr int kAhead = kTokenTiles == 1 ? kTurns : 1;
  RawElements of_turns[kAhead][kTokenTiles];
  const auto load = [&](int turn) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        if (!is_there(n, turn + i)) continue;
        of_turns[i][n] = LoadRaw<T, kInput>(rows(n), (turn + i) * kColsPerTurn, p.cols);
      }
    }
  };
  for (int first = 0; first < turns; first += kTurns) {
    if (first > 0) weights.Fetch(first, turns);
    const bool at_hand = kNorm && first == 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int turn = first + i;
      if (turn >= turns) break;
      if (i % kAhead == 0 && !at_hand) load(turn);
      uint4 x[kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        x[n] = make_uint4(0, 0, 0, 0);
        if (!is_there(n, turn)) continue;
        const RawElements of_turn =
            at_hand ? RawElements{residual[i], {}} : of_turns[i % kAhead][n];
        const int of_block = first_col - block_col + turn * kColsPerTurn;
        float v[8];
        MakeInput<T, kInput>(of_turn, columns.norm + of_block, scale,
                             rows(n).x + turn * kColsPerTurn, v);
        x[n] = AsHalves<T>(v, &squares[n]);
        if (!leaves_images) continue;
        *reinterpret_cast<uint4*>(columns.tile + g * columns.tile_stride + of_block * sizeof(T)) =
            PackElements<T>(v);
      }
      MultiplyTurn<kHiddenTiles, kTokenTiles>(weights.held[i], x, sums);
    }
  }
  if constexpr (kInput == RouteInput::kNorm) __syncthreads();  // s.sums was in use
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int r = 0; r < kHiddenTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s.sums[warp][8 * n + 2 * t + i % 2][16 * r + g + 8 * (i / 2)] = sums[r][n][i];
      }
    }
    const float of_token = QuadSum(squares[n]);
    if (t == 0) s.sums[warp][8 * n + g][kWidth - 1] = of_token;
  }
  few.Keep(s, batch);
  ptx::WaitCopies<0>();
  __syncthreads();
  if constexpr (kClusters) {
    FinishInCluster(p, first_token, count, rank, batch, leaves_images, s, [&] {
      if constexpr (kTokenTiles == 1) {
        if (leaves_images) LeaveImages<T>(p, images, columns, first_token, count, turns);
      }
    });
  } else {
    FinishAlone(p, first_token, count, rank, batch, s);
  }
}

template <typename T, RouteInput kInput, int kHiddenTiles, int kTokenTiles, int kTurns,
          bool kClusters>
cudaError_t LaunchTiles(const LaunchContext& context, RouteParams params,
                        const BatchImages& images) {
  constexpr int kTokens = 8 * kTokenTiles, kWidth = 16 * kHiddenTiles + 1;
  const uint32_t groups = CeilDiv(params.batch.num_tokens, kTokens);
  const size_t partial_bytes =
      kClusters ? 0 : size_t{groups} * kRouteRanks * kTokens * kWidth * sizeof(float);
  const size_t loss_bytes = size_t(params.batch.num_coherent) * kMaxScores * sizeof(float);
  if (partial_bytes + loss_bytes > context.scratch_bytes ||
      groups + 1 + kMaxSegments > static_cast<uint32_t>(context.num_counters) ||
      (kTokenTiles > 1 && images.bytes != nullptr)) {
    return cudaErrorInvalidValue;
  }
  params.partials = reinterpret_cast<float*>(context.scratch);
  if (images.bytes == nullptr) {
    params.losses = reinterpret_cast<float*>(context.scratch + partial_bytes);
  }
  params.counters = context.counters;
  const size_t shared_bytes =
      sizeof(RouteShared<kTokens, kWidth>) +
      RouteColumns<kTokens>::Bytes(TurnsOf(params.cols), kInput == RouteInput::kNorm,
                                   images.bytes != nullptr);
  return LaunchClusters(context, kClusters ? kRouteRanks : 0,
                        RouteKernel<T, kInput, kHiddenTiles, kTokenTiles, kTurns, kClusters>,
                        dim3(kRouteRanks, groups), kRouteThreads, shared_bytes, params, images);
}

template <typename T, RouteInput kInput>
cudaError_t LaunchInput(const LaunchContext& context, const RouteParams& params,
                        const BatchImages& images) {
  if constexpr (kInput == RouteInput::kPlain) {
    if (!context.clusters) return LaunchTiles<T, kInput, 4, 2, 2, false>(context, params, images);
    if (params.num_hidden > kMaxFusedRouterHidden) {
      return LaunchTiles<T, kInput, 4, 2, 2, true>(context, params, images);
    }
  }
  return TurnsOf(params.cols) <= 2 ? LaunchTiles<T, kInput, 2, 1, 2, true>(context, params, images)
                                   : LaunchTiles<T, kInput, 2, 1, 4, true>(context, params, images);
}

cudaError_t LaunchSource(const LaunchContext& context, const RouteParams& params, DType x,
                         const BatchImages& images) {
  return WithActivation(x, [&](auto element) {
    using T = decltype(element);
    switch (params.input) {
      case RouteInput::kPlain:
        return LaunchInput<T, RouteInput::kPlain>(context, params, images);
      case RouteInput::kNorm:
        return LaunchInput<T, RouteInput::kNorm>(context, params, images);
      case RouteInput::kSwiGlu:
        return LaunchInput<T, RouteInput::kSwiGlu>(context, params, images);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace

cudaError_t LaunchRoute(const LaunchContext& context, const RouteSource& source, Tensor x,
                        const RoutedWeight& linear, const RoutingBatch& batch, uint8_t* levels,
                        int64_t levels_stride) {
  return LaunchSource(context, StateRoute(source, x, linear, batch, levels, levels_stride), x.dtype,
                      BatchImages{});
}

cudaError_t LaunchRouteForMatmul(const LaunchContext& context, const RouteParams& params, DType x,
                                 const BatchImages& images) {
  if (params.batch.num_tokens > kFewRoutedTokens) return cudaErrorInvalidValue;
  return LaunchSource(context, params, x, images);
}

bool CanFuseRoute(const LaunchContext& context, const RouteSource& source, Tensor x,
                  const RoutedWeight& linear) {
  return context.clusters && linear.router.num_hidden <= kMaxFusedRouterHidden &&
         x.cols == linear.weight.cols && Vectorizable(x) && Vectorizable(source.source) &&
         (source.delta.data == nullptr || Vectorizable(source.delta)) &&
         (source.norm_weight.data == nullptr || Vectorizable(source.norm_weight));
}

}  // namespace mobi::cuda
