// serving-bench: the figures of a server under load, each a ratio within one run. Server and
// clients talk over loopback; where the server's own CPU or memory is measured, the clients are
// another process of this program.
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <random>
#include <thread>

#include "absl/flags/flag.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/flags.h"
#include "engine/base/status_macros.h"
#include "server/client.h"
#include "server/load_model.h"
#include "server/loadgen/load_test.h"
#include "server/mobi_server.h"
#include "server/rpc_status.h"
#include "server/transport.h"
#include "tests/engine/test_models.h"
#include "tests/server/server_fixture.h"

ABSL_FLAG(std::string, model, "deploy/demo/checkpoint", "Model folder to serve.");
ABSL_FLAG(std::string, server, "", "Server to measure instead of one of our own.");
ABSL_FLAG(std::string, sections, "long_prompt,overload,prefix,overhead,streams,cancels",
          "What to measure.");
ABSL_FLAG(int, rounds, 6, "Repetitions of what is short.");
ABSL_FLAG(int, cancels, 100000, "Requests of the section cancels.");
ABSL_FLAG(std::string, client, "", "Internal: ADDRESS that this process is a client of.");
ABSL_FLAG(std::string, client_mode, "", "Internal: streams, or cancels.");
ABSL_FLAG(int, client_count, 0, "Internal: streams or requests of the client.");
ABSL_FLAG(int, client_tokens, 0, "Internal: tokens of each stream.");

extern char** environ;

namespace {

using namespace mobi;
using std::chrono::milliseconds;
using std::chrono::seconds;

// A model served on loopback by this process.
class Served {
 public:
  static absl::StatusOr<std::unique_ptr<Served>> Open(const std::string& dir) {
    LoadOptions load;
    load.dir = dir;
    std::unique_ptr<Served> served(new Served());
    MOBI_ASSIGN_OR_RETURN(auto opened, OpenModel(load));
    MOBI_ASSIGN_OR_RETURN(auto model, LoadModel(load, std::move(opened), served->clock_, nullptr));
    served->engine_ = model->engine.get();
    served->vocab_size_ = model->info.config.vocab_size;
    MOBI_ASSIGN_OR_RETURN(served->server_, MobiServer::Start(TestServerOptions(),
                                                             PolicyFromFlags(8), served->clock_));
    served->server_->Serve(std::move(model));
    served->address_ = absl::StrCat("127.0.0.1:", served->server_->data_port());
    return served;
  }

  // Somebody else's server.
  static absl::StatusOr<std::unique_ptr<Served>> At(const std::string& address) {
    grpc::ClientContext context;
    v1::GetModelResponse model;
    const auto stub = v1::Inference::NewStub(Connect(address));
    MOBI_RETURN_IF_ERROR(FromGrpcStatus(stub->GetModel(&context, {}, &model)));
    std::unique_ptr<Served> served(new Served());
    served->address_ = address;
    served->vocab_size_ = model.architecture().vocab_size();
    return served;
  }

  const std::string& address() const { return address_; }
  Engine& engine() { return *engine_; }

  // Each run has prompts of its own, so nothing is cached from the last.
  std::vector<Outcome> Run(const std::vector<Arrival>& arrivals, int shared_prefix_tokens = 0) {
    const Prompts prompts(
        {.vocab_size = vocab_size_, .shared_prefix_tokens = shared_prefix_tokens, .seed = ++runs_});
    LoadTest test(
        {}, [this] { return Connect(address()); }, prompts, clock_);
    return test.Run(arrivals, clock_.Now() + milliseconds(20));
  }

