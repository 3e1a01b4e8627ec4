// mobi-server: serves one model over gRPC until it is told to stop.
#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "absl/flags/flag.h"
#include "absl/strings/str_format.h"
#include "engine/base/clock.h"
#include "engine/base/flags.h"
#include "engine/base/status_macros.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "server/load_model.h"
#include "server/mobi_server.h"
#include "server/transport.h"
#include "server/version.h"

ABSL_FLAG(std::string, model, "", "Model folder: a MoBiQuant checkpoint, or a float Llama.");
ABSL_FLAG(std::string, served_model_name, "", "Name that clients see; empty: the folder's.");
ABSL_FLAG(bool, verify_manifest, true,
          "Compare every file with MANIFEST's SHA-256 before serving.");
ABSL_FLAG(
    bool, direct_io, false,
    "Read weights past the page cache where they are not in it: half the memory touched, but the "
    "next start, and slices that come back, read the disk again.");
ABSL_FLAG(std::string, device, "cpu", "cpu, cuda or auto.");
ABSL_FLAG(int, threads, 0, "CPU threads; 0: one per core.");
ABSL_FLAG(std::string, listen, "0.0.0.0:50051", "Address for applications.");
ABSL_FLAG(std::string, admin_listen, "127.0.0.1:50052", "Address for operators.");
ABSL_FLAG(std::string, metrics_listen, "127.0.0.1:9400", "Address of /metrics.");
ABSL_FLAG(std::string, tls_cert, "", "PEM file, chain of this server's certificate; turns TLS on.");
ABSL_FLAG(std::string, tls_key, "", "PEM file of its key. TLS files are followed while serving.");
ABSL_FLAG(std::string, tls_client_ca, "", "PEM file of the clients' authorities; turns mTLS on.");
ABSL_FLAG(std::string, token_file, "",
          "File of bearer tokens, by line: NAME SCOPES SHA256, scopes generate and admin; followed "
          "while serving. Empty: no token is needed.");
ABSL_FLAG(std::string, policy, "", "Policy file (YAML), followed while serving.");
ABSL_FLAG(std::string, prometheus_url, "", "Prometheus server that promql signals are asked of.");
ABSL_FLAG(std::string, surface, "", "What mobi-bench surface measured: step latency by bits.");
ABSL_FLAG(double, measure_surface_s, 0,
          "Measure it before serving instead, in about so many seconds; 0: not.");
ABSL_FLAG(float, target_bits, 8, "Average bits per weight to serve at without a policy, 2 to 8.");
ABSL_FLAG(int, max_num_seqs, 64, "Sequences in one step.");
ABSL_FLAG(int, max_num_batched_tokens, 512, "Tokens in one step; long prompts are cut to fit.");
ABSL_FLAG(int, max_model_len, 0, "Context length; 0: the model's.");
ABSL_FLAG(int, block_size, 16, "Tokens in one KV block.");
ABSL_FLAG(int, kv_memory_mib, 256, "Memory for the KV cache.");
ABSL_FLAG(bool, slice_residency, true,
          "The highest slices leave memory while KV blocks are short, as far as floors allow.");
ABSL_FLAG(int, resident_slices, 2, "Slices of 2 bits that never leave, 1 to 4.");
ABSL_FLAG(double, residency_dwell_s, 10, "Least time between two changes of what is in memory.");
ABSL_FLAG(bool, coherent_decode, false, "Decodes of a step share levels; for GPUs.");
ABSL_FLAG(bool, whole_level_prompts, false,
          "Prompts read one level everywhere, the lowest with the bits asked for; for GPUs.");
ABSL_FLAG(bool, whole_level_decodes, false, "The same of decodes; for GPUs.");
ABSL_FLAG(int, max_waiting_requests, 256, "Queue length; beyond it RESOURCE_EXHAUSTED.");
ABSL_FLAG(int, max_waiting_tokens, 1 << 18, "Prompt tokens in the queue.");
ABSL_FLAG(double, max_expected_wait_s, 2, "Refuse at once what would wait longer.");
ABSL_FLAG(double, max_queue_wait_s, 10, "Longest wait in the queue.");
ABSL_FLAG(float, max_decode_slowdown, 1.75,
          "Prompts slow running streams by this at most; 1: any.");
ABSL_FLAG(double, drain_grace_s, 45, "Time for running requests after SIGTERM.");
ABSL_FLAG(bool, version, false, "Print the version and exit.");

