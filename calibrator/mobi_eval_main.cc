// mobi-eval: perplexity and effective bits of a model folder, through the engine that serves it.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "calibrator/evaluate.h"
#include "engine/base/flags.h"
#include "nlohmann/json.hpp"

ABSL_FLAG(std::string, model, "", "model folder, float or MoBiQuant");
ABSL_FLAG(std::string, data, "", "UTF-8 text file");
ABSL_FLAG(std::string, layout, "plain",
          "layout of the text: plain, wikitext (rows of the raw corpus) or documents (parted by "
          "lines <|endoftext|>)");
ABSL_FLAG(std::vector<std::string>, bits, (std::vector<std::string>{"2", "3", "4", "6", "8"}),
          "average bits to evaluate at, by commas");
ABSL_FLAG(int, window, 1024, "tokens in a window");
ABSL_FLAG(int, limit, 0, "windows to read; 0: all");
ABSL_FLAG(int, threads, 0, "threads; 0: one per core");
ABSL_FLAG(std::string, device, "cpu", "cpu, cuda or auto");
ABSL_FLAG(bool, json, false, "print JSON");

namespace mobi {
namespace {

void PrintRow(const EvaluateResult& r) {
  if (r.is_float) {
    std::printf("%8s", "float");
  } else {
    std::printf("%8.2f", r.target_bits);
  }
  std::printf("  %9.3f  %10.4f  %7lld  %9lld  %7.1f\n", r.effective_bits, r.perplexity,
              static_cast<long long>(r.windows), static_cast<long long>(r.predicted_tokens),
              r.seconds);
  std::fflush(stdout);
}

nlohmann::json ToJson(const EvaluateResult& r) {
  nlohmann::json json = {{"effective_bits", r.effective_bits},
                         {"perplexity", r.perplexity},
                         {"nll", r.nll},
                         {"windows", r.windows},
                         {"predicted_tokens", r.predicted_tokens},
                         {"seconds", r.seconds}};
  if (r.is_float) {
    json["model"] = "float";
  } else {
    json["target_bits"] = r.target_bits;
  }
  return json;
}

absl::Status Run() {
  EvaluateOptions options;
  options.model_dir = absl::GetFlag(FLAGS_model);
  options.data_path = absl::GetFlag(FLAGS_data);
  if (options.model_dir.empty() || options.data_path.empty()) {
    return absl::InvalidArgumentError("--model and --data are needed (--help tells more)");
  }
  auto layout = ParseTextLayout(absl::GetFlag(FLAGS_layout));
  if (!layout.ok()) return layout.status();
  options.layout = *layout;
  for (const std::string& text : absl::GetFlag(FLAGS_bits)) {
    float bits = 0;
    if (!absl::SimpleAtof(text, &bits)) {
      return absl::InvalidArgumentError("--bits: \"" + text + "\" is not a number");
    }
    options.bits.push_back(bits);
  }
  options.window = absl::GetFlag(FLAGS_window);
  options.limit = absl::GetFlag(FLAGS_limit);
  options.device = absl::GetFlag(FLAGS_device);
  options.num_threads = absl::GetFlag(FLAGS_threads);
  const bool json = absl::GetFlag(FLAGS_json);
  if (!json) {
    std::printf("%8s  %9s  %10s  %7s  %9s  %7s\n", "target", "bits", "perplexity", "windows",
                "tokens", "seconds");
    std::fflush(stdout);
  }
  auto results = Evaluate(options, RealClock(), [&](const EvaluateResult& result) {
    if (!json) PrintRow(result);
  });
  if (!results.ok()) return results.status();
  if (json) {
    nlohmann::json rows = nlohmann::json::array();
    for (const EvaluateResult& result : *results) rows.push_back(ToJson(result));
    const nlohmann::json out = {{"model", options.model_dir},
                                {"data", options.data_path},
                                {"window", options.window},
                                {"results", rows}};
    std::printf("%s\n", out.dump(2).c_str());
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace mobi

int main(int argc, char** argv) {
  if (mobi::WantsHelp(argc, argv)) {
    std::printf("mobi-eval --model DIR --data FILE [--bits 2,3,4,6,8] [--json]\n%s",
                mobi::FlagsHelp(__FILE__).c_str());
    return 0;
  }
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
