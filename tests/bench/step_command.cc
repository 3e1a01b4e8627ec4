#include "step_command.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <utility>

#include "engine/base/status_macros.h"
#include "engine/step_bench.h"
#include "engine/step_surface.h"
#include "stopwatch.h"

namespace mobi {
namespace {

using Json = nlohmann::json;
using PartSeconds = std::array<double, kNumParts>;

absl::StatusOr<std::unique_ptr<StepBench>> CreateBench(const Model& model,
                                                       const WeightSource& source,
                                                       const StepCommandOptions& options) {
  const int max_seqs = *std::max_element(options.sequences.begin(), options.sequences.end());
  return StepBench::Create({.max_seqs = max_seqs,
                            .context = options.context,
                            .chunk = options.chunk,
                            .decodes = options.decodes,
                            .coherent = options.coherent,
                            .whole_level_prompts = options.whole_level_prompts,
                            .whole_level_decodes = options.whole_level_decodes},
                           model, source);
}

// The median and the best of one step.
absl::StatusOr<TimedCase> TimeStep(StepBench& bench, double seconds) {
  absl::Status status;
  std::vector<TimedCase> cases(1);
  // Twice first: a backend may record a step the second time that it runs.
  for (int i = 0; i < 2; ++i) MOBI_RETURN_IF_ERROR(bench.Run());
  cases[0].run = [&] { status.Update(bench.Run()); };
  TimeInTurns(seconds, cases);
  MOBI_RETURN_IF_ERROR(status);
  return std::move(cases[0]);
}

// On a backend whose ops are over when they return: the median of each part.
absl::StatusOr<PartSeconds> PartsByClock(StepBench& bench, PartsBackend& parts, double seconds) {
  std::array<std::vector<double>, kNumParts> samples;
  absl::Status status;
  std::vector<TimedCase> cases(1);
  cases[0].run = [&] {
    parts.TakeSeconds();
    status.Update(bench.Run());
    const PartSeconds taken = parts.TakeSeconds();
    for (int i = 0; i < kNumParts; ++i) samples[i].push_back(taken[i]);
  };
  TimeInTurns(seconds, cases);
  MOBI_RETURN_IF_ERROR(status);
  PartSeconds medians;
  for (int i = 0; i < kNumParts; ++i) {
    const auto middle = samples[i].begin() + static_cast<std::ptrdiff_t>(samples[i].size() / 2);
    std::nth_element(samples[i].begin(), middle, samples[i].end());
    medians[i] = *middle;
  }
  return medians;
}

// What a step gains when a part is left out.
absl::StatusOr<PartSeconds> PartsByOmission(StepBench& bench, PartsBackend& parts, double whole,
                                            double seconds) {
  PartSeconds gains{};
  for (int i = 0; i < kNumParts; ++i) {
    parts.Omit(static_cast<Part>(i));
    absl::StatusOr<TimedCase> timed = TimeStep(bench, seconds / 2);
    parts.Omit(std::nullopt);
    if (!timed.ok()) return timed.status();
    gains[i] = whole - timed->median_s;
  }
  return gains;
}

void PrintHeader() {
  std::printf("%5s %6s %6s %5s %9s %9s %9s %9s %6s", "bits", "used", "loaded", "seqs", "ms", "best",
              "cpu", "floor", "ratio");
  for (const char* name : kPartNames) std::printf(" %9s", name);
  std::printf("\n");
}

void PrintRow(const Json& row) {
  const double ms = row["milliseconds"], floor = row["floor_milliseconds"];
  std::printf("%5.2f %6.3f %6.3f %5d %9.3f %9.3f %9.3f %9.3f %6.2f", row["bits"].get<double>(),
              row["effective_bits"].get<double>(), row["loaded_bits"].get<double>(),
              row["sequences"].get<int>(), ms, row["best_milliseconds"].get<double>(),
              row["cpu_milliseconds"].get<double>(), floor, ms / floor);
  for (const char* name : kPartNames) {
    if (row["parts_milliseconds"].contains(name)) {
      std::printf(" %9.3f", row["parts_milliseconds"][name].get<double>());
    } else {
      std::printf(" %9s", "-");
    }
  }
  std::printf("\n");
  std::fflush(stdout);
}

absl::StatusOr<Json> TimeCase(StepBench& bench, PartsBackend& parts, int sequences, float bits,
                              const StepCommandOptions& options) {
  MOBI_RETURN_IF_ERROR(bench.Set(sequences, bits));
  MOBI_ASSIGN_OR_RETURN(const TimedCase whole, TimeStep(bench, options.seconds));
  Json row = {{"bits", bits},
              {"effective_bits", bench.effective_bits()},
              {"loaded_bits", bench.loaded_bits()},
              {"sequences", sequences},
              {"context", options.context},
              {"chunk", options.chunk},
              {"decodes", options.decodes},
              {"milliseconds", whole.median_s * 1e3},
              {"best_milliseconds", whole.best_s * 1e3},
              {"cpu_milliseconds", whole.cpu_s * 1e3},
              {"floor_milliseconds", bench.StepBytes() / options.bytes_per_second * 1e3},
              {"parts_milliseconds", Json::object()}};
  if (!options.parts) return row;
  PartSeconds seconds{};
  if (parts.name() == "cpu") {
    MOBI_ASSIGN_OR_RETURN(seconds, PartsByClock(bench, parts, options.seconds));
  } else if (!bench.Chooses(bits)) {
    MOBI_ASSIGN_OR_RETURN(seconds, PartsByOmission(bench, parts, whole.median_s, options.seconds));
  } else {
    return row;  // without a part, routers would choose other levels
  }
  for (int i = 0; i < kNumParts; ++i) row["parts_milliseconds"][kPartNames[i]] = seconds[i] * 1e3;
  return row;
}

}  // namespace

absl::StatusOr<Json> TimeSteps(const Model& model, const WeightSource& source, PartsBackend& parts,
                               const StepCommandOptions& options) {
  MOBI_ASSIGN_OR_RETURN(const auto bench, CreateBench(model, source, options));
  if (options.print) PrintHeader();
  Json rows = Json::array();
  for (const int sequences : options.sequences) {
    for (const float bits : options.bits) {
      MOBI_ASSIGN_OR_RETURN(Json row, TimeCase(*bench, parts, sequences, bits, options));
      if (options.print) PrintRow(row);
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

absl::StatusOr<Json> TimeSurface(const Model& model, const WeightSource& source,
                                 const StepCommandOptions& options) {
  if (options.print) {
    std::printf("%8s", "seqs");
    for (const float bits : options.bits) std::printf(" %6.2f bits", bits);
    std::printf("\n");
  }
  const auto print_row = [&](const SurfaceRow& row) {
    if (!options.print) return;
    std::printf("%8d", row.sequences);
    for (const double ms : row.milliseconds) std::printf(" %8.3f ms", ms);
    std::printf("\n");
    std::fflush(stdout);
  };
  const auto seconds = std::chrono::duration<double>(options.seconds);
  const SurfaceOptions surface{.bits = options.bits,
                               .sequences = options.sequences,
                               .context = options.context,
                               .coherent = options.coherent,
                               .whole_level_decodes = options.whole_level_decodes,
                               .per_point = std::chrono::duration_cast<Duration>(seconds)};
  MOBI_ASSIGN_OR_RETURN(const std::vector<SurfaceRow> rows,
                        MeasureSurface(model, source, surface, RealClock(), print_row));
  Json points = Json::array();
  for (const SurfaceRow& row : rows) {
    for (size_t i = 0; i < options.bits.size(); ++i) {
      points.push_back({{"bits", options.bits[i]},
                        {"tokens", row.sequences},
                        {"milliseconds", row.milliseconds[i]}});
    }
  }
  return points;
}

}  // namespace mobi