namespace {

using namespace mobi;

constexpr char kUsage[] =
    "mobi-server --model DIR [flags]\n"
    "Serves a model over gRPC. Every flag may also be given as an environment variable, for "
    "example\n"
    "MOBI_TARGET_BITS=4. Stops on SIGTERM or SIGINT after running requests have ended; SIGHUP\n"
    "reloads the policy.\n";

// So long the last statuses have to leave the machine.
constexpr Duration kLastWords = std::chrono::milliseconds(50);

int Fail(int code, const absl::Status& status) {
  std::fprintf(stderr, "mobi-server: %s\n", std::string(status.message()).c_str());
  return code;
}

double ToMiB(size_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

Duration Seconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

LoadOptions LoadOptionsFromFlags() {
  LoadOptions options;
  options.dir = absl::GetFlag(FLAGS_model);
  options.name = absl::GetFlag(FLAGS_served_model_name);
  options.verify_manifest = absl::GetFlag(FLAGS_verify_manifest);
  options.direct_io = absl::GetFlag(FLAGS_direct_io);
  options.device = absl::GetFlag(FLAGS_device);
  options.threads = absl::GetFlag(FLAGS_threads);
  EngineOptions& engine = options.engine;
  engine.max_num_seqs = absl::GetFlag(FLAGS_max_num_seqs);
  engine.max_num_batched_tokens = absl::GetFlag(FLAGS_max_num_batched_tokens);
  engine.max_model_len = absl::GetFlag(FLAGS_max_model_len);
  engine.block_size = absl::GetFlag(FLAGS_block_size);
  engine.kv_memory_bytes = size_t{1} << 20;
  engine.kv_memory_bytes *= static_cast<size_t>(absl::GetFlag(FLAGS_kv_memory_mib));
  engine.residency.enabled = absl::GetFlag(FLAGS_slice_residency);
  engine.residency.min_levels = absl::GetFlag(FLAGS_resident_slices);
  engine.residency.dwell = Seconds(absl::GetFlag(FLAGS_residency_dwell_s));
  engine.coherent_decode = absl::GetFlag(FLAGS_coherent_decode);
  engine.whole_level_prompts = absl::GetFlag(FLAGS_whole_level_prompts);
  engine.whole_level_decodes = absl::GetFlag(FLAGS_whole_level_decodes);
  engine.max_waiting_requests = absl::GetFlag(FLAGS_max_waiting_requests);
  engine.max_waiting_tokens = absl::GetFlag(FLAGS_max_waiting_tokens);
  engine.max_expected_wait = Seconds(absl::GetFlag(FLAGS_max_expected_wait_s));
  engine.max_decode_slowdown = absl::GetFlag(FLAGS_max_decode_slowdown);
  engine.max_queue_wait = Seconds(absl::GetFlag(FLAGS_max_queue_wait_s));
  options.surface_limit = Seconds(absl::GetFlag(FLAGS_measure_surface_s));
  return options;
}

absl::StatusOr<ServerOptions> ServerOptionsFromFlags() {
  ServerOptions options;
  options.prometheus_url = absl::GetFlag(FLAGS_prometheus_url);
  if (const std::string path = absl::GetFlag(FLAGS_surface); !path.empty()) {
    MOBI_ASSIGN_OR_RETURN(options.controller.surface, StepSurface::Load(path));
  }
  options.listen = absl::GetFlag(FLAGS_listen);
  options.admin_listen = absl::GetFlag(FLAGS_admin_listen);
  options.metrics_listen = absl::GetFlag(FLAGS_metrics_listen);
  options.tls = {absl::GetFlag(FLAGS_tls_cert), absl::GetFlag(FLAGS_tls_key),
                 absl::GetFlag(FLAGS_tls_client_ca)};
  options.token_file = absl::GetFlag(FLAGS_token_file);
  options.drain_grace = Seconds(absl::GetFlag(FLAGS_drain_grace_s));
  return options;
}

absl::StatusOr<LoadedPolicy> PolicyOfFlags() {
  const std::string path = absl::GetFlag(FLAGS_policy);
  if (path.empty()) return PolicyFromFlags(absl::GetFlag(FLAGS_target_bits));
  MOBI_ASSIGN_OR_RETURN(PolicyText text, ReadPolicyFile(path));
  return LoadedPolicy{std::move(text.policy), std::move(text.yaml), path};
}

// One line for the first flag out of range.
absl::Status CheckFlags() {
  if (absl::GetFlag(FLAGS_model).empty()) {
    return absl::InvalidArgumentError("--model: needs a model folder, see --help");
  }
  if (absl::GetFlag(FLAGS_tls_cert).empty() != absl::GetFlag(FLAGS_tls_key).empty()) {
    return absl::InvalidArgumentError("--tls_cert and --tls_key: one needs the other");
  }
  if (!absl::GetFlag(FLAGS_tls_client_ca).empty() && absl::GetFlag(FLAGS_tls_cert).empty()) {
    return absl::InvalidArgumentError("--tls_client_ca: needs --tls_cert and --tls_key");
  }
  const std::pair<const char*, double> positive[] = {
      {"max_num_seqs", absl::GetFlag(FLAGS_max_num_seqs)},
      {"max_num_batched_tokens", absl::GetFlag(FLAGS_max_num_batched_tokens)},
      {"block_size", absl::GetFlag(FLAGS_block_size)},
      {"kv_memory_mib", absl::GetFlag(FLAGS_kv_memory_mib)},
      {"max_waiting_requests", absl::GetFlag(FLAGS_max_waiting_requests)},
      {"max_waiting_tokens", absl::GetFlag(FLAGS_max_waiting_tokens)},
      {"max_expected_wait_s", absl::GetFlag(FLAGS_max_expected_wait_s)},
      {"max_decode_slowdown", absl::GetFlag(FLAGS_max_decode_slowdown)},
      {"residency_dwell_s", absl::GetFlag(FLAGS_residency_dwell_s)},
      {"max_queue_wait_s", absl::GetFlag(FLAGS_max_queue_wait_s)},
  };
  for (const auto& [name, value] : positive) {
    if (value > 0) continue;
    return absl::InvalidArgumentError(absl::StrFormat("--%s: %g is not above 0", name, value));
  }
  for (const auto& [name, value] :
       {std::pair{"threads", absl::GetFlag(FLAGS_threads)},
        std::pair{"max_model_len", absl::GetFlag(FLAGS_max_model_len)}}) {
    if (value >= 0) continue;
    return absl::InvalidArgumentError(absl::StrFormat("--%s: %d is below 0", name, value));
  }
  const double measuring = absl::GetFlag(FLAGS_measure_surface_s);
  if (!(measuring >= 0 && measuring <= 600)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--measure_surface_s: %g is out of range [0, 600]", measuring));
  }
  if (measuring > 0 && !absl::GetFlag(FLAGS_surface).empty()) {
    return absl::InvalidArgumentError("--surface and --measure_surface_s: one or the other");
  }
  if (!(absl::GetFlag(FLAGS_drain_grace_s) >= 0)) {
    return absl::InvalidArgumentError("--drain_grace_s: is below 0");
  }
  if (const int slices = absl::GetFlag(FLAGS_resident_slices); slices < 1 || slices > kNumSlices) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--resident_slices: %d is out of range [1, %d]", slices, kNumSlices));
  }
  const float bits = absl::GetFlag(FLAGS_target_bits);
  if (!(bits >= kLowestBits && bits <= kHighestBits)) {
    return absl::InvalidArgumentError(absl::StrFormat("--target_bits: %g is out of range [%g, %g]",
                                                      bits, kLowestBits, kHighestBits));
  }
  return absl::OkStatus();
}

// One line a second while weights are read, checked and moved to the device.
class ProgressLines {
 public:
  explicit ProgressLines(const Clock& clock) : clock_(clock), last_(clock.Now()) {}

