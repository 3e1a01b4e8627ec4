// mobictl: talks to a mobi-server from a terminal.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <string_view>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/types/optional.h"
#include "engine/base/flags.h"
#include "engine/base/status_macros.h"
#include "mobi/v1/precision.grpc.pb.h"
#include "server/client.h"
#include "server/client_flags.h"
#include "server/ctl_print.h"
#include "server/policy_file.h"
#include "server/policy_windows.h"
#include "server/rpc_status.h"

template <typename T>
using Optional = absl::optional<T>;

ABSL_FLAG(std::string, server, "127.0.0.1:50051", "Address for generation.");
ABSL_FLAG(std::string, admin, "127.0.0.1:50052", "Address for precision.");
ABSL_FLAG(bool, json, false, "One JSON object per message instead of text.");
ABSL_FLAG(double, timeout_s, 0, "Deadline of the call; 0: none.");
ABSL_FLAG(std::string, color, "auto", "auto, always or never: colour text by its bits.");
ABSL_FLAG(Optional<int>, max_new_tokens, absl::nullopt, "New tokens at most.");
ABSL_FLAG(Optional<int>, n, absl::nullopt, "Completions.");
ABSL_FLAG(Optional<float>, temperature, absl::nullopt, "0: greedy.");
ABSL_FLAG(Optional<float>, top_p, absl::nullopt, "Nucleus sampling.");
ABSL_FLAG(Optional<int>, top_k, absl::nullopt, "Sample among the k most likely.");
ABSL_FLAG(Optional<float>, min_p, absl::nullopt, "Least probability relative to the best.");
ABSL_FLAG(Optional<uint64_t>, seed, absl::nullopt, "Same seed, same tokens.");
ABSL_FLAG(std::string, stop, "", "A string that ends the text.");
ABSL_FLAG(bool, ignore_eos, false, "Go on after the model's end of text.");
ABSL_FLAG(bool, echo, false, "Print the prompt too.");
ABSL_FLAG(Optional<int>, logprobs, absl::nullopt, "Log-probabilities, with --json.");
ABSL_FLAG(Optional<float>, min_bits, absl::nullopt, "Fewest average bits to accept.");
ABSL_FLAG(Optional<float>, max_bits, absl::nullopt, "Most average bits to accept.");
ABSL_FLAG(Optional<float>, bits, absl::nullopt, "Pin the average bits.");
ABSL_FLAG(std::string, priority_class, "", "The operator's class for this request.");
ABSL_FLAG(std::string, system, "", "System message of a chat.");
ABSL_FLAG(double, ttl_s, 900, "How long `bits` holds.");
ABSL_FLAG(double, interval_s, 1, "Interval of `watch`.");
ABSL_FLAG(double, grace_s, 45, "Time for running requests of `drain`.");

