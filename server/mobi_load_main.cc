// mobi-load: puts a server under an open-loop load and reports what its clients saw.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/types/optional.h"
#include "engine/base/file_writer.h"
#include "engine/base/flags.h"
#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"
#include "mobi/v1/inference.grpc.pb.h"
#include "server/client.h"
#include "server/client_flags.h"
#include "server/loadgen/arrivals.h"
#include "server/loadgen/bits_watch.h"
#include "server/loadgen/load_report.h"
#include "server/loadgen/load_test.h"
#include "server/loadgen/prompts.h"
#include "server/loadgen/recording.h"
#include "server/loadgen/trace.h"
#include "server/rpc_status.h"

template <typename T>
using Optional = absl::optional<T>;

ABSL_FLAG(std::string, server, "127.0.0.1:50051", "Address for generation.");
ABSL_FLAG(std::string, admin, "", "Address for precision, to report loaded bits; empty: not.");
ABSL_FLAG(std::string, rate, "1", "Requests per second (Poisson), or RATE:SECONDS,... phases.");
ABSL_FLAG(double, duration_s, 30, "How long a rate without its own SECONDS lasts.");
ABSL_FLAG(std::string, prompt_tokens, "128", "Prompt length, N or MIN:MAX.");
ABSL_FLAG(std::string, new_tokens, "64", "Completion length, N or MIN:MAX.");
ABSL_FLAG(std::string, trace, "",
          "CSV with TIMESTAMP, ContextTokens, GeneratedTokens to replay instead of --rate.");
ABSL_FLAG(double, trace_begin_s, 0, "Where in the trace to begin.");
ABSL_FLAG(double, trace_duration_s, 0, "How much of the trace to replay; 0: to its end.");
ABSL_FLAG(double, time_compression, 1, "Replay so many times faster.");
ABSL_FLAG(double, token_scale, 0,
          "Factor on the trace's lengths; 0: its longest request fits the context.");
ABSL_FLAG(double, warmup_s, 0, "Requests sent before this are not counted.");
ABSL_FLAG(double, slo_ttft_ms, 0, "Objective for the first token; 0: none.");
ABSL_FLAG(double, slo_itl_ms, 0, "Objective for a request's mean time per further token; 0: none.");
ABSL_FLAG(double, slo_e2e_ms, 0, "Objective for the whole request; 0: none.");
ABSL_FLAG(std::string, classes, "", "Priority classes and shares, as in premium:1,standard:3.");
ABSL_FLAG(double, deadline_s, 0, "Deadline of every call; 0: none.");
ABSL_FLAG(Optional<float>, min_bits, absl::nullopt, "Fewest average bits to accept.");
ABSL_FLAG(Optional<float>, max_bits, absl::nullopt, "Most average bits to accept.");
ABSL_FLAG(Optional<float>, bits, absl::nullopt, "Pin the average bits.");
ABSL_FLAG(std::string, prompts, "", "Text file that prompts are cut from; empty: random tokens.");
ABSL_FLAG(int, shared_prefix_tokens, 0, "So many first tokens are the same in every prompt.");
ABSL_FLAG(double, temperature, 1, "0: greedy.");
ABSL_FLAG(bool, ignore_eos, true, "Completions are as long as planned.");
ABSL_FLAG(uint64_t, seed, 1, "Of arrivals, lengths, prompts, classes and sampling.");
ABSL_FLAG(int, connections, 4, "At least; more are opened before all are full.");
ABSL_FLAG(double, grace_s, 60, "What still runs so long after the last arrival is cancelled.");
ABSL_FLAG(bool, json, false, "One JSON object instead of tables.");
ABSL_FLAG(std::string, csv, "", "File to write a line per request to; it must not exist.");
ABSL_FLAG(std::string, record, "",
          "File to write prompts, completions and bits to; it must not exist.");
ABSL_FLAG(std::string, score, "",
          "Instead of load: score what --record wrote, texts at the recorded bits.");
ABSL_FLAG(int, score_requests, 500, "Requests to score at most, spread over the file.");

