#include "engine/step_surface.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "engine/base/status_macros.h"
#include "engine/step_bench.h"

namespace mobi {
namespace {

constexpr size_t kMinRounds = 3;

// Twice before: the first run may search a price, and a backend may record a step the second time
// that it runs.
absl::StatusOr<double> TimeStep(StepBench& bench, int sequences, float bits, const Clock& clock) {
  MOBI_RETURN_IF_ERROR(bench.Set(sequences, bits));
  MOBI_RETURN_IF_ERROR(bench.Run());
  const TimePoint begin = clock.Now();
  MOBI_RETURN_IF_ERROR(bench.Run());
  return ToMillis(clock.Now() - begin);
}

absl::StatusOr<SurfaceRow> MeasureRow(StepBench& bench, int sequences,
                                      const SurfaceOptions& options, const Clock& clock) {
  std::vector<std::vector<double>> samples(options.bits.size());
  const Duration least = options.per_point * static_cast<int64_t>(options.bits.size());
  const TimePoint begin = clock.Now();
  while (samples.front().size() < kMinRounds || clock.Now() - begin < least) {
    for (size_t i = 0; i < samples.size(); ++i) {
      MOBI_ASSIGN_OR_RETURN(const double ms, TimeStep(bench, sequences, options.bits[i], clock));
      samples[i].push_back(ms);
    }
  }
  SurfaceRow row;
  row.sequences = sequences;
  for (std::vector<double>& times : samples) {
    const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
    std::nth_element(times.begin(), middle, times.end());
    row.milliseconds.push_back(*middle);
  }
  return row;
}

}  // namespace

absl::StatusOr<std::vector<SurfaceRow>> MeasureSurface(
    const Model& model, const WeightSource& source, const SurfaceOptions& options,
    const Clock& clock, const std::function<void(const SurfaceRow&)>& on_row) {
  if (options.bits.empty() || options.sequences.empty()) {
    return absl::InvalidArgumentError("a surface needs bits and sequences");
  }
  const TimePoint begin = clock.Now();
  MOBI_ASSIGN_OR_RETURN(const std::unique_ptr<StepBench> bench,
                        StepBench::Create({.max_seqs = options.sequences.back(),
                                           .context = options.context,
                                           .coherent = options.coherent,
                                           .whole_level_decodes = options.whole_level_decodes},
                                          model, source));
  std::vector<SurfaceRow> rows;
  Duration last{};
  for (const int sequences : options.sequences) {
    const TimePoint start = clock.Now();
    // At worst a step takes as much longer as there are more sequences in it.
    const int growth = rows.empty() ? 0 : (sequences - 1) / rows.back().sequences + 1;
    if (!rows.empty() && options.limit - (start - begin) < last * growth) break;
    MOBI_ASSIGN_OR_RETURN(SurfaceRow row, MeasureRow(*bench, sequences, options, clock));
    last = clock.Now() - start;
    if (on_row) on_row(row);
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace mobi
