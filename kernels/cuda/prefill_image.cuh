// How the prefill path of the sliced matmul wants x in shared memory, and so finds it in memory.
//
// An image is of some tokens: [step of 64 columns][token] of 128 bytes, columns in the order of the
// weights' fragments (sliced_matmul_unpack.cuh), swizzled for wgmma; so a step is one bulk copy.
#ifndef MOBI_KERNELS_CUDA_PREFILL_IMAGE_CUH_
#define MOBI_KERNELS_CUDA_PREFILL_IMAGE_CUH_

#include <cstdint>

#include "kernels/cuda/prefill_image.h"
#include "kernels/cuda/transpose.cuh"

namespace mobi::cuda {

inline constexpr int kStepColumns = 64;
inline constexpr int kImageRowBytes = kStepColumns * 2;  // of a token's step

// Of a group's 16 chunks in a row of x, chunk 4 t + word has word i, two columns, where the image
// has word t of chunk 4 i + word. So sixteen lanes with a chunk each hold, once words are
// transposed among those of a `word`, chunks of the image; this is where theirs lies, from the
// group's first byte in an image of `tile_tokens` tokens.
struct ImageChunk {
  int word, t;

  __device__ __forceinline__ explicit ImageChunk(int lane) : word(lane % 4), t(lane / 4) {}
  __device__ __forceinline__ ImageChunk(int word, int t) : word(word), t(t) {}

  __device__ __forceinline__ int Offset(int tile_tokens, int token) const {
    return (word / 2 * tile_tokens + token) * kImageRowBytes +
           ((word % 2 * 4 + t) ^ (token % 8)) * 16;
  }
};

// A row of x in its image.
struct ImageRow {
  uint8_t* bytes;  // of the image
  int token, tile_tokens;

  // Not of the rows before the first.
  __device__ __forceinline__ ImageRow(const PrefillImages& images, int64_t row)
      : tile_tokens(images.tile_tokens) {
    const int of_images = static_cast<int>(row) - images.first_row;
    const int image = of_images / tile_tokens;
    token = of_images - image * tile_tokens;
    bytes = images.bytes + int64_t{image} * images.groups * 2 * tile_tokens * kImageRowBytes;
  }

  __device__ __forceinline__ uint8_t* At(int group, ImageChunk chunk) const {
    return bytes + int64_t{group} * 2 * tile_tokens * kImageRowBytes +
           chunk.Offset(tile_tokens, token);
  }

  // The row's chunk `index` as it is in x; by half a warp, which has a group.
  __device__ __forceinline__ void Leave(int index, uint4 words) const {
    const ImageChunk chunk(index % 16);
    TransposeWords<4>(words, chunk.t, 0xFFFFu << (threadIdx.x & 16));
    *reinterpret_cast<uint4*>(At(index / 16, chunk)) = words;
  }
};

__device__ __forceinline__ bool IsInImage(const PrefillImages& images, int64_t row) {
  return images.bytes != nullptr && row >= images.first_row;
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_PREFILL_IMAGE_CUH_
