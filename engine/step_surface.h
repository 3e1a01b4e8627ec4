// Step latency over bits and sequences, measured with a StepBench: what a server's controller
// needs to know so as not to spend quality where it buys no latency. For `mobi-bench surface`, and
// for a server that measures itself before it serves. Bits take turns, so that whatever else the
// machine does meets all of them alike. One thread; the model must not be in use elsewhere.
#ifndef MOBI_ENGINE_STEP_SURFACE_H_
#define MOBI_ENGINE_STEP_SURFACE_H_

#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "engine/model.h"
#include "engine/weight_source.h"

namespace mobi {

struct SurfaceOptions {
  // Close to the ends, too: at an end no router runs, which is a step in the surface.
  std::vector<float> bits = {2, 2.25f, 3, 4, 6, 7.75f, 8};
  std::vector<int> sequences = {1, 4, 16, 64};  // ascending
  int context = 256;
  bool coherent = false;
  bool whole_level_decodes = false;
  // Least time for one number of sequences and bits.
  Duration per_point = std::chrono::milliseconds(100);
  // A number of sequences that would end later than this, by the pace of the one before, is left
  // out. The first is always measured.
  Duration limit = Duration::max();
};

struct SurfaceRow {
  int sequences = 0;
  std::vector<double> milliseconds;  // medians, one for each of the bits
};

// `on_row` hears every row when it is done; may be empty. Errors are StepBench's.
absl::StatusOr<std::vector<SurfaceRow>> MeasureSurface(
    const Model& model, const WeightSource& source, const SurfaceOptions& options,
    const Clock& clock, const std::function<void(const SurfaceRow&)>& on_row);

}  // namespace mobi

#endif  // MOBI_ENGINE_STEP_SURFACE_H_
