// mobi-bench: how fast this machine runs a model. `step` times whole steps and their parts
// beside the time that the bytes alone take; `linears` the sliced matmuls beside the machine's own
// library; `surface` writes the step latency over bits and tokens that a server's controller reads.
// Weights are made up for a shape, or a checkpoint's own.
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/base/flags.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint.h"
#include "engine/model.h"
#include "engine/synthetic_weights.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/create_backend.h"
#include "linears_command.h"
#include "machine_peak.h"
#include "nlohmann/json.hpp"
#include "parts_backend.h"
#include "peer_linears.h"
#include "step_command.h"
#include "stopwatch.h"

ABSL_FLAG(
    std::string, model, "llama-3.2-1b",
    "a shape (llama-3.2-1b, llama-3.2-3b, llama-3-8b, llama-2-7b, wiki-llama) or a model folder");
ABSL_FLAG(int, layers, 0, "decoder layers of a shape; 0: all");
ABSL_FLAG(int, lm_head_min_level, 3,
          "lm_head of a shape in slices, read at this level at least; 0: in 16 bits");
ABSL_FLAG(std::string, device, "cpu", "cpu, cuda or auto");
ABSL_FLAG(int, threads, 0, "CPU threads; 0: one per usable core");
ABSL_FLAG(std::vector<std::string>, bits, {}, "average bits, 2 to 8 (step, surface)");
ABSL_FLAG(std::vector<std::string>, sequences, {}, "sequences in a step (step, surface)");
ABSL_FLAG(int, chunk, 1, "tokens of each sequence in a step; 1: decodes, more: prompts (step)");
ABSL_FLAG(int, decodes, 0, "sequences that decode beside those of --sequences (step)");
ABSL_FLAG(bool, whole_level_prompts, false, "prompts read the next whole level (step)");
ABSL_FLAG(bool, whole_level_decodes, false, "decodes read the next whole level (step, surface)");
ABSL_FLAG(int, context, 512, "tokens that each sequence attends to (step, surface)");
ABSL_FLAG(std::string, routing, "",
          "token: every token for itself; coherent: a step's tokens share levels; default: token "
          "on the CPU, coherent on CUDA (step, surface)");
ABSL_FLAG(bool, parts, true, "time the parts of a step, too (step)");
ABSL_FLAG(std::vector<std::string>, tokens, {}, "tokens of a batch (linears)");
ABSL_FLAG(bool, peer, true, "time the machine's library, too (linears)");
ABSL_FLAG(double, seconds, 1.0, "least time per case");
ABSL_FLAG(bool, json, false, "print JSON");
ABSL_FLAG(std::string, out, "", "write the JSON to this file");

namespace mobi {
namespace {

using Json = nlohmann::json;

constexpr char kUsage[] =
    "mobi-bench step|linears|surface [flags]\n"
    "  step     whole steps by part, beside the time that their bytes take\n"
    "  linears  sliced matmuls beside OpenBLAS (CPU) or cuBLAS (CUDA)\n"
    "  surface  step latency over bits and tokens, for mobi-server's controller\n";

// Numbers of a flag, or what it is without one.
template <typename T, typename Parse>
absl::StatusOr<std::vector<T>> Numbers(const std::vector<std::string>& words,
                                       std::vector<T> otherwise, const char* flag, T low, T high,
                                       Parse parse) {
  if (words.empty()) return otherwise;
  std::vector<T> numbers;
  for (const std::string& word : words) {
    T value;
    if (!parse(word, &value) || !(value >= low && value <= high)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag, ": \"", word, "\" is not a number from ", low, " to ", high));
    }
    numbers.push_back(value);
  }
  return numbers;
}

absl::StatusOr<std::vector<int>> Counts(const std::vector<std::string>& words,
                                        std::vector<int> otherwise, const char* flag) {
  return Numbers<int>(words, std::move(otherwise), flag, 1, 8192,
                      [](const std::string& s, int* v) { return absl::SimpleAtoi(s, v); });
}

