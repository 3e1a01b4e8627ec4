#include "engine/sampling.h"

#include "absl/container/flat_hash_map.h"

namespace mobi {

bool HasPenalties(const SamplingParams& params) {
  return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f ||
         params.frequency_penalty != 0.0f;
}

std::vector<LogitEdit> LogitEdits(const Sequence& sequence) {
  const SamplingParams& params = sequence.request->spec.sampling;
  absl::flat_hash_map<int32_t, LogitEdit> edits;
  const auto edit = [&](int32_t token) -> LogitEdit& {
    return edits.try_emplace(token, LogitEdit{token, 1.0f, 0.0f}).first->second;
  };
  if (params.repetition_penalty != 1.0f) {
    for (const int32_t token : sequence.tokens) edit(token).repetition = params.repetition_penalty;
  }
  for (const auto& [token, count] : sequence.generated_counts) {
    edit(token).bias -=
        params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
  }
  for (const auto& [token, bias] : params.logit_bias) edit(token).bias += bias;
  std::vector<LogitEdit> list;
  list.reserve(edits.size());
  for (const auto& [token, one] : edits) list.push_back(one);
  return list;
}

SamplingRow MakeSamplingRow(const Sequence& sequence) {
  const SamplingParams& params = sequence.request->spec.sampling;
  SamplingRow row{};
  row.top_k = params.top_k;
  row.temperature = params.temperature;
  row.top_p = params.top_p;
  row.min_p = params.min_p;
  // Completions of one request draw from streams of their own.
  row.seed = params.seed + static_cast<uint64_t>(sequence.index) * 0x9E3779B97F4A7C15u;
  row.counter = static_cast<uint64_t>(sequence.length());
  return row;
}

}  // namespace mobi
