#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "engine/kv_cache.h"
#include "engine/model_config.h"

namespace mobi {

absl::StatusOr<KvRoom> CheckEngineOptions(const EngineOptions& options, const ModelConfig& config,
                                          int max_positions, DType activation_dtype) {
  if (options.max_num_seqs < 1 || options.block_size < 1 ||
      options.max_num_batched_tokens < options.max_num_seqs) {
    return absl::InvalidArgumentError(
        "max_num_seqs and block_size must be positive, max_num_batched_tokens at least "
        "max_num_seqs");
  }
  const ResidencyOptions& residency = options.residency;
  if (residency.min_levels < 1 || residency.min_levels > kNumLevels ||
      residency.dwell <= Duration::zero() || residency.patience <= Duration::zero() ||
      !(residency.restore_usage > 0 && residency.restore_usage <= 1)) {
    return absl::InvalidArgumentError(
        "residency: min_levels must be in 1..4, dwell and patience positive, restore_usage in "
        "(0, 1]");
  }
  const int max_model_len =
      options.max_model_len > 0 ? std::min(options.max_model_len, max_positions) : max_positions;
  const size_t block_bytes = KvCache::BlockBytes(config, options.block_size, activation_dtype);
  const int blocks_per_seq = (max_model_len + options.block_size - 1) / options.block_size;
  const int num_blocks = options.num_kv_blocks > 0
                             ? options.num_kv_blocks
                             : static_cast<int>(options.kv_memory_bytes / block_bytes);
  if (num_blocks < blocks_per_seq) {
    return absl::ResourceExhaustedError(
        absl::StrCat("KV cache: ", num_blocks, " blocks of ", options.block_size, " tokens (",
                     num_blocks * block_bytes >> 20, " MiB) do not hold one sequence of ",
                     max_model_len, " tokens (", blocks_per_seq * block_bytes >> 20,
                     " MiB); give it more memory or lower "
                     "max_model_len"));
  }
  return KvRoom{max_model_len, num_blocks, block_bytes};
}

}  // namespace mobi