namespace {

using namespace mobi;

constexpr char kUsage[] =
    "mobi-load [flags]\n"
    "Sends requests at times fixed beforehand, whether or not the server keeps up, and reports\n"
    "latencies from those times, goodput and SLO attainment. For example:\n"
    "  mobi-load --rate 2:20,20:20,2:20 --slo_ttft_ms 500      peak, overload, recovery\n"
    "  mobi-load --trace azure.csv --time_compression 10 --csv requests.csv\n";

constexpr uint64_t kMaxRecording = uint64_t{1} << 30;
constexpr uint64_t kMaxPromptFile = uint64_t{64} << 20;
// Of a prompt file; enough for prompts to differ, little enough for one call.
constexpr size_t kPromptBytes = 256 << 10;

Duration Seconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}
Duration Millis(double millis) { return Seconds(millis * 1e-3); }

absl::Status Prefixed(const char* flag, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("--", flag, ": ", status.message()));
}

absl::Status CheckFlags() {
  const std::tuple<const char*, double, double, double> ranges[] = {
      {"duration_s", absl::GetFlag(FLAGS_duration_s), 1e-3, 86400},
      {"trace_begin_s", absl::GetFlag(FLAGS_trace_begin_s), 0, 1e9},
      {"trace_duration_s", absl::GetFlag(FLAGS_trace_duration_s), 0, 1e9},
      {"time_compression", absl::GetFlag(FLAGS_time_compression), 1e-3, 1e6},
      {"token_scale", absl::GetFlag(FLAGS_token_scale), 0, 1e3},
      {"warmup_s", absl::GetFlag(FLAGS_warmup_s), 0, 86400},
      {"slo_ttft_ms", absl::GetFlag(FLAGS_slo_ttft_ms), 0, 1e9},
      {"slo_itl_ms", absl::GetFlag(FLAGS_slo_itl_ms), 0, 1e9},
      {"slo_e2e_ms", absl::GetFlag(FLAGS_slo_e2e_ms), 0, 1e9},
      {"deadline_s", absl::GetFlag(FLAGS_deadline_s), 0, 86400},
      {"shared_prefix_tokens", absl::GetFlag(FLAGS_shared_prefix_tokens), 0, 1 << 20},
      {"temperature", absl::GetFlag(FLAGS_temperature), 0, 2},
      {"connections", absl::GetFlag(FLAGS_connections), 1, 1000},
      {"grace_s", absl::GetFlag(FLAGS_grace_s), 0, 86400},
      {"score_requests", absl::GetFlag(FLAGS_score_requests), 1, 1e9},
  };
  for (const auto& [name, value, min, max] : ranges) {
    if (value >= min && value <= max) continue;
    return absl::InvalidArgumentError(
        absl::StrFormat("--%s: %g is out of range [%g, %g]", name, value, min, max));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ClassShare>> ParseClasses(const std::string& text) {
  std::vector<ClassShare> classes;
  if (text.empty()) return std::vector<ClassShare>(1);
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::vector<std::string> fields = absl::StrSplit(part, ':');
    ClassShare share{fields[0], 1};
    const bool good =
        fields.size() == 1 || (fields.size() == 2 && absl::SimpleAtod(fields[1], &share.share) &&
                               share.share > 0 && share.share <= 1e6);
    if (!good || share.name.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--classes: \"", part, "\" is not NAME or NAME:SHARE"));
    }
    classes.push_back(share);
  }
  return classes;
}

absl::StatusOr<v1::GetModelResponse> AskModel(const std::shared_ptr<grpc::Channel>& channel) {
  grpc::ClientContext context;
  SetDeadline(std::chrono::seconds(10), context);
  v1::GetModelResponse model;
  const auto stub = v1::Inference::NewStub(channel);
  MOBI_RETURN_IF_ERROR(FromGrpcStatus(stub->GetModel(&context, {}, &model)));
  return model;
}

// What is sent when, and the stretches to report beside the whole.
struct Plan {
  std::vector<Arrival> arrivals;
  std::vector<Stretch> phases;
  Duration end{};
};

