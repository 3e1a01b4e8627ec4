// The beginning of a router: a block's columns of x, made by the op before it where that is fused,
// the sums of W1 x and of x's squares over them, and x as whole numbers for a matmul that wants it
// so. Eight tokens to a tile; a lane has eight columns of a token in each turn of the block.
#ifndef MOBI_KERNELS_CUDA_ROUTE_INPUT_CUH_
#define MOBI_KERNELS_CUDA_ROUTE_INPUT_CUH_

#include <type_traits>

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/sliced_matmul_batch90_image.cuh"

namespace mobi::cuda {

inline constexpr int kColsPerTurn = kRouteWarps * 32;

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

// Eight elements as halves for the mma; their squares are added.
template <typename T>
__device__ __forceinline__ uint4 AsHalves(const float (&v)[8], float* squares) {
#pragma unroll
  for (int i = 0; i < 8; ++i) *squares = fmaf(v[i], v[i], *squares);
  return PackElements<half>(v);
}

// A block's tokens and columns, and where this lane's begin. A turn is kColsPerTurn columns.
struct RouteTile {
  int rank, first_token, count;
  int turns, block_col, first_col;

  __device__ __forceinline__ RouteTile(const RouteParams& p, int most_tokens)
      : rank(static_cast<int>(blockIdx.x)),
        first_token(static_cast<int>(blockIdx.y) * most_tokens),
        count(min(most_tokens, p.batch.num_tokens - first_token)),
        turns(TurnsOf(p.cols)),
        block_col(rank * turns * kColsPerTurn) {
    const int warp = static_cast<int>(threadIdx.x) / 32, t = static_cast<int>(threadIdx.x) % 4;
    first_col = block_col + warp * 32 + 8 * t;
  }

  // Whether this lane has columns in the turn.
  __device__ __forceinline__ bool Has(const RouteParams& p, int turn) const {
    return turn < turns && first_col + turn * kColsPerTurn < p.cols;
  }
};

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
    ptx::CommitCopies();
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

// The elements of x, which are written unless they are there, or writes is false. norm: their
// weights.
template <typename T, RouteInput kInput>
__device__ __forceinline__ void MakeInput(const RawElements& raw, const float* norm, float scale,
                                          T* x, float (&v)[8], bool writes = true) {
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
  if (writes) Store8(x, 8, true, v);
}

// residual += delta for eight elements, which are kept, and written if writes; their squares are
// added.
template <typename T>
__device__ __forceinline__ void AddElements(const RouteParams& p, const uint4& delta, uint4& kept,
                                            T* residual, float* squares, bool writes = true) {
  float v[8], add[8];
  UnpackElements<T>(kept, v);
  if (p.delta != nullptr) {
    UnpackElements<T>(delta, add);
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = ToFloat(FromFloat<T>(v[k] + add[k]));
    kept = PackElements<T>(v);
    if (writes) *reinterpret_cast<uint4*>(residual) = kept;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) *squares = fmaf(v[k], v[k], *squares);
}

// residual += delta for this lane's elements of turns first .. first + kTurns - 1, which it keeps;
// their squares are added.
template <typename T, int kTurns>
__device__ __forceinline__ void AddTurns(const RouteParams& p, const RouteTile& tile,
                                         const TokenRows<T>& rows, int first, uint4 (&kept)[kTurns],
                                         float* squares) {
  uint4 more[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    if (!tile.Has(p, first + i)) break;
    const int at = (first + i) * kColsPerTurn;
    kept[i] = *reinterpret_cast<const uint4*>(rows.source + at);
    if (p.delta != nullptr) more[i] = *reinterpret_cast<const uint4*>(rows.delta + at);
  }
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    if (!tile.Has(p, first + i)) break;
    AddElements<T>(p, more[i], kept[i], rows.source + (first + i) * kColsPerTurn, squares);
  }
}

// residual += delta for this lane's elements of token g, then the cluster's sums of squares: 1 /
// rms of the token. kept: its elements of the first turns.
template <typename T, int kTurns, typename Shared>
__device__ __forceinline__ float AddAndMeasure(const RouteParams& p, const RouteTile& tile,
                                               const TokenRows<T>& rows, Shared& s,
                                               uint4 (&kept)[kTurns]) {
  constexpr int kTokens = 8;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32;
  const int g = tid % 32 / 4, t = tid % 4;
  float squares = 0;
  if (g < tile.count) {
    AddTurns<T>(p, tile, rows, 0, kept, &squares);
    for (int first = kTurns; first < tile.turns; first += kTurns) {
      uint4 others[kTurns];
      AddTurns<T>(p, tile, rows, first, others, &squares);
    }
  }
  squares = QuadSum(squares);
  if (t == 0) s.sums[warp][g][0] = squares;
  __syncthreads();
  for (int e = tid; e < kRouteRanks * kTokens; e += kRouteThreads) {
    const int token = e % kTokens;
    if (token >= tile.count) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += s.sums[w][token][0];
    StoreRemote(&s.squares[tile.rank][token], e / kTokens, sum);
  }
  ptx::WaitCopies<0>();  // of the norm's weights, for all threads after the barrier
  ClusterSync();
  float sum = 0;
#pragma unroll
  for (int r = 0; r < kRouteRanks; ++r) sum += s.squares[r][g];
  return rsqrtf(sum / static_cast<float>(p.cols) + p.eps);
}

