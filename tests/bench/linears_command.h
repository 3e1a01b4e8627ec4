// `mobi-bench linears`: the routed linears of a loaded model, layer after layer as a step reads
// them, at each level, beside the machine's library on float weights of the same shapes.
#ifndef MOBI_TESTS_BENCH_LINEARS_COMMAND_H_
#define MOBI_TESTS_BENCH_LINEARS_COMMAND_H_

#include <vector>

#include "absl/status/statusor.h"
#include "engine/model.h"
#include "nlohmann/json.hpp"

namespace mobi {

struct LinearsCommandOptions {
  std::vector<int> tokens;
  bool peer = true;
  int threads = 1;  // of the peer on the CPU
  bool print = true;
  double seconds = 1;  // least time per case
};

// An array, an object per number of tokens and case: tokens, bits (absent: the peer), peer (its
// name), microseconds of one layer (median), gigabytes_per_second of the bytes that have to move,
// gigaflops, and times_peer.
absl::StatusOr<nlohmann::json> TimeLinears(const Model& model,
                                           const LinearsCommandOptions& options);

}  // namespace mobi

#endif  // MOBI_TESTS_BENCH_LINEARS_COMMAND_H_