absl::StatusOr<Plan> PoissonPlan(const v1::GetModelResponse& model) {
  auto phases = ParsePhases(absl::GetFlag(FLAGS_rate), Seconds(absl::GetFlag(FLAGS_duration_s)));
  if (!phases.ok()) return Prefixed("rate", phases.status());
  const auto prompt = ParseTokenRange(absl::GetFlag(FLAGS_prompt_tokens));
  if (!prompt.ok()) return Prefixed("prompt_tokens", prompt.status());
  const auto completion = ParseTokenRange(absl::GetFlag(FLAGS_new_tokens));
  if (!completion.ok()) return Prefixed("new_tokens", completion.status());
  const v1::Limits& limits = model.limits();
  if (int64_t{prompt->max} + completion->max > limits.max_model_len()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--prompt_tokens, --new_tokens: %d and %d do not fit the context of %d",
                        prompt->max, completion->max, limits.max_model_len()));
  }
  if (completion->max > limits.max_new_tokens()) {
    return absl::InvalidArgumentError(absl::StrFormat("--new_tokens: %d, the server takes %d",
                                                      completion->max, limits.max_new_tokens()));
  }
  Plan plan;
  for (const RatePhase& phase : *phases) {
    const Duration end = plan.end + phase.duration;
    plan.phases.push_back(
        {absl::StrFormat("%g requests/s from %g s", phase.requests_per_second, ToSeconds(plan.end)),
         plan.end, end});
    plan.end = end;
  }
  plan.arrivals = PoissonArrivals(*phases, *prompt, *completion, absl::GetFlag(FLAGS_seed));
  return plan;
}

absl::StatusOr<Plan> TracePlan(const v1::GetModelResponse& model) {
  MOBI_ASSIGN_OR_RETURN(const auto rows, ReadTrace(absl::GetFlag(FLAGS_trace)));
  TraceOptions options;
  options.begin = Seconds(absl::GetFlag(FLAGS_trace_begin_s));
  options.duration = Seconds(absl::GetFlag(FLAGS_trace_duration_s));
  options.time_compression = absl::GetFlag(FLAGS_time_compression);
  options.token_scale = absl::GetFlag(FLAGS_token_scale);
  options.max_model_len = model.limits().max_model_len();
  options.max_new_tokens = model.limits().max_new_tokens();
  if (options.token_scale == 0) {
    int64_t longest = 1;
    for (const TraceRow& row : rows) {
      longest = std::max(longest, int64_t{row.context_tokens} + row.generated_tokens);
    }
    options.token_scale =
        std::min(1.0, static_cast<double>(options.max_model_len) / static_cast<double>(longest));
  }
  Plan plan;
  auto arrivals = TraceArrivals(rows, options);
  if (!arrivals.ok()) return Prefixed("trace", arrivals.status());
  plan.arrivals = *std::move(arrivals);
  plan.end = plan.arrivals.back().at + std::chrono::milliseconds(1);
  return plan;
}

absl::StatusOr<std::vector<int32_t>> TokenizedPrompts(
    const std::shared_ptr<grpc::Channel>& channel) {
  const std::string path = absl::GetFlag(FLAGS_prompts);
  if (path.empty()) return std::vector<int32_t>();
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path, kMaxPromptFile));
  std::string_view text = file.text().substr(0, kPromptBytes);
  // Not in the middle of a character.
  while (text.size() == kPromptBytes && (text.back() & 0x80) != 0) text.remove_suffix(1);
  grpc::ClientContext context;
  v1::TokenizeRequest request;
  request.set_text(std::string(text));
  v1::TokenizeResponse response;
  const auto stub = v1::Inference::NewStub(channel);
  const auto status = FromGrpcStatus(stub->Tokenize(&context, request, &response));
  if (!status.ok()) {
    return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
  }
  return std::vector<int32_t>(response.ids().begin(), response.ids().end());
}

absl::StatusOr<LoadTestOptions> TestOptions() {
  LoadTestOptions options;
  MOBI_ASSIGN_OR_RETURN(options.classes, ParseClasses(absl::GetFlag(FLAGS_classes)));
  options.deadline = Seconds(absl::GetFlag(FLAGS_deadline_s));
  if (auto v = absl::GetFlag(FLAGS_min_bits)) options.precision.set_min_bits(*v);
  if (auto v = absl::GetFlag(FLAGS_max_bits)) options.precision.set_max_bits(*v);
  if (auto v = absl::GetFlag(FLAGS_bits)) options.precision.set_pinned_bits(*v);
  options.temperature = static_cast<float>(absl::GetFlag(FLAGS_temperature));
  options.ignore_eos = absl::GetFlag(FLAGS_ignore_eos);
  options.seed = absl::GetFlag(FLAGS_seed);
  options.grace = Seconds(absl::GetFlag(FLAGS_grace_s));
  options.connections = absl::GetFlag(FLAGS_connections);
  return options;
}

