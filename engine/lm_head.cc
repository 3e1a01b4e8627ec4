#include "engine/lm_head.h"

#include <algorithm>
#include <vector>

#include "kernels/choose_levels.h"

namespace mobi {

void ChooseLmHeadLevels(const SlicedLmHead& head, absl::Span<const TokenPrecision> rows,
                        int num_coherent, uint8_t* levels) {
  const auto lowest = static_cast<uint8_t>(head.levels.min_level);
  std::vector<float> price;
  std::vector<uint8_t> min_level, max_level;
  for (const TokenPrecision& row : rows) {
    price.push_back(row.price);
    min_level.push_back(std::max(row.min_level, lowest));
    max_level.push_back(std::max(row.max_level, lowest));
  }
  RoutingBatch batch;
  batch.num_tokens = static_cast<int>(rows.size());
  batch.num_coherent = num_coherent;
  batch.price = price.data();
  batch.min_level = min_level.data();
  batch.max_level = max_level.data();
  ChooseLevels(head.levels.loss.data(), 0, head.bytes.data(), batch, levels);
}

}  // namespace mobi
