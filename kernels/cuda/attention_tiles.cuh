// How attention brings tiles of the cache into shared memory: box by box through the copy
// engine (compute capability 9.0 and newer), or by all threads, 16 bytes at a time. Rows of V
// behind the context are zero, as their weights are; those of K may be anything, their scores are
// hidden.
#ifndef MOBI_KERNELS_CUDA_ATTENTION_TILES_CUH_
#define MOBI_KERNELS_CUDA_ATTENTION_TILES_CUH_

#include <cuda.h>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/driver.h"
#include "kernels/cuda/ptx.cuh"

namespace mobi::cuda {

// K and V as matrices of boxes. A box is some rows of a block of the cache, and a part of a head's
// dims.
struct CacheMaps {
  CUtensorMap k, v;
};

// Host side. False: the driver does not make them.
template <int kHeadDim>
bool MakeCacheMap(const AttentionParams& params, const void* cache, int64_t stride,
                  CUtensorMap* map) {
  using Tile = KvTile<kHeadDim>;
  static const auto encode = [] {
    decltype(&cuTensorMapEncodeTiled) found = nullptr;
    FindInDriver("cuTensorMapEncodeTiled", 12000, found);
    return found;
  }();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(params.num_kv_heads) * kHeadDim,
                               static_cast<cuuint64_t>(params.cache_rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * sizeof(uint16_t)};
  const cuuint32_t box[2] = {Tile::kPartDims, static_cast<cuuint32_t>(params.box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(cache), sizes, strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                Tile::kPartDims == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
template <int kHeadDim>
bool MakeCacheMaps(const AttentionParams& params, CacheMaps* maps) {
  return MakeCacheMap<kHeadDim>(params, params.k, params.k_stride, &maps->k) &&
         MakeCacheMap<kHeadDim>(params, params.v, params.v_stride, &maps->v);
}

// Rows of a box, a power of two and the same for all of a tile.
constexpr int BoxRows(int block_size) {
  int rows = kTileTokens;
  while (block_size % rows != 0) rows /= 2;
  return rows;
}
inline constexpr int kLeastBoxRows = 8;  // of a swizzle

// Of one block; all threads call all methods. A tile's K and V are asked for one after another,
// then awaited in that order before the next K. Between the last read of a buffer and the next
// request for it there is a barrier. Behind the last tile nothing is copied, but asked for.
template <typename T, int kHeadDim>
struct TileCopies {
  using Tile = KvTile<kHeadDim>;

  struct Shared {
#if MOBI_SM90
    uint64_t full[2];
#else
    int rows[2][kTileTokens];
#endif
  };

  const AttentionParams& p;
  const CacheMaps& maps;
  Shared& shared;
  const int32_t* blocks;  // of the sequence
  uint32_t k_tile, v_tile;
  int first_col;      // of the cache, this head's
  int count = 0;      // tokens of the tile that is asked for
  int here = 0;       // of the one before, which is awaited
  int block, offset;  // this thread's row in the tile that is asked for, if it has as many tokens

  // May be called before it is known how many tokens the sequence has: see SetCount.
  __device__ __forceinline__ void Look(int tile) {
    const int token = tile * kTileTokens + static_cast<int>(threadIdx.x);
    const int at = token / p.block_size;
    offset = token - at * p.block_size;
    block = at < p.block_table_stride ? blocks[at] : 0;  // not used before it is asked for
  }

  __device__ __forceinline__ void SetCount(int tile, int context) {
    here = count;
    count = min(context - tile * kTileTokens, kTileTokens);
  }

  __device__ __forceinline__ bool HasRow() const { return static_cast<int>(threadIdx.x) < count; }
  __device__ __forceinline__ int Row() const { return block * p.block_size + offset; }

#if MOBI_SM90
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t Full(int which) const {
    return SharedAddress(&shared.full[which]);
  }

  __device__ __forceinline__ void Begin() const {
    if (threadIdx.x == 0) {
      ptx::PrefetchMap(&maps.k);
      ptx::PrefetchMap(&maps.v);
      ptx::BarrierInit(Full(0), 1);
      ptx::BarrierInit(Full(1), 1);
      ptx::FenceBarrierInit();
    }
    __syncthreads();
  }

  // The thread of a box's first token asks for it.
  __device__ __forceinline__ void Ask(uint32_t tile, const CUtensorMap& map, uint32_t full) const {
    if (!HasRow()) return;
    const int mask = p.box_rows - 1, token = static_cast<int>(threadIdx.x);
    if (token == 0) {
      ptx::BarrierArriveExpecting(full, ((count + mask) & ~mask) * kHeadDim * 2);
    }
    if ((token & mask) != 0) return;
    const int row = Row();
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      ptx::BoxCopy(tile + part * Tile::kPartBytes + token * Tile::kPartDims * 2, &map,
                   first_col + part * Tile::kPartDims, row, full);
    }
  }

  __device__ __forceinline__ void AskK() const { Ask(k_tile, maps.k, Full(0)); }
  __device__ __forceinline__ void AskV() const { Ask(v_tile, maps.v, Full(1)); }
  __device__ __forceinline__ void AwaitK() const { ptx::BarrierWait(Full(0), parity); }

  // And what the block's threads have written before.
  __device__ __forceinline__ void AwaitV() {
    ptx::BarrierWait(Full(1), parity);
    parity ^= 1;
    const int token = static_cast<int>(threadIdx.x);
    for (int chunk = 0; token >= here && chunk < kHeadDim / 8; ++chunk) {
      ptx::StoreZeros16(v_tile + Tile::Offset(token, chunk));
    }
    __syncthreads();
  }
#else
  int buffer = 0;

  __device__ __forceinline__ void Begin() const {}

  __device__ __forceinline__ void AskK() {
    buffer ^= 1;
    shared.rows[buffer][threadIdx.x] = HasRow() ? Row() : -1;
    __syncthreads();
    Copy(k_tile, p.k, p.k_stride);
  }

  __device__ __forceinline__ void AskV() const { Copy(v_tile, p.v, p.v_stride); }

  __device__ __forceinline__ void Copy(uint32_t tile, const void* cache, int64_t stride) const {
    if (count > 0) CopyTile<T, Tile>(tile, cache, stride, first_col, shared.rows[buffer]);
    CommitCopies();
  }

  __device__ __forceinline__ void AwaitK() const {
    WaitCopies<1>();
    __syncthreads();
  }

  __device__ __forceinline__ void AwaitV() const { AwaitK(); }
#endif
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_ATTENTION_TILES_CUH_
