#include "calibrator/perplexity_plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "nlohmann/json.hpp"

namespace mobi {
namespace {

constexpr double kWidth = 720, kHeight = 440, kLeft = 60, kRight = 180, kTop = 40, kBottom = 50;
constexpr std::array<const char*, 6> kColours = {"#1f6fb4", "#d95f02", "#1b9e77",
                                                 "#7570b3", "#a6761d", "#666666"};

std::string Escaped(std::string_view text) {
  return absl::StrReplaceAll(absl::string_view(text.data(), text.size()),
                             {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}});
}

struct Scale {
  double low, high, from, to;
  double operator()(double value) const {
    return from + (value - low) / (high - low) * (to - from);
  }
};

std::string Text(double x, double y, std::string_view anchor, std::string_view text) {
  return absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y,
                         std::string(anchor), Escaped(text));
}

std::string Line(double x1, double y1, double x2, double y2, std::string_view style) {
  return absl::StrFormat("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2,
                         y2, std::string(style));
}

// Ticks of a logarithmic axis: 1, 1.2, 1.5, 2, 2.5, ... times powers of ten within the range.
std::vector<double> LogTicks(double low, double high) {
  std::vector<double> ticks;
  for (double power = std::pow(10, std::floor(std::log10(low))); power <= high; power *= 10) {
    for (const double m : {1.0, 1.2, 1.5, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0}) {
      if (m * power >= low && m * power <= high) ticks.push_back(m * power);
    }
  }
  return ticks;
}

std::string Axes(const Scale& x, const Scale& y) {
  std::string svg;
  const std::string grid = "stroke=\"#dddddd\"";
  for (int bits = static_cast<int>(std::ceil(x.low)); bits <= x.high; ++bits) {
    svg += Line(x(bits), y.from, x(bits), y.to, grid);
    svg += Text(x(bits), y.from + 18, "middle", absl::StrCat(bits));
  }
  for (const double tick : LogTicks(std::exp(y.low), std::exp(y.high))) {
    const double at = y(std::log(tick));
    svg += Line(x.from, at, x.to, at, grid);
    svg += Text(x.from - 8, at + 4, "end", absl::StrFormat("%g", tick));
  }
  svg += Text(0.5 * (x.from + x.to), y.from + 40, "middle", "average bits per weight");
  svg += absl::StrFormat(
      "<text transform=\"translate(16 %.1f) rotate(-90)\" "
      "text-anchor=\"middle\">perplexity</text>\n",
      0.5 * (y.from + y.to));
  return svg;
}

std::string Draw(const PlotSeries& series, const char* colour, double legend_y, const Scale& x,
                 const Scale& y) {
  std::string svg, path;
  const std::string stroke = absl::StrFormat("stroke=\"%s\" stroke-width=\"2\"%s", colour,
                                             series.is_float ? " stroke-dasharray=\"6 4\"" : "");
  const double legend_x = x.to + 14;
  svg += Line(legend_x, legend_y - 4, legend_x + 22, legend_y - 4, stroke);
  svg += Text(legend_x + 28, legend_y, "start", series.name);
  if (series.is_float) {
    const double at = y(std::log(series.points.front().perplexity));
    return svg + Line(x.from, at, x.to, at, stroke);
  }
  for (const PlotPoint& p : series.points) {
    const double px = x(p.bits), py = y(std::log(p.perplexity));
    absl::StrAppendFormat(&path, "%s%.1f %.1f", path.empty() ? "M" : " L", px, py);
    absl::StrAppendFormat(&svg, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", px, py,
                          colour);
  }
  absl::StrAppendFormat(&svg, "<path d=\"%s\" fill=\"none\" %s/>\n", path, stroke);
  return svg;
}

}  // namespace

absl::StatusOr<PlotSeries> ParseSeries(std::string name, std::string_view json,
                                       const std::string& file, double bits) {
  const nlohmann::json root = nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false);
  const auto results = root.is_object() ? root.find("results") : root.end();
  if (!root.is_object() || results == root.end() || !results->is_array() || results->empty()) {
    return absl::InvalidArgumentError(file + ": not what mobi-eval --json prints");
  }
  PlotSeries series{std::move(name), false, {}};
  for (const auto& row : *results) {
    const auto number = [&](const char* key) {
      return row.is_object() && row.contains(key) && row[key].is_number() ? row[key].get<double>()
                                                                          : 0.0;
    };
    const PlotPoint point{bits > 0 ? bits : number("effective_bits"), number("perplexity")};
    if (!(point.bits > 0 && point.perplexity > 0)) {
      return absl::InvalidArgumentError(file + ": a result has no effective_bits or perplexity");
    }
    series.is_float |= row.value("model", nlohmann::json()) == "float";
    series.points.push_back(point);
  }
  return series;
}

absl::StatusOr<std::string> PlotSvg(const std::vector<PlotSeries>& series, std::string_view title,
                                    double max_perplexity) {
  std::vector<PlotSeries> shown;
  double lowest = max_perplexity, highest = 0, least_bits = 1e9, most_bits = 0;
  for (PlotSeries s : series) {
    std::erase_if(s.points, [&](const PlotPoint& p) { return p.perplexity > max_perplexity; });
    if (s.points.empty()) continue;
    std::sort(s.points.begin(), s.points.end(),
              [](const PlotPoint& a, const PlotPoint& b) { return a.bits < b.bits; });
    for (const PlotPoint& p : s.points) {
      lowest = std::min(lowest, p.perplexity);
      highest = std::max(highest, p.perplexity);
      if (s.is_float) continue;
      least_bits = std::min(least_bits, p.bits);
      most_bits = std::max(most_bits, p.bits);
    }
    shown.push_back(std::move(s));
  }
  if (most_bits == 0) return absl::InvalidArgumentError("nothing to plot over bits");
  const Scale x{std::floor(least_bits), std::max(std::ceil(most_bits), std::floor(least_bits) + 1),
                kLeft, kWidth - kRight};
  const Scale y{std::log(0.98 * lowest), std::log(1.02 * highest), kHeight - kBottom, kTop};
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" "
      "fill=\"white\"/>\n",
      kWidth, kHeight);
  svg += Text(kLeft, 22, "start", title);
  svg += Axes(x, y);
  for (size_t i = 0; i < shown.size(); ++i) {
    svg += Draw(shown[i], kColours[i % kColours.size()], kTop + 16 + 20 * static_cast<double>(i), x,
                y);
  }
  return svg + "</svg>\n";
}

}  // namespace mobi
