#include "server/pressure_surface.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/json.h"
#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr size_t kMaxAxis = 256;
constexpr double kMaxTokens = 1e6;
constexpr double kMinMilliseconds = 1e-6;
constexpr double kMaxMilliseconds = 1e6;
constexpr float kBitsStep = 0.05f;

absl::Status CheckAxis(absl::string_view name, const std::vector<double>& axis, size_t least,
                       double low, double high) {
  if (axis.size() < least || axis.size() > kMaxAxis) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: has %d entries, needs %d to %d", name, axis.size(), least, kMaxAxis));
  }
  for (size_t i = 0; i < axis.size(); ++i) {
    if (!(axis[i] >= low && axis[i] <= high) || (i > 0 && axis[i] <= axis[i - 1])) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%s[%d]: %g; must be in [%g, %g] and ascend", name, i, axis[i], low, high));
    }
  }
  return absl::OkStatus();
}

// Index and part of the way to the next one.
std::pair<size_t, double> Locate(const std::vector<double>& axis, double at,
                                 double (*scale)(double)) {
  if (at <= axis.front() || axis.size() == 1) return {0, 0.0};
  if (at >= axis.back()) return {axis.size() - 2, 1.0};
  const size_t next = std::upper_bound(axis.begin(), axis.end(), at) - axis.begin();
  const double low = scale(axis[next - 1]), high = scale(axis[next]);
  return {next - 1, (scale(at) - low) / (high - low)};
}

double Identity(double x) { return x; }
double Log(double x) { return std::log(x); }

struct SurfacePoint {
  double bits;
  double tokens;
  double milliseconds;
};

absl::StatusOr<std::vector<SurfacePoint>> ReadPoints(const JsonObject& root) {
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json* array, root.Array("points"));
  std::vector<SurfacePoint> points(array->size());
  for (size_t i = 0; i < points.size(); ++i) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject point, root.Element("points", i));
    MOBI_ASSIGN_OR_RETURN(points[i].bits, point.Number("bits", 2, 8));
    MOBI_ASSIGN_OR_RETURN(points[i].tokens, point.Number("tokens", 1, kMaxTokens));
    MOBI_ASSIGN_OR_RETURN(points[i].milliseconds,
                          point.Number("milliseconds", kMinMilliseconds, kMaxMilliseconds));
  }
  return points;
}

std::vector<double> Axis(const std::vector<SurfacePoint>& points, double SurfacePoint::*field) {
  std::set<double> values;
  for (const SurfacePoint& point : points) values.insert(point.*field);
  return {values.begin(), values.end()};
}

size_t IndexOf(const std::vector<double>& axis, double value) {
  return std::lower_bound(axis.begin(), axis.end(), value) - axis.begin();
}

}  // namespace

absl::StatusOr<StepSurface> StepSurface::Create(std::vector<double> bits,
                                                std::vector<double> step_tokens,
                                                std::vector<std::vector<double>> step_ms) {
  MOBI_RETURN_IF_ERROR(CheckAxis("bits", bits, 2, 2, 8));
  MOBI_RETURN_IF_ERROR(CheckAxis("tokens", step_tokens, 1, 1, kMaxTokens));
  if (step_ms.size() != bits.size()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("milliseconds: %d rows, bits has %d entries", step_ms.size(), bits.size()));
  }
  for (size_t i = 0; i < step_ms.size(); ++i) {
    if (step_ms[i].size() != step_tokens.size()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("milliseconds[%d]: has %d entries, tokens has %d", i, step_ms[i].size(),
                          step_tokens.size()));
    }
    for (const double ms : step_ms[i]) {
      if (ms >= kMinMilliseconds && ms <= kMaxMilliseconds) continue;
      return absl::InvalidArgumentError(absl::StrFormat("milliseconds[%d]: %g; must be in [%g, %g]",
                                                        i, ms, kMinMilliseconds, kMaxMilliseconds));
    }
  }
  return StepSurface(std::move(bits), std::move(step_tokens), std::move(step_ms));
}

absl::StatusOr<StepSurface> StepSurface::Parse(absl::string_view json, absl::string_view file) {
  const std::string name(file);
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json document, ParseJson({json.data(), json.size()}, name));
  MOBI_ASSIGN_OR_RETURN(const JsonObject root, JsonObject::Of(document, name));
  MOBI_ASSIGN_OR_RETURN(const std::vector<SurfacePoint> points, ReadPoints(root));
  std::vector<double> bits = Axis(points, &SurfacePoint::bits);
  std::vector<double> tokens = Axis(points, &SurfacePoint::tokens);
  if (bits.size() > kMaxAxis || tokens.size() > kMaxAxis) {
    return root.Error("points", absl::StrFormat("has more than %d bits or tokens", kMaxAxis));
  }
  constexpr double kMissing = std::numeric_limits<double>::quiet_NaN();
  std::vector<std::vector<double>> step_ms(bits.size(),
                                           std::vector<double>(tokens.size(), kMissing));
  for (size_t i = 0; i < points.size(); ++i) {
    const SurfacePoint& point = points[i];
    double& ms = step_ms[IndexOf(bits, point.bits)][IndexOf(tokens, point.tokens)];
    if (!std::isnan(ms)) {
      return root.Error(absl::StrFormat("points[%d]", i), "is there twice");
    }
    ms = point.milliseconds;
  }
  if (points.size() != bits.size() * tokens.size()) {
    return root.Error("points",
                      absl::StrFormat("%d entries, but %d bits by %d tokens are %d", points.size(),
                                      bits.size(), tokens.size(), bits.size() * tokens.size()));
  }
  auto surface = Create(std::move(bits), std::move(tokens), std::move(step_ms));
  if (surface.ok()) return surface;
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", surface.status().message()));
}

absl::StatusOr<StepSurface> StepSurface::Load(const std::string& path) {
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path, 1 << 20));
  return Parse({file.text().data(), file.text().size()}, path);
}

double StepSurface::StepMs(double bits, double step_tokens) const {
  const auto [i, in_bits] = Locate(bits_, bits, Identity);
  const auto [j, in_tokens] = Locate(step_tokens_, step_tokens, Log);
  const size_t next = std::min(j + 1, step_tokens_.size() - 1);
  return std::lerp(std::lerp(step_ms_[i][j], step_ms_[i][next], in_tokens),
                   std::lerp(step_ms_[i + 1][j], step_ms_[i + 1][next], in_tokens), in_bits);
}

float StepSurface::FreeBits(float bits, float ceiling, double step_tokens, double tolerance) const {
  const double limit = StepMs(bits, step_tokens) * (1 + tolerance);
  for (float candidate = ceiling; candidate > bits; candidate -= kBitsStep) {
    if (StepMs(candidate, step_tokens) <= limit) return candidate;
  }
  return bits;
}

std::string StepSurface::ToJson() const {
  nlohmann::json points = nlohmann::json::array();
  for (size_t i = 0; i < bits_.size(); ++i) {
    for (size_t j = 0; j < step_tokens_.size(); ++j) {
      points.push_back(
          {{"bits", bits_[i]}, {"tokens", step_tokens_[j]}, {"milliseconds", step_ms_[i][j]}});
    }
  }
  const nlohmann::json document = {{"points", std::move(points)}};
  return document.dump() + "\n";
}

}  // namespace mobi
