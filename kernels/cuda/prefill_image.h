// Where the prefill path of the sliced matmul reads x, for the ops that leave it there.
#ifndef MOBI_KERNELS_CUDA_PREFILL_IMAGE_H_
#define MOBI_KERNELS_CUDA_PREFILL_IMAGE_H_

#include <cstdint>

namespace mobi::cuda {

// One for every `tile_tokens` tokens, in their order: see prefill_image.cuh.
struct PrefillImages {
  uint8_t* bytes = nullptr;  // null: there are none, and all rows of x are written
  int first_row = 0;         // rows before it are written, those from it on are left in images
  int tile_tokens = 0;
  int groups = 0;
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_PREFILL_IMAGE_H_
