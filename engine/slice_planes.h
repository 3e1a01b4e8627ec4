// Where the routed linears' slices live: one plane a level, which holds the slice and the scales
// that reading at that level adds, of all linears, in one piece of the backend's memory. The
// highest planes can be dropped from memory and restored from the weight source, piece by piece
// between steps; addresses stay. A dropped plane equals a cap on levels bit for bit, since lower
// levels never read it. Belongs to the engine's thread once the model is loaded.
#ifndef MOBI_ENGINE_SLICE_PLANES_H_
#define MOBI_ENGINE_SLICE_PLANES_H_

#include <array>
#include <cstddef>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/base/clock.h"
#include "engine/model_config.h"
#include "kernels/backend.h"
#include "kernels/bit_slice.h"

namespace mobi {

class SlicePlanes {
 public:
  // Room for all linears of a routed model. RESOURCE_EXHAUSTED says what does not fit.
  static absl::StatusOr<SlicePlanes> Create(const ModelConfig& config, Backend& backend);
  SlicePlanes() = default;  // of a model that is not routed: nothing

  // The place of `parts`, one after another, behind what the level's plane has: they are a linear's
  // slice or scales and fill what Create kept for them. Nothing is read but by Restore.
  std::byte* Append(int level, absl::Span<const absl::Span<const std::byte>> parts);

  // OK: planes can leave. UNIMPLEMENTED: the backend's memory cannot come and go.
  const absl::Status& can_drop() const { return can_drop_; }
  // Levels 1 to this are in memory and may be read.
  int resident_levels() const { return resident_; }
  size_t plane_bytes(int level) const { return planes_[level - 1].memory.size(); }
  size_t resident_bytes() const;

  // Takes the highest resident level out of memory at once.
  void Drop();
  // Brings the lowest level that is away nearer for `budget` by the clock, or a little longer: true
  // once it is there, and counts as resident. The spans given to Append are read.
  // RESOURCE_EXHAUSTED begins again from nothing.
  absl::StatusOr<bool> Restore(const Clock& clock, Duration budget);
  // Some of the next level is there and some is not.
  bool restoring() const { return restored_ > 0; }

 private:
  struct Part {
    size_t offset;  // in the plane
    absl::Span<const std::byte> source;
  };
  struct Plane {
    Buffer memory;
    size_t used = 0;
    std::vector<Part> parts;
  };

  absl::Status Allocate(int level, size_t bytes);
  // Uploads what of the parts lies in [begin, end) of the plane.
  void Fill(const Plane& plane, size_t begin, size_t end);

  Backend* backend_ = nullptr;
  absl::Status can_drop_ = absl::UnimplementedError("the weights are not sliced");
  std::array<Plane, kNumLevels> planes_;
  int resident_ = kNumLevels;
  size_t restored_ = 0;  // bytes of the level above that are in memory again
};

}  // namespace mobi

#endif  // MOBI_ENGINE_SLICE_PLANES_H_
