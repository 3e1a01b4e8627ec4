// mobi-calibrate: a float Hugging Face Llama folder and text in, a MoBiQuant checkpoint out.
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_split.h"
#include "calibrator/calibrate.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/matrix.h"
#include "engine/base/flags.h"

ABSL_FLAG(std::string, model, "", "folder of the float model");
ABSL_FLAG(std::vector<std::string>, data, {}, "UTF-8 text files to calibrate on, by commas");
ABSL_FLAG(std::string, layout, "plain",
          "layout of the text: plain, wikitext (rows of the raw corpus) or documents (parted by "
          "lines <|endoftext|>)");
ABSL_FLAG(std::string, out, "", "folder to write; its parent must exist");
ABSL_FLAG(bool, overwrite, false, "replace a MoBiQuant checkpoint that is there already");
ABSL_FLAG(
    std::string, recipe, "",
    "YAML file that changes the default recipe; paper: the method as published; rtn-B, gptq-B or "
    "lwc-B: a baseline at B bits");
ABSL_FLAG(int, samples, 320, "sequences to calibrate on");
ABSL_FLAG(int, seq_len, 0, "tokens in a sequence; 0: 1024 or the model's context");
ABSL_FLAG(uint64_t, seed, 1, "chooses the sequences and the routers' start");
ABSL_FLAG(int, threads, 0, "threads; 0: one per core");
ABSL_FLAG(std::string, device, "cpu",
          "cpu, or cuda: large products and factorizations are made there");

namespace mobi {
namespace {

// What a signal's handler may touch.
volatile std::sig_atomic_t interrupted = 0;

// The first signal asks, the second kills.
void CatchInterrupts() {
  struct sigaction action = {};
  action.sa_handler = [](int) { interrupted = 1; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

// BLAS reads the name of its kernels once, when the process starts. Where this fails, all is
// slower.
void RestartWithBetterBlas(char** argv) {
  const std::string kernels = BetterBlasKernels();
  if (kernels.empty() || std::getenv("OPENBLAS_CORETYPE") != nullptr) return;
  setenv("OPENBLAS_CORETYPE", kernels.c_str(), /*overwrite=*/0);
  execv("/proc/self/exe", argv);
}

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
  if (const std::string path = absl::GetFlag(FLAGS_recipe); !path.empty()) {
    auto recipe = ReadRecipe(path);
    if (!recipe.ok()) return recipe.status();
    options.recipe = *std::move(recipe);
  }
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
  if (absl::Status status = UseDevice(absl::GetFlag(FLAGS_device)); !status.ok()) return status;
  CatchInterrupts();
  options.interrupted = [] { return interrupted != 0; };
  return Calibrate(options, RealClock(), stderr, isatty(STDERR_FILENO) != 0);
}

}  // namespace
}  // namespace mobi

int main(int argc, char** argv) {
  if (mobi::PrintedHelp(argc, argv, "mobi-calibrate --model DIR --data FILE[,FILE...] --out DIR\n",
                        __FILE__))
    return 0;
  const auto positional = mobi::ParseFlags(argc, argv, __FILE__);
  absl::Status status = positional.status();
  if (status.ok() && !positional->empty()) {
    status = absl::InvalidArgumentError("unexpected argument " + positional->front());
  }
  if (status.ok()) {
    mobi::RestartWithBetterBlas(argv);
    mobi::KeepFreedMemory();
    status = mobi::Run();
  }
  if (status.ok()) return 0;
  std::fprintf(stderr, "mobi-calibrate: %s\n", std::string(status.message()).c_str());
  return mobi::kExitUsage;
}
