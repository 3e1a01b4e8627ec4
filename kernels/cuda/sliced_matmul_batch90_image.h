// Where the batch path of the sliced matmul (sliced_matmul_batch90.cuh) reads x, for the kernels
// that leave it there: a pack of x alone, or the router, which has just made it.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_IMAGE_H_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_IMAGE_H_

#include <cstdint>

namespace mobi::cuda {

struct WholeTerms;

inline constexpr int kImageTokens = 32;
inline constexpr int kImageTokenBytes = 256;  // of a group: a high and a low byte for each element

// x as whole numbers, an image for every 32 tokens: [image][group][token]. What is behind the last
// token is not written. And counters of the matmul, zero when it begins.
struct BatchImages {
  uint8_t* bytes = nullptr;  // see WriteForWgmma
  WholeTerms* terms = nullptr;
  int groups = 0;
  uint32_t* arrivals = nullptr;  // [block of tokens][unit]: blocks whose sums are there
  int num_arrivals = 0;
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_IMAGE_H_
