// mobi-calibrate: a float Hugging Face Llama folder and text in, a MoBiQuant checkpoint out.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_split.h"
#include "calibrator/calibrate.h"
#include "engine/base/flags.h"

ABSL_FLAG(std::string, model, "", "folder of the float model");
ABSL_FLAG(std::vector<std::string>, data, {}, "UTF-8 text files to calibrate on, by commas");
ABSL_FLAG(std::string, layout, "plain",
          "layout of the text: plain, wikitext (rows of the raw corpus) or documents (parted by "
          "lines <|endoftext|>)");
ABSL_FLAG(std::string, out, "", "folder to write; its parent must exist");
ABSL_FLAG(bool, overwrite, false, "replace a MoBiQuant checkpoint that is there already");
ABSL_FLAG(int, samples, 128, "sequences to calibrate on");
ABSL_FLAG(int, seq_len, 0, "tokens in a sequence; 0: 1024 or the model's context");
ABSL_FLAG(uint64_t, seed, 1, "chooses the sequences and the routers' start");
ABSL_FLAG(int, threads, 0, "threads; 0: one per core");

namespace mobi {
namespace {

absl::Status Run() {
  CalibrateOptions options;
  options.model_dir = absl::GetFlag(FLAGS_model);
  options.data_paths = absl::GetFlag(FLAGS_data);
  options.output_dir = absl::GetFlag(FLAGS_out);
  if (options.model_dir.empty() || options.data_paths.empty() || options.output_dir.empty()) {
    return absl::InvalidArgumentError("--model, --data and --out are needed (--help tells more)");
  }
  auto layout = ParseTextLayout(absl::GetFlag(FLAGS_layout));
  if (!layout.ok()) return layout.status();
  options.layout = *layout;
  options.overwrite = absl::GetFlag(FLAGS_overwrite);
  options.num_samples = absl::GetFlag(FLAGS_samples);
  options.seq_len = absl::GetFlag(FLAGS_seq_len);
  if (options.num_samples < 1 || options.seq_len < 0) {
    return absl::InvalidArgumentError("--samples must be at least 1, --seq-len not negative");
  }
  options.seed = absl::GetFlag(FLAGS_seed);
  options.num_threads = absl::GetFlag(FLAGS_threads);
  if (options.num_threads <= 0) {
    options.num_threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }
  return Calibrate(options, RealClock(), stderr, isatty(STDERR_FILENO) != 0);
}

}  // namespace
}  // namespace mobi

int main(int argc, char** argv) {
  if (mobi::WantsHelp(argc, argv)) {
    std::printf("mobi-calibrate --model DIR --data FILE[,FILE...] --out DIR\n%s",
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
  std::fprintf(stderr, "mobi-calibrate: %s\n", std::string(status.message()).c_str());
  return mobi::kExitUsage;
}
