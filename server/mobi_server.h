// The server put together: data, admin and metrics ports, services, control threads, and the order
// in which they start and stop. Ports answer before the model is loaded (not ready, UNAVAILABLE).
// Methods are for the main's thread.
#ifndef MOBI_SERVER_MOBI_SERVER_H_
#define MOBI_SERVER_MOBI_SERVER_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "grpcpp/server.h"
#include "server/access_control.h"
#include "server/call_registry.h"
#include "server/controller.h"
#include "server/inference_service.h"
#include "server/kserve_service.h"
#include "server/limits.h"
#include "server/metrics.h"
#include "server/periodic_task.h"
#include "server/policy_file.h"
#include "server/precision_service.h"
#include "server/serving_state.h"
#include "server/tls_identity.h"
#include "server/vllm_service.h"
#include "server/write_pump.h"

namespace mobi {

struct ServerOptions {
  std::string listen = "0.0.0.0:50051";           // port 0: any
  std::string admin_listen = "127.0.0.1:50052";   // who reaches it may change precision
  std::string metrics_listen = "127.0.0.1:9400";  // empty: not served
  TlsOptions tls;                                 // of data and admin ports
  std::string token_file;                         // file of access_control.h; empty: open to all
  // How often the files of both are looked at.
  Duration access_interval = std::chrono::seconds(1);
  RequestLimits request_limits;
  StreamLimits stream_limits;
  TransportLimits transport_limits;
  ControllerOptions controller;
  std::string prometheus_url;  // that policies' promql signals are asked of; empty: none
  // How long running requests may take once the server is told to stop.
  Duration drain_grace = std::chrono::seconds(45);
  // Requests run but no step ended for so long: not ready.
  Duration stall_after = std::chrono::seconds(60);
  Duration housekeeping_interval = std::chrono::milliseconds(250);
};

class MobiServer {
 public:
  // Binds the ports. UNAVAILABLE names the address that cannot be bound; INVALID_ARGUMENT is a bad
  // policy, URL, certificate, key or token file, by name; FAILED_PRECONDITION is what the policy
  // lacks. `clock` outlives the server.
  static absl::StatusOr<std::unique_ptr<MobiServer>> Start(const ServerOptions& options,
                                                           LoadedPolicy policy, const Clock& clock);
  // Ends what still runs with UNAVAILABLE and closes the ports.
  ~MobiServer();

  // Takes requests from now on. Call once.
  void Serve(std::unique_ptr<ServedModel> model);
  // Follows the policy file: changes of it, and ReloadPolicy, put it in force. `loaded_yaml` is
  // what the server was started with.
  absl::Status WatchPolicy(const std::string& path, const std::string& loaded_yaml);
  void ReloadPolicy();
  // For good: refuses new requests, lets running ones finish within the grace time, ends the rest
  // with UNAVAILABLE. Blocks until none is left. The ports stay open and answer UNAVAILABLE; a
  // process that exits now closes them, which late callers see as UNAVAILABLE too, while closing
  // them through gRPC (as the destructor does) cancels the calls that come in that moment.
  void Drain();

  // The device has failed; the process should stop and exit non-zero.
  bool failed() const { return state_.failed(); }
  int running_requests() const { return registry_.size(); }
  int data_port() const { return data_port_; }
  int admin_port() const { return admin_port_; }
  int metrics_port() const { return metrics_server_ == nullptr ? 0 : metrics_server_->port(); }
  Metrics& metrics() const { return *metrics_; }

 private:
  // What Start opens before the ports.
  struct Opened {
    std::unique_ptr<AccessControl> access;
    std::unique_ptr<TlsIdentity> tls;  // null: plain text
    std::unique_ptr<PromqlPoller> prometheus;
  };

  MobiServer(const ServerOptions& options, LoadedPolicy policy, const Clock& clock, Opened opened);
  CallServices Services();
  // Looks at the files behind TLS and tokens.
  void ReloadAccess();
  std::shared_ptr<grpc::ServerCredentials> Credentials() const;
  absl::Status Listen();
  absl::Status ListenData();
  absl::Status ListenAdmin();
  void SetReadiness(bool ready);
  void Housekeep();
  void EndCalls();

  const ServerOptions options_;
  const Clock& clock_;
  std::unique_ptr<ServedModel> model_;  // before those who use it
  std::unique_ptr<AccessControl> access_;
  std::unique_ptr<TlsIdentity> tls_;  // null: plain text
  ServingState state_;
  Controller controller_;
  CallRegistry registry_;
  SeedSource seeds_;
  std::shared_ptr<Metrics> metrics_;  // shared with the scraping library
  WritePump pump_;
  InferenceService inference_;
  VllmService vllm_;
  KserveService kserve_;
  PrecisionService precision_;
  int data_port_ = 0;
  int admin_port_ = 0;
  std::unique_ptr<grpc::Server> data_server_;
  std::unique_ptr<grpc::Server> admin_server_;
  std::unique_ptr<MetricsServer> metrics_server_;
  std::unique_ptr<PolicyFile> policy_file_;
  // Of Housekeep.
  uint64_t last_steps_ = 0;
  TimePoint last_progress_{};
  std::unique_ptr<PeriodicTask> control_task_;
  std::unique_ptr<PeriodicTask> housekeeping_task_;
  std::unique_ptr<PeriodicTask> access_task_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_MOBI_SERVER_H_