  void On(uint64_t bytes, uint64_t of) {
    const TimePoint now = clock_.Now();
    if (now - last_ < std::chrono::seconds(1)) return;
    last_ = now;
    std::printf("loading  %.0f%% of %.2f GB\n",
                100.0 * static_cast<double>(bytes) / static_cast<double>(of),
                static_cast<double>(of) * 1e-9);
    std::fflush(stdout);
  }

 private:
  const Clock& clock_;
  TimePoint last_;
};

void Announce(const ServedModel& model, const ServerOptions& options, double seconds,
              const std::string& program) {
  const ModelInfo& info = model.info;
  const EngineStats stats = model.engine->stats();
  const std::string bits =
      info.elastic ? absl::StrFormat("2 to 8 bits, serving at %g", absl::GetFlag(FLAGS_target_bits))
                   : "float, one precision";
  std::printf("model    %s: %.1fM parameters, %s, context %d, %s\n", info.name.c_str(),
              static_cast<double>(info.num_parameters) * 1e-6, bits.c_str(),
              model.engine->max_model_len(), model.chat_template.ok() ? "text and chat" : "text");
  if (!model.chat_template.ok()) {
    std::printf("no chat  %s\n", std::string(model.chat_template.status().message()).c_str());
  }
  std::printf("device   %s: %s\n", info.backend.c_str(), info.device.c_str());
  const int block_size = info.engine_options.block_size;
  const size_t kv_bytes =
      stats.num_kv_blocks *
      KvCache::BlockBytes(info.config, block_size, model.backend->activation_dtype());
  std::printf("memory   %.1f MiB weights, %.1f MiB in %d KV blocks of %d tokens, %.1f MiB free\n",
              ToMiB(model.model->weight_bytes()), ToMiB(kv_bytes), stats.num_kv_blocks, block_size,
              ToMiB(model.backend->memory().free));
  const absl::Status& can_drop = model.model->slice_planes().can_drop();
  if (info.elastic && info.engine_options.residency.enabled && !can_drop.ok()) {
    std::printf("slices   stay in memory: %s\n", std::string(can_drop.message()).c_str());
  }
  if (info.surface) {
    std::printf("surface  one sequence takes %.3g ms at 2 bits, %.3g ms at 4, %.3g ms at 8\n",
                info.surface->StepMs(2, 1), info.surface->StepMs(4, 1), info.surface->StepMs(8, 1));
  }
  std::printf("ports    data %s, admin %s, metrics http://%s/metrics\n", options.listen.c_str(),
              options.admin_listen.c_str(), options.metrics_listen.c_str());
  std::printf("access   %s, %s\n",
              !options.tls.client_ca.empty() ? "mutual TLS"
              : options.tls.enabled()        ? "TLS"
                                             : "plain text",
              options.token_file.empty() ? "no token needed" : "bearer tokens");
  const std::string mobictl = (std::filesystem::path(program).parent_path() / "mobictl").string();
  std::printf("ready after %.1f s. In another terminal:\n", seconds);
  std::printf("  %s generate \"Once upon a time\" --max-new-tokens 64\n", mobictl.c_str());
  std::fflush(stdout);
}

// Waits for SIGTERM, SIGINT or a failed device.
void WaitForTheEnd(MobiServer& server, const sigset_t& signals) {
  const timespec patience{.tv_sec = 0, .tv_nsec = 200'000'000};
  while (!server.failed()) {
    const int signal = sigtimedwait(&signals, nullptr, &patience);
    if (signal == SIGTERM || signal == SIGINT) return;
    if (signal == SIGHUP) server.ReloadPolicy();
  }
}

int Serve(const std::string& program) {
  if (auto status = CheckFlags(); !status.ok()) return Fail(kExitUsage, status);
  // Before any thread exists, so that all of them inherit the mask.
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&signals, signal);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  const RealClock clock;
  const TimePoint start = clock.Now();
  const LoadOptions load = LoadOptionsFromFlags();
  auto policy = PolicyOfFlags();
  if (!policy.ok()) return Fail(kExitUsage, policy.status());
  const auto server_options = ServerOptionsFromFlags();
  if (!server_options.ok()) return Fail(kExitUsage, server_options.status());
  const ServerOptions& options = *server_options;
  auto opened = OpenModel(load);
  if (!opened.ok()) return Fail(kExitUsage, opened.status());

