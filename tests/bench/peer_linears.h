// What the linears are timed beside: the same shapes in floats, multiplied by the machine's library
// for that: OpenBLAS in fp32 on the CPU, cuBLAS in fp16 on CUDA. Layer after layer, as a step reads
// them, so that no cache holds the weights.
#ifndef MOBI_TESTS_BENCH_PEER_LINEARS_H_
#define MOBI_TESTS_BENCH_PEER_LINEARS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace mobi {

struct MatmulShape {
  int64_t rows = 0;  // out features
  int64_t cols = 0;  // in features
};

class PeerLinears {
 public:
  virtual ~PeerLinears() = default;
  virtual std::string description() const = 0;
  virtual int num_layers() const = 0;
  virtual int bytes_of_weight() const = 0;
  // All layers once for `num_tokens` tokens, waited for.
  virtual absl::Status Run(int num_tokens) = 0;
};

// Sets OpenBLAS's threads for the process.
std::unique_ptr<PeerLinears> CreateOpenBlas(const std::vector<MatmulShape>& shapes, int num_layers,
                                            int num_threads);

// Where this build has CUDA. Products are recorded and replayed, as a decode step's are.
absl::StatusOr<std::unique_ptr<PeerLinears>> CreateCublas(const std::vector<MatmulShape>& shapes,
                                                          int num_layers, int max_tokens);
// Bytes a second of a pure read of device memory, far more than the caches hold.
absl::StatusOr<double> CudaReadBytesPerSecond();

}  // namespace mobi

#endif  // MOBI_TESTS_BENCH_PEER_LINEARS_H_
