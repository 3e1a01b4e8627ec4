#include "server/mobi_server.h"

#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "server/transport.h"

namespace mobi {
namespace {

// Clients that do not read may hold calls open; so long are they given to take their status.
constexpr Duration kFarewell = std::chrono::seconds(3);

absl::Status BindError(const std::string& what, const std::string& address) {
  return absl::UnavailableError(
      absl::StrCat(what, " address ", address, ": cannot be bound; is another server running?"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<MobiServer>> MobiServer::Start(const ServerOptions& options,
                                                              LoadedPolicy policy,
                                                              const Clock& clock) {
  Opened opened;
  MOBI_ASSIGN_OR_RETURN(opened.access, AccessControl::Open(options.token_file));
  if (options.tls.enabled()) {
    MOBI_ASSIGN_OR_RETURN(opened.tls, TlsIdentity::Open(options.tls));
  }
  if (!options.prometheus_url.empty()) {
    MOBI_ASSIGN_OR_RETURN(opened.prometheus, PromqlPoller::Start(options.prometheus_url, clock));
  }
  std::unique_ptr<MobiServer> server(
      new MobiServer(options, std::move(policy), clock, std::move(opened)));
  MOBI_RETURN_IF_ERROR(server->controller_.Check(*server->controller_.policy().policy));
  MOBI_RETURN_IF_ERROR(server->Listen());
  return server;
}

MobiServer::MobiServer(const ServerOptions& options, LoadedPolicy policy, const Clock& clock,
                       Opened opened)
    : options_(options),
      clock_(clock),
      access_(std::move(opened.access)),
      tls_(std::move(opened.tls)),
      state_([this](bool ready) { SetReadiness(ready); }),
      controller_(options.controller, std::move(policy), clock, std::move(opened.prometheus)),
      metrics_(std::make_shared<Metrics>(Metrics::Sources{
          .control = [this] { return controller_.status(); },
          .ready = [this] { return state_.ready(); },
          .active_calls = [this] { return registry_.size(); },
      })),
      inference_(Services()),
      vllm_(Services()),
      kserve_(*access_, state_, controller_, *metrics_),
      precision_(PrecisionServices{*access_, controller_, state_, registry_, *metrics_, clock_,
                                   options.drain_grace}),
      last_progress_(clock.Now()) {
  controller_.WatchLatency(metrics_->time_to_first_token, metrics_->inter_token_latency);
}

CallServices MobiServer::Services() {
  return {*access_,
          options_.request_limits,
          options_.stream_limits,
          state_,
          controller_,
          clock_,
          *metrics_,
          registry_,
          pump_,
          seeds_};
}

MobiServer::~MobiServer() {
  policy_file_.reset();
  access_task_.reset();
  housekeeping_task_.reset();
  control_task_.reset();
  state_.SetStopping();
  EndCalls();
  const auto deadline = std::chrono::system_clock::now() + std::chrono::seconds(1);
  for (auto* server : {&data_server_, &admin_server_}) {
    if (*server == nullptr) continue;
    (*server)->Shutdown(deadline);
    (*server)->Wait();
  }
}

absl::Status MobiServer::Listen() {
  MOBI_RETURN_IF_ERROR(ListenData());
  MOBI_RETURN_IF_ERROR(ListenAdmin());
  if (!options_.metrics_listen.empty()) {
    MOBI_ASSIGN_OR_RETURN(metrics_server_, MetricsServer::Start(options_.metrics_listen, metrics_));
  }
  SetReadiness(false);
  control_task_ =
      std::make_unique<PeriodicTask>(options_.controller.interval, [this] { controller_.Tick(); });
  housekeeping_task_ =
      std::make_unique<PeriodicTask>(options_.housekeeping_interval, [this] { Housekeep(); });
  access_task_ =
      std::make_unique<PeriodicTask>(options_.access_interval, [this] { ReloadAccess(); });
  return absl::OkStatus();
}

std::shared_ptr<grpc::ServerCredentials> MobiServer::Credentials() const {
  return tls_ == nullptr ? grpc::InsecureServerCredentials() : tls_->Credentials();
}

void MobiServer::ReloadAccess() {
  const auto report = [this](AccessFiles files, const absl::StatusOr<bool>& changed) {
    if (changed.ok() && !*changed) return;
    metrics_->AccessReloaded(files, changed.ok());
    if (changed.ok()) return;
    std::fprintf(stderr, "%s not reloaded: %s\n", files == AccessFiles::kTls ? "TLS" : "tokens",
                 std::string(changed.status().message()).c_str());
  };
  report(AccessFiles::kTokens, access_->Reload());
  if (tls_ != nullptr) report(AccessFiles::kTls, tls_->Reload());
}

absl::Status MobiServer::ListenData() {
  grpc::ServerBuilder builder;
  Harden(options_.transport_limits, PortKind::kData, access_->enabled(), builder);
  builder.AddListeningPort(options_.listen, Credentials(), &data_port_);
  builder.RegisterService(&inference_);
  builder.RegisterService(&vllm_);
  builder.RegisterService(&kserve_);
  data_server_ = builder.BuildAndStart();
  return data_server_ == nullptr ? BindError("data", options_.listen) : absl::OkStatus();
}

absl::Status MobiServer::ListenAdmin() {
  grpc::ServerBuilder builder;
  Harden(options_.transport_limits, PortKind::kAdmin, access_->enabled(), builder);
  builder.AddListeningPort(options_.admin_listen, Credentials(), &admin_port_);
  builder.RegisterService(&precision_);
  admin_server_ = builder.BuildAndStart();
  return admin_server_ == nullptr ? BindError("admin", options_.admin_listen) : absl::OkStatus();
}

void MobiServer::Serve(std::unique_ptr<ServedModel> model) {
  model_ = std::move(model);
  controller_.Attach(model_->engine.get(), model_->info.prices, model_->info.surface);
  metrics_->SetModel(model_->info.name, model_->info.engine_options.block_size,
                     model_->engine->stats().num_kv_blocks);
  state_.SetLoaded(model_.get());
}

absl::Status MobiServer::WatchPolicy(const std::string& path, const std::string& loaded_yaml) {
  MOBI_ASSIGN_OR_RETURN(
      policy_file_,
      PolicyFile::Watch(
          path, loaded_yaml, {},
          [this, path](const PolicyText& text) {
            return controller_.SetPolicy({text.policy, text.yaml, path}, std::nullopt);
          },
          [this](const absl::Status& status) {
            controller_.ReportReload(status);
            if (!status.ok()) {
              std::fprintf(stderr, "policy not reloaded: %s\n",
                           std::string(status.message()).c_str());
            }
          }));
  return absl::OkStatus();
}

void MobiServer::ReloadPolicy() {
  if (policy_file_ != nullptr) policy_file_->Reload();
}

void MobiServer::Drain() {
  state_.SetStopping();
  registry_.WaitUntilEmpty(options_.drain_grace);
  EndCalls();
}

void MobiServer::EndCalls() {
  registry_.EndAll(absl::UnavailableError("the server is stopping"));
  registry_.WaitUntilEmpty(kFarewell);
}

// "" says that the process lives, the service's name that it takes requests.
void MobiServer::SetReadiness(bool ready) {
  if (data_server_ == nullptr) return;
  data_server_->GetHealthCheckService()->SetServingStatus(v1::Inference::service_full_name(),
                                                          ready);
}

void MobiServer::Housekeep() {
  const TimePoint now = clock_.Now();
  registry_.SweepAll(now);
  if (state_.DrainExpired(now)) registry_.EndAll(absl::UnavailableError("the server is draining"));
  if (!state_.model().ok()) return;
  const EngineStats stats = model_->engine->stats();
  if (stats.failed) state_.SetFailed();
  if (stats.steps != last_steps_ || stats.running_requests == 0) {
    last_steps_ = stats.steps;
    last_progress_ = now;
  }
  state_.SetStalled(now - last_progress_ > options_.stall_after);
}

}  // namespace mobi