void Print(const v1::GetModelResponse& model, const std::vector<LoadReport>& reports,
           const Slo& slo) {
  if (!absl::GetFlag(FLAGS_json)) {
    for (const LoadReport& report : reports) std::printf("%s", ToTable(report).c_str());
    return;
  }
  nlohmann::json json = {{"model", model.name()},
                         {"device", model.device()},
                         {"slo",
                          {{"ttft_ms", ToMillis(slo.ttft)},
                           {"itl_ms", ToMillis(slo.inter_token)},
                           {"e2e_ms", ToMillis(slo.end_to_end)}}},
                         {"reports", nlohmann::json::array()}};
  for (const LoadReport& report : reports) json["reports"].push_back(ToJson(report));
  std::printf("%s\n", json.dump().c_str());
}

// The first status that is not OK, for a person to see what went wrong.
void PrintFirstError(const std::vector<Outcome>& outcomes) {
  for (const Outcome& outcome : outcomes) {
    if (outcome.status.ok()) continue;
    std::fprintf(stderr, "first error: %s\n",
                 DescribeError(outcome.status, absl::GetFlag(FLAGS_server)).c_str());
    return;
  }
}

absl::Status Score(const std::string& path) {
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path, kMaxRecording));
  MOBI_ASSIGN_OR_RETURN(const auto requests, ParseRecording(file.text(), path));
  MOBI_ASSIGN_OR_RETURN(const ClientSecurity security, SecurityFromFlags());
  const auto stub = v1::Inference::NewStub(Connect(absl::GetFlag(FLAGS_server), security));
  MOBI_ASSIGN_OR_RETURN(const RecordingScore score,
                        ScoreRecording(*stub, requests, absl::GetFlag(FLAGS_score_requests)));
  if (absl::GetFlag(FLAGS_json)) {
    const nlohmann::json json = {{"requests", score.requests},
                                 {"tokens", score.tokens},
                                 {"bits", score.bits},
                                 {"replayed_bits", score.replayed_bits},
                                 {"text_perplexity", score.text_perplexity},
                                 {"served_perplexity", score.served_perplexity}};
    std::printf("%s\n", json.dump().c_str());
    return absl::OkStatus();
  }
  std::printf("%d requests, %lld tokens at %.3f bits\n", score.requests,
              static_cast<long long>(score.tokens), score.bits);
  if (score.text_perplexity > 0) {
    std::printf("perplexity of the text at these bits   %.4f (replayed at %.3f)\n",
                score.text_perplexity, score.replayed_bits);
  }
  std::printf("perplexity of what was served, at 8    %.4f\n", score.served_perplexity);
  return absl::OkStatus();
}

absl::StatusOr<std::optional<FileWriter>> CreateIfNamed(const std::string& path) {
  if (path.empty()) return std::nullopt;
  auto created = FileWriter::Create(path);
  if (!created.ok()) return absl::InvalidArgumentError(created.status().message());
  return *std::move(created);
}

absl::Status Write(std::optional<FileWriter>& file, const std::string& text) {
  if (!file) return absl::OkStatus();
  MOBI_RETURN_IF_ERROR(file->WriteAt(0, AsBytes(text)));
  return file->Close();
}