  EnableTransportPlugins();
  auto server = MobiServer::Start(options, *policy, clock);
  if (!server.ok()) {
    return Fail(absl::IsUnavailable(server.status()) ? kExitFailure : kExitUsage, server.status());
  }
  if (const std::string path = absl::GetFlag(FLAGS_policy); !path.empty()) {
    auto status = (*server)->WatchPolicy(path, policy->yaml);
    if (!status.ok()) return Fail(kExitFailure, status);
  }
  std::printf("mobi-server %s loads %s\n", kServerVersion, load.dir.c_str());
  std::fflush(stdout);
  ProgressLines lines(clock);
  auto model = LoadModel(load, *std::move(opened), clock,
                         [&](uint64_t bytes, uint64_t of) { lines.On(bytes, of); });
  if (!model.ok()) {
    return Fail(absl::IsInternal(model.status()) ? kExitFailure : kExitUsage, model.status());
  }
  const ServedModel& served = **model;
  (*server)->Serve(*std::move(model));
  Announce(served, options, ToSeconds(clock.Now() - start), program);

  WaitForTheEnd(**server, signals);
  if ((*server)->failed()) return Fail(kExitFailure, absl::InternalError("the device has failed"));
  std::printf("stopping, %d requests may take %g s; a second signal ends them\n",
              (*server)->running_requests(), absl::GetFlag(FLAGS_drain_grace_s));
  std::fflush(stdout);
  // A second signal has its default effect.
  sigdelset(&signals, SIGHUP);
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
  (*server)->Drain();
  std::this_thread::sleep_for(kLastWords);
  // Without destructors: see MobiServer::Drain.
  std::_Exit(0);
}

}  // namespace

int main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);  // its errors reach us as statuses
  if (PrintedHelp(argc, argv, kUsage, __FILE__)) return 0;
  const auto arguments = ParseFlags(argc, argv, __FILE__, "MOBI_");
  if (!arguments.ok()) return Fail(kExitUsage, arguments.status());
  if (absl::GetFlag(FLAGS_version)) {
    std::printf("mobi-server %s\n", kServerVersion);
    return 0;
  }
  if (!arguments->empty()) {
    return Fail(kExitUsage,
                absl::InvalidArgumentError("unexpected argument " + arguments->front()));
  }
  return Serve(argv[0]);
}
