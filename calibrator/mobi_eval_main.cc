// mobi-eval: perplexity, effective bits and multiple-choice accuracy of a model folder, through the
// engine that serves it.
#include <algorithm>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "calibrator/evaluate.h"
#include "calibrator/layer_report.h"
#include "calibrator/multiple_choice.h"
#include "calibrator/perplexity_plot.h"
#include "calibrator/text_data.h"
#include "engine/base/file_writer.h"
#include "engine/base/flags.h"
#include "nlohmann/json.hpp"

ABSL_FLAG(std::string, model, "", "model folder, float or MoBiQuant");
ABSL_FLAG(std::string, data, "", "UTF-8 text file: perplexity");
ABSL_FLAG(std::string, choices, "",
          "JSONL file of {\"context\", \"choices\", \"answer\"}: multiple-choice accuracy instead");
ABSL_FLAG(std::string, layout, "plain",
          "layout of the text: plain, wikitext (rows of the raw corpus) or documents (parted by "
          "lines <|endoftext|>)");
ABSL_FLAG(std::vector<std::string>, bits, (std::vector<std::string>{"2", "3", "4", "6", "8"}),
          "average bits to evaluate at, by commas");
ABSL_FLAG(std::string, mode, "token",
          "token: every token chooses its levels; coherent: the tokens of a step share them");
ABSL_FLAG(int, batch, 16, "windows read side by side in coherent mode");
ABSL_FLAG(bool, track_bits, false,
          "correct what windows ask for, so that the text uses the average bits on the whole");
ABSL_FLAG(int, window, 1024, "tokens in a window");
ABSL_FLAG(int, skip, 0, "windows to pass over first");
ABSL_FLAG(int, limit, 0, "windows or questions to read; 0: all");
ABSL_FLAG(int, threads, 0, "threads; 0: one per core");
ABSL_FLAG(std::string, device, "cpu", "cpu, cuda or auto");
ABSL_FLAG(bool, json, false, "print JSON");
ABSL_FLAG(std::string, report, "",
          "folder of the float model that --model was made from: error, bits and outlier migration "
          "of every linear instead of perplexity");
ABSL_FLAG(std::string, plot, "", "SVG file to draw from --series instead of evaluating");
ABSL_FLAG(std::vector<std::string>, series, {},
          "NAME=FILE or NAME@BITS=FILE by commas: what --json printed; the second puts it at BITS");
ABSL_FLAG(std::string, plot_title, "Perplexity over bits", "title of the plot");
ABSL_FLAG(double, plot_max, 100, "perplexities above this are not drawn");