absl::Status Run() {
  MOBI_RETURN_IF_ERROR(CheckFlags());
  if (const std::string path = absl::GetFlag(FLAGS_score); !path.empty()) return Score(path);
  MOBI_ASSIGN_OR_RETURN(LoadTestOptions options, TestOptions());
  const std::string server = absl::GetFlag(FLAGS_server);
  MOBI_ASSIGN_OR_RETURN(const ClientSecurity security, SecurityFromFlags());
  const auto channel = ConnectNow(server, security);
  MOBI_ASSIGN_OR_RETURN(const v1::GetModelResponse model, AskModel(channel));
  const bool poisson = absl::GetFlag(FLAGS_trace).empty();
  MOBI_ASSIGN_OR_RETURN(const Plan plan, poisson ? PoissonPlan(model) : TracePlan(model));
  const Duration warmup = Seconds(absl::GetFlag(FLAGS_warmup_s));
  if (warmup >= plan.end) {
    return absl::InvalidArgumentError("--warmup_s: the test is over by then");
  }
  PromptOptions prompt_options;
  MOBI_ASSIGN_OR_RETURN(prompt_options.text, TokenizedPrompts(channel));
  prompt_options.vocab_size = model.architecture().vocab_size();
  prompt_options.shared_prefix_tokens = absl::GetFlag(FLAGS_shared_prefix_tokens);
  prompt_options.seed = options.seed;
  const Prompts prompts(prompt_options);

  const RealClock clock;
  LoadTest test(
      options, [&] { return Connect(server, security); }, prompts, clock);
  const TimePoint start = clock.Now() + std::chrono::milliseconds(100);
  std::unique_ptr<BitsWatch> watch;
  if (const std::string admin = absl::GetFlag(FLAGS_admin); !admin.empty()) {
    auto started = BitsWatch::Start(ConnectNow(admin, security), start, clock);
    if (!started.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--admin: ", DescribeError(started.status(), admin)));
    }
    watch = *std::move(started);
  }
  MOBI_ASSIGN_OR_RETURN(auto csv, CreateIfNamed(absl::GetFlag(FLAGS_csv)));
  MOBI_ASSIGN_OR_RETURN(auto record, CreateIfNamed(absl::GetFlag(FLAGS_record)));
  std::fprintf(stderr, "%zu requests in %.1f s to %s (%s)\n", plan.arrivals.size(),
               ToSeconds(plan.end), server.c_str(), model.name().c_str());
  const std::vector<Outcome> outcomes = test.Run(plan.arrivals, start);
  const std::vector<BitsSample> samples =
      watch == nullptr ? std::vector<BitsSample>() : watch->Stop();

  const Slo slo{Millis(absl::GetFlag(FLAGS_slo_ttft_ms)), Millis(absl::GetFlag(FLAGS_slo_itl_ms)),
                Millis(absl::GetFlag(FLAGS_slo_e2e_ms))};
  std::vector<LoadReport> reports;
  reports.push_back(MakeReport(outcomes, samples, {"all", warmup, plan.end}, slo));
  if (plan.phases.size() > 1) {
    for (const Stretch& phase : plan.phases) {
      if (phase.begin >= warmup) reports.push_back(MakeReport(outcomes, samples, phase, slo));
    }
  }
  PrintFirstError(outcomes);
  Print(model, reports, slo);
  MOBI_RETURN_IF_ERROR(Write(csv, ToCsv(outcomes, slo)));
  MOBI_RETURN_IF_ERROR(Write(record, FormatRecording(RecordingOf(outcomes, prompts))));
  const bool any = std::any_of(outcomes.begin(), outcomes.end(),
                               [](const Outcome& outcome) { return outcome.status.ok(); });
  return any || outcomes.empty() ? absl::OkStatus()
                                 : absl::FailedPreconditionError("no request ended well");
}

}  // namespace

int main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);  // its errors reach us as statuses
  if (PrintedHelp(argc, argv, kUsage, __FILE__)) return 0;
  const auto arguments = ParseFlags(argc, argv, __FILE__, "MOBI_LOAD_");
  absl::Status status = arguments.status();
  if (status.ok() && !arguments->empty()) {
    status = absl::InvalidArgumentError("unexpected argument " + arguments->front());
  }
  if (status.ok()) status = Run();
  if (status.ok()) return 0;
  const bool usage = absl::IsInvalidArgument(status) || absl::IsNotFound(status);
  const std::string text =
      usage ? std::string(status.message()) : DescribeError(status, absl::GetFlag(FLAGS_server));
  std::fprintf(stderr, "mobi-load: %s\n", text.c_str());
  return usage ? kExitUsage : kExitFailure;
}
