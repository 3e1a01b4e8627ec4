// Follows a server's Precision.WatchStatus while a load test runs: loaded bits are known to the
// server only. Owns a thread; Stop joins it.
#ifndef MOBI_SERVER_LOADGEN_BITS_WATCH_H_
#define MOBI_SERVER_LOADGEN_BITS_WATCH_H_

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "mobi/v1/precision.grpc.pb.h"
#include "server/loadgen/load_report.h"

namespace mobi {

class BitsWatch {
 public:
  // The first status has come when it returns; the error is the server's. `clock` outlives it.
  static absl::StatusOr<std::unique_ptr<BitsWatch>> Start(
      const std::shared_ptr<grpc::Channel>& admin, TimePoint start, const Clock& clock);
  ~BitsWatch();

  // Ends the watch and gives what was seen, timed from `start`.
  std::vector<BitsSample> Stop();

 private:
  BitsWatch(const std::shared_ptr<grpc::Channel>& admin, TimePoint start, const Clock& clock);
  void Follow();

  const TimePoint start_;
  const Clock& clock_;
  std::unique_ptr<v1::Precision::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<v1::PrecisionStatus>> reader_;
  std::vector<BitsSample> samples_;  // of the thread until it is joined
  std::thread thread_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_LOADGEN_BITS_WATCH_H_