namespace {

using namespace mobi;

constexpr char kUsage[] =
    "mobictl COMMAND [flags]\n"
    "  generate PROMPT   stream a completion (PROMPT - reads stdin)\n"
    "  chat [MESSAGE]    talk to a chat model; without MESSAGE, line by line\n"
    "  models            what the server serves\n"
    "  status            precision and load now\n"
    "  watch             the same, a row every interval\n"
    "  bits N | clear    serve at N average bits for --ttl_s seconds\n"
    "  policy [set FILE | check FILE]   show, replace or only check the policy\n"
    "  drain [undo]      stop taking requests\n"
    "  health [SERVICE]  exit code 0 when it serves; mobi.v1.Inference is readiness\n";

using Arguments = std::vector<std::string>;

absl::Status UsageError(const std::string& message) {
  return absl::InvalidArgumentError(message + ", see mobictl --help");
}

Duration Seconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

google::protobuf::Duration ProtoSeconds(double seconds) {
  google::protobuf::Duration duration;
  const Duration exact = Seconds(seconds);
  const auto whole = std::chrono::duration_cast<std::chrono::seconds>(exact);
  duration.set_seconds(whole.count());
  duration.set_nanos(static_cast<int32_t>((exact - whole).count()));
  return duration;
}

bool UseColor() {
  const std::string color = absl::GetFlag(FLAGS_color);
  if (color == "always") return true;
  return color == "auto" && isatty(STDOUT_FILENO) && std::getenv("NO_COLOR") == nullptr;
}

v1::GenerateRequest RequestFromFlags() {
  v1::GenerateRequest request;
  v1::Sampling& sampling = *request.mutable_sampling();
  if (auto v = absl::GetFlag(FLAGS_max_new_tokens)) request.set_max_new_tokens(*v);
  if (auto v = absl::GetFlag(FLAGS_n)) request.set_n(*v);
  if (auto v = absl::GetFlag(FLAGS_logprobs)) request.set_logprobs(*v);
  if (auto v = absl::GetFlag(FLAGS_temperature)) sampling.set_temperature(*v);
  if (auto v = absl::GetFlag(FLAGS_top_p)) sampling.set_top_p(*v);
  if (auto v = absl::GetFlag(FLAGS_top_k)) sampling.set_top_k(*v);
  if (auto v = absl::GetFlag(FLAGS_min_p)) sampling.set_min_p(*v);
  if (auto v = absl::GetFlag(FLAGS_seed)) sampling.set_seed(*v);
  if (auto v = absl::GetFlag(FLAGS_min_bits)) request.mutable_precision()->set_min_bits(*v);
  if (auto v = absl::GetFlag(FLAGS_max_bits)) request.mutable_precision()->set_max_bits(*v);
  if (auto v = absl::GetFlag(FLAGS_bits)) request.mutable_precision()->set_pinned_bits(*v);
  if (const std::string stop = absl::GetFlag(FLAGS_stop); !stop.empty()) request.add_stop(stop);
  request.set_ignore_eos(absl::GetFlag(FLAGS_ignore_eos));
  request.set_echo(absl::GetFlag(FLAGS_echo));
  request.set_priority_class(absl::GetFlag(FLAGS_priority_class));
  return request;
}

absl::StatusOr<std::unique_ptr<v1::Inference::Stub>> InferenceStub() {
  MOBI_ASSIGN_OR_RETURN(const ClientSecurity security, SecurityFromFlags());
  return v1::Inference::NewStub(ConnectNow(absl::GetFlag(FLAGS_server), security));
}

absl::StatusOr<std::unique_ptr<v1::Precision::Stub>> PrecisionStub() {
  MOBI_ASSIGN_OR_RETURN(const ClientSecurity security, SecurityFromFlags());
  return v1::Precision::NewStub(ConnectNow(absl::GetFlag(FLAGS_admin), security));
}

// Streams one generation to the terminal and returns the text of its first completion.
absl::StatusOr<std::string> Stream(const v1::GenerateRequest& request) {
  MOBI_ASSIGN_OR_RETURN(const auto stub, InferenceStub());
  const bool json = absl::GetFlag(FLAGS_json);
  TextPrinter printer(UseColor(), request.has_n() ? request.n() : 1);
  const auto summary = Generate(*stub, request, Seconds(absl::GetFlag(FLAGS_timeout_s)),
                                [&](const v1::GenerateResponse& message) {
                                  if (json) {
                                    std::printf("%s\n", ToJson(message).c_str());
                                    std::fflush(stdout);
                                  } else {
                                    printer.Print(message);
                                  }
                                });
  if (!json) printer.End();
  if (!summary.ok()) return summary.status();
  if (!json) std::fprintf(stderr, "%s", DescribeSummary(*summary, printer).c_str());
  return printer.text();
}

absl::Status RunGenerate(const Arguments& arguments) {
  if (arguments.empty()) return UsageError("generate: needs a prompt");
  v1::GenerateRequest request = RequestFromFlags();
  std::string prompt = absl::StrJoin(arguments, " ");
  if (prompt == "-") prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  request.set_text(prompt);
  return Stream(request).status();
}

absl::Status RunChat(const Arguments& arguments) {
  v1::GenerateRequest request = RequestFromFlags();
  v1::Chat& chat = *request.mutable_chat();
  const auto say = [&chat](const std::string& role, const std::string& content) {
    v1::ChatMessage& message = *chat.add_messages();
    message.set_role(role);
    message.set_content(content);
  };
  if (const auto system = absl::GetFlag(FLAGS_system); !system.empty()) say("system", system);
  if (!arguments.empty()) {
    say("user", absl::StrJoin(arguments, " "));
    return Stream(request).status();
  }
  for (std::string line; std::printf("> "), std::fflush(stdout), std::getline(std::cin, line);) {
    if (line.empty()) continue;
    say("user", line);
    MOBI_ASSIGN_OR_RETURN(const std::string answer, Stream(request));
    say("assistant", answer);
  }
  std::printf("\n");
  return absl::OkStatus();
}

absl::Status RunModels(const Arguments&) {
  MOBI_ASSIGN_OR_RETURN(const auto stub, InferenceStub());
  grpc::ClientContext context;
  SetDeadline(Seconds(absl::GetFlag(FLAGS_timeout_s)), context);
  v1::GetModelResponse model;
  MOBI_RETURN_IF_ERROR(FromGrpcStatus(stub->GetModel(&context, {}, &model)));
  const bool json = absl::GetFlag(FLAGS_json);
  std::printf("%s", json ? (ToJson(model) + "\n").c_str() : DescribeModel(model).c_str());
  return absl::OkStatus();
}

// One unary call to the admin port.
template <typename Request, typename Response>
absl::Status CallAdmin(grpc::Status (v1::Precision::Stub::*method)(grpc::ClientContext*,
                                                                   const Request&, Response*),
                       const Request& request, Response& response) {
  MOBI_ASSIGN_OR_RETURN(const auto stub, PrecisionStub());
  grpc::ClientContext context;
  SetDeadline(Seconds(absl::GetFlag(FLAGS_timeout_s)), context);
  return FromGrpcStatus((stub.get()->*method)(&context, request, &response));
}

void PrintStatus(const v1::PrecisionStatus& status) {
  const bool json = absl::GetFlag(FLAGS_json);
  std::printf("%s", json ? (ToJson(status) + "\n").c_str() : DescribeStatus(status).c_str());
}

absl::Status RunStatus(const Arguments&) {
  v1::PrecisionStatus status;
  MOBI_RETURN_IF_ERROR(CallAdmin(&v1::Precision::Stub::GetStatus, v1::GetStatusRequest(), status));
  PrintStatus(status);
  return absl::OkStatus();
}

absl::Status RunWatch(const Arguments&) {
  MOBI_ASSIGN_OR_RETURN(const auto stub, PrecisionStub());
  grpc::ClientContext context;
  SetDeadline(Seconds(absl::GetFlag(FLAGS_timeout_s)), context);
  v1::WatchStatusRequest request;
  *request.mutable_interval() = ProtoSeconds(absl::GetFlag(FLAGS_interval_s));
  const auto reader = stub->WatchStatus(&context, request);
  const bool json = absl::GetFlag(FLAGS_json);
  constexpr int kRowsPerHeading = 20;
  v1::PrecisionStatus status;
  for (int row = 0; reader->Read(&status); ++row) {
    if (!json && row % kRowsPerHeading == 0) std::printf("%s", WatchHeading().c_str());
    std::printf("%s", json ? (ToJson(status) + "\n").c_str() : WatchRow(status).c_str());
    std::fflush(stdout);
  }
  const absl::Status end = FromGrpcStatus(reader->Finish());
  // The deadline that the user set is how the watch ends.
  return absl::IsDeadlineExceeded(end) ? absl::OkStatus() : end;
}

absl::Status RunBits(const Arguments& arguments) {
  v1::OverrideRequest request;
  float bits = 0;
  if (arguments.size() != 1) return UsageError("bits: needs a number or clear");
  if (arguments[0] == "clear") {
    request.set_clear(true);
  } else if (absl::SimpleAtof(arguments[0], &bits)) {
    request.set_target_bits(bits);
    *request.mutable_ttl() = ProtoSeconds(absl::GetFlag(FLAGS_ttl_s));
  } else {
    return UsageError("bits: \"" + arguments[0] + "\" is neither a number nor clear");
  }
  v1::PrecisionStatus status;
  MOBI_RETURN_IF_ERROR(CallAdmin(&v1::Precision::Stub::Override, request, status));
  PrintStatus(status);
  return absl::OkStatus();
}

// What a file of ours fails with is the user's to mend, whatever the code.
absl::Status AsUsageError(const absl::Status& status) {
  return absl::InvalidArgumentError(status.message());
}

absl::Status RunPolicy(const Arguments& arguments) {
  v1::GetPolicyResponse policy;
  if (arguments.empty()) {
    MOBI_RETURN_IF_ERROR(
        CallAdmin(&v1::Precision::Stub::GetPolicy, v1::GetPolicyRequest(), policy));
  } else if (arguments.size() == 2 && (arguments[0] == "set" || arguments[0] == "check")) {
    if (arguments[0] == "check") {
      const auto report = CheckPolicyFile(arguments[1], absl::Now());
      if (!report.ok()) return AsUsageError(report.status());
      std::printf("%s", report->c_str());
      return absl::OkStatus();
    }
    const auto text = ReadPolicyFile(arguments[1]);
    if (!text.ok()) return AsUsageError(text.status());
    v1::SetPolicyRequest request;
    request.set_yaml(text->yaml);
    MOBI_RETURN_IF_ERROR(CallAdmin(&v1::Precision::Stub::SetPolicy, request, policy));
  } else {
    return UsageError("policy: takes nothing, set FILE or check FILE");
  }
  if (absl::GetFlag(FLAGS_json)) {
    std::printf("%s\n", ToJson(policy).c_str());
  } else {
    std::printf("# generation %lld, from %s\n%s", static_cast<long long>(policy.generation()),
                policy.source().c_str(), policy.yaml().c_str());
  }
  return absl::OkStatus();
}

absl::Status RunDrain(const Arguments& arguments) {
  v1::DrainRequest request;
  if (arguments.size() > 1 || (arguments.size() == 1 && arguments[0] != "undo")) {
    return UsageError("drain: takes nothing or undo");
  }
  request.set_undo(!arguments.empty());
  *request.mutable_grace() = ProtoSeconds(absl::GetFlag(FLAGS_grace_s));
  v1::DrainResponse response;
  MOBI_RETURN_IF_ERROR(CallAdmin(&v1::Precision::Stub::Drain, request, response));
  std::printf("%s, %d requests run\n", request.undo() ? "takes requests" : "draining",
              response.running_requests());
  return absl::OkStatus();
}

absl::Status RunHealth(const Arguments& arguments) {
  if (arguments.size() > 1) return UsageError("health: takes one service at most");
  const std::string service = arguments.empty() ? "" : arguments[0];
  const double timeout = absl::GetFlag(FLAGS_timeout_s) > 0 ? absl::GetFlag(FLAGS_timeout_s) : 3;
  MOBI_ASSIGN_OR_RETURN(const ClientSecurity security, SecurityFromFlags());
  MOBI_ASSIGN_OR_RETURN(const bool serving, CheckHealth(absl::GetFlag(FLAGS_server), service,
                                                        Seconds(timeout), security));
  std::printf("%s\n", serving ? "serving" : "not serving");
  return serving ? absl::OkStatus() : absl::FailedPreconditionError("not serving");
}

struct Command {
  std::string_view name;
  absl::Status (*run)(const Arguments&);
  bool admin;  // which address it talks to
};

constexpr Command kCommands[] = {
    {"generate", RunGenerate, false}, {"chat", RunChat, false},  {"models", RunModels, false},
    {"status", RunStatus, true},      {"watch", RunWatch, true}, {"bits", RunBits, true},
    {"policy", RunPolicy, true},      {"drain", RunDrain, true}, {"health", RunHealth, false},
};

int Fail(int code, const std::string& message) {
  std::fprintf(stderr, "mobictl: %s\n", message.c_str());
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);  // its errors reach us as statuses
  if (PrintedHelp(argc, argv, kUsage, __FILE__)) return 0;
  auto arguments = ParseFlags(argc, argv, __FILE__, "MOBICTL_");
  if (!arguments.ok()) return Fail(kExitUsage, std::string(arguments.status().message()));
  if (arguments->empty()) {
    std::fprintf(stderr, "%s", kUsage);
    return kExitUsage;
  }
  const auto* command =
      std::find_if(std::begin(kCommands), std::end(kCommands),
                   [&](const Command& c) { return c.name == arguments->front(); });
  if (command == std::end(kCommands)) {
    return Fail(kExitUsage, "unknown command " + arguments->front() + ", see mobictl --help");
  }
  arguments->erase(arguments->begin());
  const absl::Status status = command->run(*arguments);
  if (status.ok()) return 0;
  // What this program found itself has no detail from a server.
  const bool local = absl::IsInvalidArgument(status) && !DetailOf<google::rpc::BadRequest>(status);
  if (local) return Fail(kExitUsage, std::string(status.message()));
  return Fail(kExitFailure,
              DescribeError(status, absl::GetFlag(command->admin ? FLAGS_admin : FLAGS_server)));
}
