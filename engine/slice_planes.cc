#include "engine/slice_planes.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weight_source.h"
#include "kernels/sliced_weight.h"

namespace mobi {
namespace {

constexpr size_t kAlignment = 256;
// What is restored between two looks at the clock: a huge page, so that the plane has them again,
// or several of the backend's pages, which cost it much the same together as one.
constexpr size_t kPieceBytes = size_t{2} << 20;
constexpr size_t kPiecePages = 8;

constexpr size_t Aligned(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

absl::StatusOr<SlicePlanes> SlicePlanes::Create(const ModelConfig& config, Backend& backend) {
  SlicePlanes planes;
  planes.backend_ = &backend;
  planes.can_drop_ = absl::OkStatus();
  size_t bytes = 0;
  for (const RoutedGroup& group : RoutedGroupsOfLayer(config, 0)) {
    size_t slices = 0, scales = 0;
    for (const LinearShape& linear : group.linears) {
      slices += SliceBytes(linear.rows, linear.cols);
      scales += ScaleBytes(linear.rows, linear.cols);
    }
    bytes += Aligned(slices) + Aligned(scales);
  }
  bytes *= config.num_hidden_layers;
  for (int level = 1; level <= kNumLevels; ++level) {
    MOBI_RETURN_IF_ERROR(planes.Allocate(level, bytes));
  }
  return planes;
}

absl::Status SlicePlanes::Allocate(int level, size_t bytes) {
  const std::string what = absl::StrCat("slices of level ", level);
  Buffer& memory = planes_[level - 1].memory;
  const size_t page = backend_->page_bytes();
  const size_t whole = (bytes + page - 1) / page * page;
  absl::StatusOr<Buffer> reserved = backend_->Reserve(whole, what);
  if (absl::IsUnimplemented(reserved.status())) {
    can_drop_ = reserved.status();
    MOBI_ASSIGN_OR_RETURN(memory, backend_->Allocate(bytes, what));
    return absl::OkStatus();
  }
  if (!reserved.ok()) return reserved.status();
  memory = *std::move(reserved);
  return backend_->Commit(memory.data(), whole, what);
}

std::byte* SlicePlanes::Append(int level, absl::Span<const absl::Span<const std::byte>> parts) {
  Plane& plane = planes_[level - 1];
  const size_t begin = plane.used;
  for (const auto& source : parts) {
    plane.parts.push_back({plane.used, source});
    plane.used += source.size();
  }
  plane.used = Aligned(plane.used);
  return plane.memory.As<std::byte>() + begin;
}

size_t SlicePlanes::resident_bytes() const {
  size_t bytes = 0;
  for (int level = 1; level <= resident_; ++level) bytes += plane_bytes(level);
  return bytes;
}

void SlicePlanes::Fill(const Plane& plane, size_t begin, size_t end) {
  // The last part that begins at or before `begin`; parts ascend.
  auto part = std::upper_bound(plane.parts.begin(), plane.parts.end(), begin,
                               [](size_t at, const Part& p) { return at < p.offset; });
  if (part != plane.parts.begin()) --part;
  for (; part != plane.parts.end() && part->offset < end; ++part) {
    const size_t from = std::max(begin, part->offset);
    const size_t to = std::min(end, part->offset + part->source.size());
    if (from >= to) continue;
    backend_->Upload(part->source.data() + (from - part->offset), to - from,
                     plane.memory.As<std::byte>() + from);
  }
}

void SlicePlanes::Drop() {
  const Plane& plane = planes_[resident_ - 1];
  backend_->Decommit(plane.memory.data(), plane.memory.size());
  --resident_;
}

absl::StatusOr<bool> SlicePlanes::Restore(const Clock& clock, Duration budget) {
  const Plane& plane = planes_[resident_];
  auto* memory = plane.memory.As<std::byte>();
  const size_t most = std::max(kPieceBytes, kPiecePages * backend_->page_bytes());
  const TimePoint begin = clock.Now();
  do {
    const size_t piece = std::min(most, plane.memory.size() - restored_);
    const absl::Status status = backend_->Commit(memory + restored_, piece, "slices to restore");
    if (!status.ok()) {
      if (restored_ > 0) backend_->Decommit(memory, restored_);
      restored_ = 0;
      return status;
    }
    Fill(plane, restored_, restored_ + piece);
    restored_ += piece;
  } while (restored_ < plane.memory.size() && clock.Now() - begin < budget);
  if (restored_ < plane.memory.size()) return false;
  restored_ = 0;
  ++resident_;
  return true;
}

}  // namespace mobi