namespace mobi {
namespace {

// The columns that every line begins with.
template <typename Result>
void PrintBits(const Result& r) {
  if (r.is_float) {
    std::printf("%8s", "float");
  } else {
    std::printf("%8.2f", r.target_bits);
  }
  std::printf("  %9.3f", r.effective_bits);
}

void Print(const EvaluateResult& r) {
  PrintBits(r);
  std::printf("  %10.4f  %7lld  %9lld  %7.1f\n", r.perplexity, static_cast<long long>(r.windows),
              static_cast<long long>(r.predicted_tokens), r.seconds);
  std::fflush(stdout);
}

void Print(const ChoiceResult& r) {
  PrintBits(r);
  std::printf("  %7.4f  %7.4f  %8.4f  %7.4f  %9lld  %7.1f\n", r.acc, r.acc_stderr, r.acc_norm,
              r.acc_norm_stderr, static_cast<long long>(r.questions), r.seconds);
  std::fflush(stdout);
}

template <typename Result>
nlohmann::json BitsJson(const Result& r) {
  nlohmann::json json = {{"effective_bits", r.effective_bits}, {"seconds", r.seconds}};
  if (r.is_float) {
    json["model"] = "float";
  } else {
    json["target_bits"] = r.target_bits;
  }
  return json;
}

nlohmann::json ToJson(const EvaluateResult& r) {
  nlohmann::json json = BitsJson(r);
  json.update({{"perplexity", r.perplexity},
               {"nll", r.nll},
               {"windows", r.windows},
               {"predicted_tokens", r.predicted_tokens}});
  return json;
}

nlohmann::json ToJson(const ChoiceResult& r) {
  nlohmann::json json = BitsJson(r);
  json.update({{"questions", r.questions},
               {"acc", r.acc},
               {"acc_stderr", r.acc_stderr},
               {"acc_norm", r.acc_norm},
               {"acc_norm_stderr", r.acc_norm_stderr},
               {"logprobs", r.logprobs}});
  return json;
}

template <typename Result>
absl::Status Report(const absl::StatusOr<std::vector<Result>>& results, nlohmann::json about) {
  if (!results.ok()) return results.status();
  if (!absl::GetFlag(FLAGS_json)) return absl::OkStatus();
  about["results"] = nlohmann::json::array();
  for (const Result& result : *results) about["results"].push_back(ToJson(result));
  std::printf("%s\n", about.dump(2).c_str());
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Bits() {
  std::vector<float> bits;
  for (const std::string& text : absl::GetFlag(FLAGS_bits)) {
    if (!absl::SimpleAtof(text, &bits.emplace_back())) {
      return absl::InvalidArgumentError("--bits: \"" + text + "\" is not a number");
    }
  }
  return bits;
}

absl::Status RunChoices(std::vector<float> bits) {
  ChoiceOptions options;
  options.model_dir = absl::GetFlag(FLAGS_model);
  options.data_path = absl::GetFlag(FLAGS_choices);
  options.bits = std::move(bits);
  options.limit = absl::GetFlag(FLAGS_limit);
  options.num_threads = absl::GetFlag(FLAGS_threads);
  options.device = absl::GetFlag(FLAGS_device);
  const bool json = absl::GetFlag(FLAGS_json);
  if (!json) {
    std::printf("%8s  %9s  %7s  %7s  %8s  %7s  %9s  %7s\n", "target", "bits", "acc", "+-",
                "acc_norm", "+-", "questions", "seconds");
  }
  return Report(EvaluateChoices(options, RealClock(),
                                [&](const ChoiceResult& result) {
                                  if (!json) Print(result);
                                }),
                {{"model", options.model_dir}, {"choices", options.data_path}});
}

absl::Status RunPerplexity(std::vector<float> bits) {
  EvaluateOptions options;
  options.model_dir = absl::GetFlag(FLAGS_model);
  options.data_path = absl::GetFlag(FLAGS_data);
  const auto layout = ParseTextLayout(absl::GetFlag(FLAGS_layout));
  if (!layout.ok()) return layout.status();
  options.layout = *layout;
  options.bits = std::move(bits);
  const std::string mode = absl::GetFlag(FLAGS_mode);
  if (mode != "token" && mode != "coherent") {
    return absl::InvalidArgumentError("--mode \"" + mode + "\" is not token or coherent");
  }
  options.coherent = mode == "coherent";
  options.batch = absl::GetFlag(FLAGS_batch);
  options.track_bits = absl::GetFlag(FLAGS_track_bits);
  options.window = absl::GetFlag(FLAGS_window);
  options.skip = absl::GetFlag(FLAGS_skip);
  options.limit = absl::GetFlag(FLAGS_limit);
  options.device = absl::GetFlag(FLAGS_device);
  options.num_threads = absl::GetFlag(FLAGS_threads);
  const bool json = absl::GetFlag(FLAGS_json);
  if (!json) {
    std::printf("%8s  %9s  %10s  %7s  %9s  %7s\n", "target", "bits", "perplexity", "windows",
                "tokens", "seconds");
    std::fflush(stdout);
  }
  nlohmann::json about = {{"model", options.model_dir},
                          {"data", options.data_path},
                          {"window", options.window},
                          {"mode", mode},
                          {"track_bits", options.track_bits}};
  if (options.coherent) about["batch"] = options.batch;
  return Report(Evaluate(options, RealClock(),
                         [&](const EvaluateResult& result) {
                           if (!json) Print(result);
                         }),
                std::move(about));
}

void Print(const LinearReport& r) {
  std::printf("%-36s", r.name.c_str());
  for (const double error : r.error) std::printf("  %9.2e", error);
  for (int k = 1; k < kNumLevels; ++k) std::printf("  %4.2f", r.overlap[0][k]);
  for (const double bits : r.bits) std::printf("  %5.2f", bits);
  std::printf("\n");
}

absl::Status RunReport(std::vector<float> bits) {
  LayerReportOptions options;
  options.model_dir = absl::GetFlag(FLAGS_model);
  options.float_dir = absl::GetFlag(FLAGS_report);
  options.data_path = absl::GetFlag(FLAGS_data);
  const auto layout = ParseTextLayout(absl::GetFlag(FLAGS_layout));
  if (!layout.ok()) return layout.status();
  options.layout = *layout;
  options.bits = std::move(bits);
  options.window = absl::GetFlag(FLAGS_window);
  if (absl::GetFlag(FLAGS_limit) > 0) options.windows = absl::GetFlag(FLAGS_limit);
  options.num_threads = absl::GetFlag(FLAGS_threads);
  if (options.num_threads <= 0) {
    options.num_threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }
  const auto reports = ReportLayers(options);
  if (!reports.ok()) return reports.status();
  if (!absl::GetFlag(FLAGS_json)) {
    std::printf("%-36s  %s  %s", "linear", "error at level 1         2          3          4",
                "worst tenth of level 1 in 2, 3, 4  bits at");
    for (const float b : options.bits) std::printf(" %g", b);
    std::printf("\n");
    for (const LinearReport& report : *reports) Print(report);
    return absl::OkStatus();
  }
  nlohmann::json rows = nlohmann::json::array();
  for (const LinearReport& r : *reports) {
    rows.push_back(
        {{"name", r.name}, {"error", r.error}, {"overlap", r.overlap}, {"bits", r.bits}});
  }
  const nlohmann::json out = {{"model", options.model_dir},
                              {"float", options.float_dir},
                              {"data", options.data_path},
                              {"target_bits", options.bits},
                              {"linears", rows}};
  std::printf("%s\n", out.dump(2).c_str());
  return absl::OkStatus();
}

// "NAME@BITS=FILE" joins the series of that name.
absl::Status AddSeries(const std::string& text, std::vector<PlotSeries>& all) {
  const size_t equals = text.find('='), at = std::min(text.find('@'), equals);
  double bits = 0;
  if (equals == std::string::npos ||
      (at < equals && !absl::SimpleAtod(text.substr(at + 1, equals - at - 1), &bits))) {
    return absl::InvalidArgumentError("--series: \"" + text +
                                      "\" is not NAME=FILE or NAME@BITS=FILE");
  }
  const std::string name = text.substr(0, at), path = text.substr(equals + 1);
  const auto json = ReadText(path, TextLayout::kPlain);
  if (!json.ok()) return json.status();
  auto series = ParseSeries(name, *json, path, bits);
  if (!series.ok()) return series.status();
  const auto same =
      std::find_if(all.begin(), all.end(), [&](const PlotSeries& s) { return s.name == name; });
  if (same == all.end()) {
    all.push_back(*std::move(series));
  } else {
    same->points.insert(same->points.end(), series->points.begin(), series->points.end());
  }
  return absl::OkStatus();
}

absl::Status RunPlot() {
  std::vector<PlotSeries> series;
  for (const std::string& text : absl::GetFlag(FLAGS_series)) {
    const absl::Status added = AddSeries(text, series);
    if (!added.ok()) return added;
  }
  const auto svg = PlotSvg(series, absl::GetFlag(FLAGS_plot_title), absl::GetFlag(FLAGS_plot_max));
  if (!svg.ok()) return svg.status();
  const std::string path = absl::GetFlag(FLAGS_plot);
  std::remove(path.c_str());
  return WriteFile(path, *svg);
}

absl::Status Run() {
  if (!absl::GetFlag(FLAGS_plot).empty()) return RunPlot();
  if (absl::GetFlag(FLAGS_model).empty() ||
      absl::GetFlag(FLAGS_data).empty() == absl::GetFlag(FLAGS_choices).empty()) {
    return absl::InvalidArgumentError(
        "--model and either --data or --choices are needed (--help tells more)");
  }
  auto bits = Bits();
  if (!bits.ok()) return bits.status();
  if (!absl::GetFlag(FLAGS_report).empty()) return RunReport(*std::move(bits));
  return absl::GetFlag(FLAGS_choices).empty() ? RunPerplexity(*std::move(bits))
                                              : RunChoices(*std::move(bits));
}

}  // namespace
}  // namespace mobi

int main(int argc, char** argv) {
  if (mobi::PrintedHelp(
          argc, argv,
          "mobi-eval --model DIR (--data FILE | --choices FILE) [--bits 2,3,4,6,8] [--json]\n"
          "mobi-eval --plot SVG --series NAME=JSON[,NAME=JSON...]\n",
          __FILE__))
    return 0;
  const auto positional = mobi::ParseFlags(argc, argv, __FILE__);
  absl::Status status = positional.status();
  if (status.ok() && !positional->empty()) {
    status = absl::InvalidArgumentError("unexpected argument " + positional->front());
  }
  if (status.ok()) status = mobi::Run();
  if (status.ok()) return 0;
  std::fprintf(stderr, "mobi-eval: %s\n", std::string(status.message()).c_str());
  return mobi::kExitUsage;
}
