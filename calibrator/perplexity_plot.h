// Perplexity over bits as an SVG picture: one line per series, bits across, perplexity up on a
// logarithmic scale, float as a dashed line. Series are what mobi-eval --json printed. Pure.
#ifndef MOBI_CALIBRATOR_PERPLEXITY_PLOT_H_
#define MOBI_CALIBRATOR_PERPLEXITY_PLOT_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace mobi {

struct PlotPoint {
  double bits = 0;
  double perplexity = 0;
};

struct PlotSeries {
  std::string name;
  bool is_float = false;  // a level of its own instead of a line over bits
  std::vector<PlotPoint> points;
};

// The points of one --json output; `bits` above 0 puts them there: a baseline's width, whatever its
// checkpoint says. INVALID_ARGUMENT names the file and what is missing.
absl::StatusOr<PlotSeries> ParseSeries(std::string name, std::string_view json,
                                       const std::string& file, double bits);

// Points above `max_perplexity` are left out. INVALID_ARGUMENT when nothing is left.
absl::StatusOr<std::string> PlotSvg(const std::vector<PlotSeries>& series, std::string_view title,
                                    double max_perplexity);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_PERPLEXITY_PLOT_H_