absl::StatusOr<std::vector<float>> Bits(std::vector<float> otherwise) {
  return Numbers<float>(absl::GetFlag(FLAGS_bits), std::move(otherwise), "bits", 2, 8,
                        [](const std::string& s, float* v) { return absl::SimpleAtof(s, v); });
}

// A float folder lends its shape.
absl::StatusOr<std::unique_ptr<WeightSource>> OpenModel(const std::string& model, int layers) {
  absl::StatusOr<ModelConfig> config = ConfigOfShape(model);
  std::string name = model;
  if (!config.ok()) {
    absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(model, {});
    if (!checkpoint.ok()) {
      return absl::NotFoundError(absl::StrCat(config.status().message(),
                                              ", nor a folder: ", checkpoint.status().message()));
    }
    if (checkpoint->quantized() && layers == 0) {
      return std::make_unique<Checkpoint>(*std::move(checkpoint));
    }
    config = checkpoint->config();
    name += " (its shape, synthetic weights)";
  }
  if (layers > 0) {
    config->num_hidden_layers = layers;
    absl::StrAppend(&name, ", ", layers, " layers");
  }
  const SyntheticOptions options{.lm_head_min_level = absl::GetFlag(FLAGS_lm_head_min_level)};
  if (options.lm_head_min_level < 0 || options.lm_head_min_level > kNumLevels) {
    return absl::InvalidArgumentError(
        absl::StrCat("--lm_head_min_level: ", options.lm_head_min_level, " is not in 0..4"));
  }
  if (options.lm_head_min_level > 0) absl::StrAppend(&name, ", lm_head in slices");
  MOBI_ASSIGN_OR_RETURN(SyntheticWeights weights, SyntheticWeights::Create(name, *config, options));
  return std::make_unique<SyntheticWeights>(std::move(weights));
}

absl::StatusOr<double> ReadBytesPerSecond(bool on_cpu, int threads) {
  if (on_cpu) {
    MachinePeak peak(threads);
    std::vector<TimedCase> cases(1);
    cases[0].run = [&] { peak.RunRead(); };
    TimeInTurns(0.5, cases);
    return peak.read_bytes() / cases[0].best_s;
  }
#ifdef MOBI_WITH_CUDA
  return CudaReadBytesPerSecond();
#else
  return absl::UnavailableError("this build has no CUDA");
#endif
}

absl::StatusOr<StepCommandOptions> StepOptions(bool on_cpu) {
  StepCommandOptions options;
  options.context = absl::GetFlag(FLAGS_context);
  options.chunk = absl::GetFlag(FLAGS_chunk);
  options.decodes = absl::GetFlag(FLAGS_decodes);
  options.whole_level_prompts = absl::GetFlag(FLAGS_whole_level_prompts);
  options.whole_level_decodes = absl::GetFlag(FLAGS_whole_level_decodes);
  const std::string routing = absl::GetFlag(FLAGS_routing);
  if (!routing.empty() && routing != "token" && routing != "coherent") {
    return absl::InvalidArgumentError(
        absl::StrCat("--routing: \"", routing, "\" is neither token nor coherent"));
  }
  options.coherent = routing.empty() ? !on_cpu : routing == "coherent";
  options.parts = absl::GetFlag(FLAGS_parts);
  options.print = !absl::GetFlag(FLAGS_json);
  options.seconds = absl::GetFlag(FLAGS_seconds);
  return options;
}