 private:
  RealClock clock_;
  Engine* engine_ = nullptr;
  std::string address_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;  // kept from run to run
  int vocab_size_ = 0;
  uint64_t runs_ = static_cast<uint64_t>(getpid()) << 20;
  std::unique_ptr<MobiServer> server_;
};

double Median(std::vector<double> values) { return PercentilesOf(std::move(values)).p50; }

// Gaps of the first `streams` outcomes that ended in [begin, end).
std::vector<double> GapsWithin(const std::vector<Outcome>& outcomes, int streams, Duration begin,
                               Duration end) {
  std::vector<double> gaps;
  for (int i = 0; i < streams; ++i) {
    double at = ToMillis(outcomes[i].arrival.at + outcomes[i].ttft);
    for (const float gap : outcomes[i].gaps_ms) {
      at += gap;
      if (at >= ToMillis(begin) && at < ToMillis(end)) gaps.push_back(gap);
    }
  }
  return gaps;
}

// Eight streams, and in every second round a long prompt beside them. Counts only the gaps while
// the long prompt is read, and the same time of the round without it.
absl::Status LongPrompt(Served& served) {
  constexpr int kStreams = 8;
  std::vector<double> alone_p99, beside_p99, ratios, alone_p50, beside_p50, ttft;
  for (int round = 0; round < absl::GetFlag(FLAGS_rounds); ++round) {
    std::vector<Arrival> arrivals(kStreams,
                                  Arrival{.at = {}, .prompt_tokens = 16, .new_tokens = 900});
    const auto company = Arrival{.at = milliseconds(500), .prompt_tokens = 1000, .new_tokens = 1};
    arrivals.push_back(company);
    const auto with = served.Run(arrivals);
    arrivals.pop_back();
    const auto without = served.Run(arrivals);
    const Duration read = company.at + with.back().ttft;
    const auto beside = PercentilesOf(GapsWithin(with, kStreams, company.at, read));
    const auto alone = PercentilesOf(GapsWithin(without, kStreams, company.at, read));
    ttft.push_back(ToMillis(with.back().ttft));
    alone_p50.push_back(alone.p50);
    beside_p50.push_back(beside.p50);
    alone_p99.push_back(alone.p99);
    beside_p99.push_back(beside.p99);
    ratios.push_back(beside.p99 / alone.p99);
  }
  std::printf(
      "long_prompt: 1000 tokens beside 8 streams: inter-token p99 %.2f ms, without %.2f ms, ratio "
      "%.2f (medians of %zu rounds; ratios %.2f to %.2f); p50 %.2f ms, without %.2f ms; first "
      "token "
      "of the prompt %.0f ms\n",
      Median(beside_p99), Median(alone_p99), Median(ratios), ratios.size(),
      *std::min_element(ratios.begin(), ratios.end()),
      *std::max_element(ratios.begin(), ratios.end()), Median(beside_p50), Median(alone_p50),
      Median(ttft));
  return absl::OkStatus();
}

absl::Status Overload(Served& served) {
  const TokenRange prompt{64, 64}, completion{64, 64};
  Slo slo;
  slo.ttft = seconds(3);
  const auto flood =
      PoissonArrivals(std::vector<RatePhase>{{200, seconds(8)}}, prompt, completion, 1);
  const double capacity =
      MakeReport(served.Run(flood), {}, {"", seconds(3), seconds(8)}, slo).completed_rps;
  const std::vector<RatePhase> phases = {{0.6 * capacity, seconds(6)},
                                         {1.1 * capacity, seconds(10)},
                                         {10 * capacity, seconds(15)},
                                         {0.6 * capacity, seconds(10)}};
  const auto outcomes = served.Run(PoissonArrivals(phases, prompt, completion, 2));
  Duration begin{};
  std::vector<LoadReport> reports;
  for (const RatePhase& phase : phases) {
    // The first two seconds are the way there.
    reports.push_back(
        MakeReport(outcomes, {}, {"", begin + seconds(2), begin + phase.duration}, slo));
    begin += phase.duration;
  }
  const Duration calm = begin - phases.back().duration;
  // Recovered once no second is left whose median first token takes over half a second.
  int recovered = 0;
  for (int second = 0; second < static_cast<int>(ToSeconds(begin - calm)); ++second) {
    const Stretch stretch{"", calm + seconds(second), calm + seconds(second + 1)};
    if (MakeReport(outcomes, {}, stretch, slo).ttft_ms.p50 > 500) recovered = second + 1;
  }
  const double peak = std::max(reports[0].goodput_rps, reports[1].goodput_rps);
  std::printf(
      "overload: capacity %.1f requests/s (64 + 64 tokens); goodput (first token within 3 s) at "
      "0.6 "
      "x %.1f, at 1.1 x %.1f, at 10 x %.1f = %.0f %% of the peak; refusals at 10 x: p50 %.1f ms, "
      "p99 "
      "%.1f ms, max %.1f ms of %d; the median first token is below 500 ms "
      "again %d s after the overload\n",
      capacity, reports[0].goodput_rps, reports[1].goodput_rps, reports[2].goodput_rps,
      100 * reports[2].goodput_rps / peak, reports[2].refusal_ms.p50, reports[2].refusal_ms.p99,
      reports[2].refusal_ms.max, static_cast<int>(reports[2].refusal_ms.count), recovered);
  return absl::OkStatus();
}

absl::Status Prefix(Served& served) {
  std::vector<double> ratios, first, second;
  for (int round = 0; round < absl::GetFlag(FLAGS_rounds); ++round) {
    const std::vector<Arrival> arrivals = {
        {.at = {}, .prompt_tokens = 528, .new_tokens = 1},
        {.at = milliseconds(1500), .prompt_tokens = 528, .new_tokens = 1}};
    const auto outcomes = served.Run(arrivals, 512);
    first.push_back(ToMillis(outcomes[0].ttft));
    second.push_back(ToMillis(outcomes[1].ttft));
    ratios.push_back(second.back() / first.back());
    if (outcomes[1].cached_tokens != 512) {
      return absl::InternalError(absl::StrCat("cached ", outcomes[1].cached_tokens, " of 512"));
    }
  }
  std::printf(
      "prefix: first token %.1f ms, with 512 of 528 tokens cached %.1f ms, ratio %.3f "
      "(medians of %zu rounds)\n",
      Median(first), Median(second), Median(ratios), ratios.size());
  return absl::OkStatus();
}

double CpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

double ResidentKib() {
  std::ifstream file("/proc/self/statm");
  double pages = 0, resident = 0;
  file >> pages >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1024;
}

// This program again, as a client.
pid_t SpawnClient(const std::string& address, const std::string& mode, int count, int tokens) {
  std::vector<std::string> arguments = {
      "serving-bench", "--client=" + address, "--client_mode=" + mode,
      absl::StrCat("--client_count=", count), absl::StrCat("--client_tokens=", tokens)};
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_t child = 0;
  if (posix_spawn(&child, "/proc/self/exe", nullptr, nullptr, argv.data(), environ) != 0) return -1;
  return child;
}

absl::Status WaitForClient(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? absl::OkStatus()
                                                       : absl::InternalError("the client failed");
}

// Tokens without end, from an engine that costs nothing.
ScriptedEngine::Options Endless(Duration step_time, bool paused) {
  ScriptedEngine::Options options;
  options.script = [](const GenerationRequest& request, int) {
    return std::vector<int32_t>(request.max_new_tokens + 1, 65);
  };
  options.step_time = step_time;
  options.paused = paused;
  return options;
}

// What the engine's thread does between steps (scheduling, detokenizing, handing over), while
// gRPC's threads take cores from it.
absl::Status BetweenSteps(Served& served) {
  constexpr int kStreams = 8;
  std::vector<double> shares, micros, steps_ms;
  for (int round = 0; round < absl::GetFlag(FLAGS_rounds); ++round) {
    std::thread load([&] {
      served.Run(std::vector<Arrival>(kStreams,
                                      Arrival{.at = {}, .prompt_tokens = 16, .new_tokens = 900}));
    });
    const auto generated = [&] { return served.engine().stats().generation_tokens; };
    const uint64_t start = generated();
    while (generated() < start + 100 * kStreams) std::this_thread::sleep_for(milliseconds(1));
    const EngineStats before = served.engine().stats();
    const auto begin = std::chrono::steady_clock::now();
    while (generated() < start + 800 * kStreams) std::this_thread::sleep_for(milliseconds(1));
    const double wall = ToSeconds(std::chrono::steady_clock::now() - begin);
    const EngineStats after = served.engine().stats();
    load.join();
    const double in_steps = after.step_seconds_sum - before.step_seconds_sum;
    const auto steps = static_cast<double>(after.steps - before.steps);
    shares.push_back(100 * (wall - in_steps) / in_steps);
    micros.push_back((wall - in_steps) / steps / kStreams * 1e6);
    steps_ms.push_back(in_steps / steps * 1e3);
  }
  std::printf(
      "overhead: between the steps of 8 streams the engine's thread spends %.1f us a token, "
      "%.1f %% of the step's %.2f ms (medians of %zu rounds)\n",
      Median(micros), Median(shares), Median(steps_ms), shares.size());
  return absl::OkStatus();
}

absl::Status Overhead() {
  for (const int streams : {8, 64}) {
    constexpr int kTokens = 1500;
    TestServer server(Endless(milliseconds(2), true));
    const pid_t child = SpawnClient(server.address(), "streams", streams, kTokens);
    while (server.engine().live() < streams) std::this_thread::sleep_for(milliseconds(1));
    const double before = CpuSeconds();
    const auto begin = std::chrono::steady_clock::now();
    server.engine().Pause(false);
    while (server.engine().live() > 0) std::this_thread::sleep_for(milliseconds(5));
    const double cpu = CpuSeconds() - before;
    const double wall = ToSeconds(std::chrono::steady_clock::now() - begin);
    MOBI_RETURN_IF_ERROR(WaitForClient(child));
    std::printf(
        "overhead: %d streams of the scripted engine: %.1f us of the server's CPU per token "
        "at %.0f tokens/s\n",
        streams, cpu / (streams * kTokens) * 1e6, streams * kTokens / wall);
  }
  return absl::OkStatus();
}

absl::Status Streams() {
  constexpr int kStreams = 2000;
  TestServer server(Endless(milliseconds(20), true));
  MOBI_RETURN_IF_ERROR(WaitForClient(SpawnClient(server.address(), "streams", 0, 1)));
  const double before = ResidentKib();
  const pid_t child = SpawnClient(server.address(), "streams", kStreams, 20);
  while (server.engine().live() < kStreams) std::this_thread::sleep_for(milliseconds(1));
  const double open = ResidentKib();
  server.engine().Pause(false);
  double most = open;
  while (server.engine().live() > 0) {
    most = std::max(most, ResidentKib());
    std::this_thread::sleep_for(milliseconds(5));
  }
  MOBI_RETURN_IF_ERROR(WaitForClient(child));
  std::printf(
      "streams: %d at once, all complete; the server's memory grew by %.1f KiB a stream when "
      "all were open, %.1f KiB at most\n",
      kStreams, (open - before) / kStreams, (most - before) / kStreams);
  return absl::OkStatus();
}

absl::Status Cancels() {
  const TempDir dir;
  MOBI_RETURN_IF_ERROR(WriteTestModels(dir));
  MOBI_ASSIGN_OR_RETURN(const auto served, Served::Open(dir.Sub("mobiquant")));
  const int baseline = served->engine().stats().free_kv_blocks;
  constexpr int kKills = 100;
  const auto begin = std::chrono::steady_clock::now();
  // Clients that are killed in the middle: their connections break.
  std::mt19937 random(1);
  for (int i = 0; i < kKills; ++i) {
    const pid_t child = SpawnClient(served->address(), "streams", 50, 200);
    const auto patience = std::chrono::steady_clock::now() + seconds(1);
    while (served->engine().stats().running_requests == 0 &&
           std::chrono::steady_clock::now() < patience) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    std::this_thread::sleep_for(milliseconds(random() % 10));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  const int count = absl::GetFlag(FLAGS_cancels);
  MOBI_RETURN_IF_ERROR(WaitForClient(SpawnClient(served->address(), "cancels", count, 60)));
  for (int i = 0; i < 1000 && served->engine().stats().free_kv_blocks != baseline; ++i) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  const EngineStats stats = served->engine().stats();
  std::printf(
      "cancels: %d requests cancelled at random and %d clients killed with up to 50 streams "
      "in %.0f s: %d of %d blocks free, %d before; %d requests run\n",
      count, kKills, ToSeconds(std::chrono::steady_clock::now() - begin), stats.free_kv_blocks,
      stats.num_kv_blocks, baseline, stats.running_requests);
  return stats.free_kv_blocks == baseline ? absl::OkStatus() : absl::InternalError("blocks leaked");
}

// All streams at once; fails unless each ends well with all its tokens.
bool ClientStreams(const std::string& address, int count, int tokens) {
  const RealClock clock;
  const Prompts prompts({.vocab_size = 256});
  LoadTest test(
      {.grace = seconds(300)}, [&] { return Connect(address); }, prompts, clock);
  const std::vector<Arrival> arrivals(count,
                                      Arrival{.at = {}, .prompt_tokens = 16, .new_tokens = tokens});
  const auto outcomes = test.Run(arrivals, clock.Now());
  return std::all_of(outcomes.begin(), outcomes.end(),
                     [&](const Outcome& o) { return o.status.ok() && o.tokens == tokens; });
}

// Each request is cancelled before it was sent, after some of its tokens, or not at all.
bool ClientCancels(const std::string& address, int count, int tokens) {
  constexpr int kThreads = 8;
  std::atomic<int> left{count};
  std::atomic<int> bad{0};
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      const auto stub = v1::Inference::NewStub(Connect(address));
      while (left.fetch_sub(1) > 0) {
        grpc::ClientContext context;
        v1::GenerateRequest request = TextRequest("the server", 1 + random() % tokens);
        request.set_ignore_eos(true);
        request.set_n(1 + static_cast<int>(random() % 2));
        if (random() % 50 == 0) context.TryCancel();
        const auto reader = stub->Generate(&context, request);
        v1::GenerateResponse message;
        for (unsigned reads = random() % 5; reads > 0 && reader->Read(&message); --reads) {
        }
        if (random() % 20 != 0) context.TryCancel();
        while (reader->Read(&message)) {
        }
        const auto code = reader->Finish().error_code();
        if (code != grpc::OK && code != grpc::CANCELLED) ++bad;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (bad > 0) std::fprintf(stderr, "%d calls ended neither OK nor CANCELLED\n", bad.load());
  return bad == 0;
}

absl::Status RunSections() {
  const std::string sections = absl::GetFlag(FLAGS_sections);
  const auto wanted = [&](const char* section) { return absl::StrContains(sections, section); };
  if (wanted("long_prompt") || wanted("over") || wanted("prefix")) {
    const std::string server = absl::GetFlag(FLAGS_server);
    MOBI_ASSIGN_OR_RETURN(const auto served, server.empty()
                                                 ? Served::Open(absl::GetFlag(FLAGS_model))
                                                 : Served::At(server));
    if (wanted("long_prompt")) MOBI_RETURN_IF_ERROR(LongPrompt(*served));
    if (wanted("prefix")) MOBI_RETURN_IF_ERROR(Prefix(*served));
    if (wanted("overload")) MOBI_RETURN_IF_ERROR(Overload(*served));
    if (wanted("overhead") && server.empty()) MOBI_RETURN_IF_ERROR(BetweenSteps(*served));
  }
  if (wanted("overhead")) MOBI_RETURN_IF_ERROR(Overhead());
  if (wanted("streams")) MOBI_RETURN_IF_ERROR(Streams());
  if (wanted("cancels")) MOBI_RETURN_IF_ERROR(Cancels());
  return absl::OkStatus();
}

}  // namespace

int main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const auto arguments = ParseFlags(argc, argv, __FILE__);
  absl::Status status = arguments.status();
  if (PrintedHelp(argc, argv, "serving-bench [flags]\n", __FILE__)) return 0;
  if (const std::string address = absl::GetFlag(FLAGS_client); status.ok() && !address.empty()) {
    const int count = absl::GetFlag(FLAGS_client_count);
    const int tokens = absl::GetFlag(FLAGS_client_tokens);
    const bool good = absl::GetFlag(FLAGS_client_mode) == "cancels"
                          ? ClientCancels(address, count, tokens)
                          : ClientStreams(address, count, tokens);
    return good ? 0 : kExitFailure;
  }
  if (status.ok()) {
    EnableTransportPlugins();
    status = RunSections();
  }
  if (status.ok()) return 0;
  std::fprintf(stderr, "serving-bench: %s\n", std::string(status.message()).c_str());
  return kExitFailure;
}