// This lane's part of W1 x, and of the sums of x's squares, for token 8 n + g of each tile.
template <int kHiddenTiles, int kTokenTiles>
struct RouteSums {
  float w1_x[kHiddenTiles][kTokenTiles][4] = {};
  float squares[kTokenTiles] = {};

  // In this warp's place.
  template <int kWidth>
  __device__ __forceinline__ void Keep(float (*of_warp)[kWidth]) const {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int r = 0; r < kHiddenTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          of_warp[8 * n + 2 * t + i % 2][16 * r + g + 8 * (i / 2)] = w1_x[r][n][i];
        }
      }
      const float of_token = QuadSum(squares[n]);
      if (t == 0) of_warp[8 * n + g][kWidth - 1] = of_token;
    }
  }
};

// Makes x, multiplies it by W1 and adds its squares. Of a norm: scale, 1 / rms, and the residual's
// elements of the first turns.
template <typename T, RouteInput kInput, int kHiddenTiles, int kTokenTiles, int kTurns>
__device__ __forceinline__ void MakeAndMultiply(const RouteParams& p, const RouteTile& tile,
                                                const RouteColumns<8 * kTokenTiles>& columns,
                                                float scale, const uint4 (&residual)[kTurns],
                                                RouterWeights<kHiddenTiles, kTurns>& weights,
                                                RouteSums<kHiddenTiles, kTokenTiles>& sums) {
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const auto rows = [&](int n) {
    return TokenRows<T>(p, tile.first_token + 8 * n + g, tile.first_col);
  };
  const auto is_there = [&](int n, int turn) {
    return 8 * n + g < tile.count && tile.Has(p, turn);
  };
  // Of one tile several turns are asked for at once: what follows stores, and no load overtakes it.
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
  for (int first = 0; first < tile.turns; first += kTurns) {
    if (first > 0) weights.Fetch(first, tile.turns);
    const bool at_hand = kInput == RouteInput::kNorm && first == 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int turn = first + i;
      if (turn >= tile.turns) break;
      if (i % kAhead == 0 && !at_hand) load(turn);
      uint4 x[kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        x[n] = make_uint4(0, 0, 0, 0);
        if (!is_there(n, turn)) continue;
        const RawElements of_turn =
            at_hand ? RawElements{residual[i], {}} : of_turns[i % kAhead][n];
        const int of_block = tile.first_col - tile.block_col + turn * kColsPerTurn;
        float v[8];
        MakeInput<T, kInput>(of_turn, columns.norm + of_block, scale,
                             rows(n).x + turn * kColsPerTurn, v);
        x[n] = AsHalves<T>(v, &sums.squares[n]);
        if (kTokenTiles > 1 || columns.tile == nullptr) continue;
        *reinterpret_cast<uint4*>(columns.tile + g * columns.tile_stride + of_block * sizeof(T)) =
            PackElements<T>(v);
      }
      MultiplyTurn<kHiddenTiles, kTokenTiles>(weights.held[i], x, sums.w1_x);
    }
  }
}

// The block's columns of x, from its tile into the images. Half a warp has a token's, every other
// group.
template <typename T>
__device__ __forceinline__ void LeaveInputImages(const RouteParams& p, const BatchImages& images,
                                                 const RouteTile& tile,
                                                 const RouteColumns<8>& columns) {
  static_assert(kRouteThreads == 2 * 8 * 16 && kColsPerTurn == 2 * kGroupSize);
  const int tid = static_cast<int>(threadIdx.x), token = tid / 16 % 8, half = tid / 128;
  const int first_group = tile.block_col / kGroupSize + half;
  ImagePlace to(images, tile.first_token + token, first_group);
  const uint8_t* from =
      columns.tile + token * columns.tile_stride + half * kGroupSize * sizeof(T) + tid % 16 * 16;
  for (int turn = 0; turn < tile.turns; ++turn) {
    if ((first_group + 2 * turn) * kGroupSize >= p.cols) break;
    LeaveImage<std::is_same_v<T, bfloat16>>(to, token < tile.count,
                                            *reinterpret_cast<const uint4*>(from));
    to.Advance(2);
    from += kColsPerTurn * sizeof(T);
  }
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_ROUTE_INPUT_CUH_