absl::StatusOr<Json> RunCommand(const std::string& command, const Model& model,
                                const WeightSource& source, PartsBackend& backend) {
  const bool on_cpu = backend.name() == "cpu";
  const int flag = absl::GetFlag(FLAGS_threads);
  const int threads = flag > 0 ? flag : NumUsableCores();
  Json out = {{"device", backend.description()}, {"model", source.name()}};
  if (command == "linears") {
    LinearsCommandOptions linears;
    MOBI_ASSIGN_OR_RETURN(linears.tokens,
                          Counts(absl::GetFlag(FLAGS_tokens), {1, 4, 16, 64, 512}, "tokens"));
    linears.peer = absl::GetFlag(FLAGS_peer);
    linears.threads = threads;
    linears.print = !absl::GetFlag(FLAGS_json);
    linears.seconds = absl::GetFlag(FLAGS_seconds);
    MOBI_ASSIGN_OR_RETURN(out["linears"], TimeLinears(model, linears));
    return out;
  }
  MOBI_ASSIGN_OR_RETURN(StepCommandOptions step, StepOptions(on_cpu));
  out["context"] = step.context;
  out["routing"] = step.coherent ? "coherent" : "token";
  const std::vector<std::string> sequences = absl::GetFlag(FLAGS_sequences);
  if (command == "surface") {
    MOBI_ASSIGN_OR_RETURN(step.bits, Bits({2, 2.25f, 3, 4, 5, 6, 7.75f, 8}));
    MOBI_ASSIGN_OR_RETURN(step.sequences, Counts(sequences, {1, 2, 4, 8, 16, 32, 64}, "sequences"));
    MOBI_ASSIGN_OR_RETURN(out["points"], TimeSurface(model, source, step));
    return out;
  }
  MOBI_ASSIGN_OR_RETURN(step.bits, Bits({2, 3, 4, 8}));
  MOBI_ASSIGN_OR_RETURN(step.sequences, Counts(sequences, {1, 16}, "sequences"));
  MOBI_ASSIGN_OR_RETURN(step.bytes_per_second, ReadBytesPerSecond(on_cpu, threads));
  if (step.print) std::printf("read     %.1f GB/s\n", step.bytes_per_second / 1e9);
  out["read_gigabytes_per_second"] = step.bytes_per_second / 1e9;
  MOBI_ASSIGN_OR_RETURN(out["steps"], TimeSteps(model, source, backend, step));
  return out;
}

absl::Status Run(const std::vector<std::string>& arguments) {
  if (arguments.size() != 1 ||
      (arguments[0] != "step" && arguments[0] != "linears" && arguments[0] != "surface")) {
    return absl::InvalidArgumentError("give one of step, linears and surface (--help tells more)");
  }
  const std::string path = absl::GetFlag(FLAGS_out);
  std::ofstream file;
  if (!path.empty()) {
    file.open(path);
    if (!file) return absl::InvalidArgumentError(absl::StrCat("--out: cannot write ", path));
  }
  MOBI_ASSIGN_OR_RETURN(const std::unique_ptr<WeightSource> source,
                        OpenModel(absl::GetFlag(FLAGS_model), absl::GetFlag(FLAGS_layers)));
  MOBI_ASSIGN_OR_RETURN(std::unique_ptr<Backend> inner,
                        CreateBackend(absl::GetFlag(FLAGS_device), absl::GetFlag(FLAGS_threads)));
  PartsBackend backend(std::move(inner), source->config().vocab_size);
  if (!absl::GetFlag(FLAGS_json)) {
    std::printf("model    %s\ndevice   %s\n", source->name().c_str(),
                backend.description().c_str());
    std::fflush(stdout);
  }
  MOBI_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model,
                        Model::Load(*source, backend, absl::GetFlag(FLAGS_context)));
  MOBI_ASSIGN_OR_RETURN(const Json result, RunCommand(arguments[0], *model, *source, backend));
  if (absl::GetFlag(FLAGS_json)) std::printf("%s\n", result.dump(2).c_str());
  if (path.empty()) return absl::OkStatus();
  file << result.dump(2) << "\n";
  file.close();
  return file ? absl::OkStatus() : absl::DataLossError(absl::StrCat(path, ": not all written"));
}

}  // namespace
}  // namespace mobi

int main(int argc, char** argv) {
  if (mobi::PrintedHelp(argc, argv, mobi::kUsage, __FILE__)) return 0;
  const auto arguments = mobi::ParseFlags(argc, argv, __FILE__);
  const absl::Status status = arguments.ok() ? mobi::Run(*arguments) : arguments.status();
  if (status.ok()) return 0;
  std::fprintf(stderr, "mobi-bench: %s\n", std::string(status.message()).c_str());
  return absl::IsInternal(status) ? mobi::kExitFailure : mobi::kExitUsage;
}
