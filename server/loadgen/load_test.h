// An open-loop client of Inference.Generate: sends every request at its time whatever became of the
// earlier ones, and times what comes back. Callback API: one thread sends, gRPC's threads read, so
// thousands of streams cost no thread each. Not thread-safe; one Run at a time.
#ifndef MOBI_SERVER_LOADGEN_LOAD_TEST_H_
#define MOBI_SERVER_LOADGEN_LOAD_TEST_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "grpcpp/channel.h"
#include "mobi/v1/inference.grpc.pb.h"
#include "server/loadgen/arrivals.h"
#include "server/loadgen/load_report.h"
#include "server/loadgen/prompts.h"

namespace mobi {

struct ClassShare {
  std::string name{};  // empty: the server's default
  double share = 1;
};

struct LoadTestOptions {
  std::vector<ClassShare> classes = {{}};  // drawn by their shares
  Duration deadline{};                     // of each call; zero: none
  v1::PrecisionBand precision{};
  float temperature = 1;
  bool ignore_eos = true;  // completions are as long as the arrival says
  uint64_t seed = 1;
  // What still runs so long after the last arrival is cancelled.
  Duration grace = std::chrono::seconds(60);
  int connections = 4;  // at least; more are opened before all are full
  int max_streams_per_connection = 64;
};

class LoadTest {
 public:
  // `connect` gives a connection of its own each time. The borrowed outlive the test.
  LoadTest(LoadTestOptions options, std::function<std::shared_ptr<grpc::Channel>()> connect,
           const Prompts& prompts, const Clock& clock);
  ~LoadTest();

  // Sends the arrivals, counted from `start`, and waits until all have ended. One outcome each, in
  // their order.
  std::vector<Outcome> Run(absl::Span<const Arrival> arrivals, TimePoint start);

 private:
  class Call;
  struct Connection;

  v1::GenerateRequest MakeRequest(size_t index, Outcome& outcome) const;
  Connection& OpenConnection();
  Connection& PickConnection();
  void Finished(Call* call);
  void WaitForAll(TimePoint patience);

  const LoadTestOptions options_;
  const std::function<std::shared_ptr<grpc::Channel>()> connect_;
  const Prompts& prompts_;
  const Clock& clock_;
  std::vector<std::unique_ptr<Connection>> connections_;
  Mutex mutex_;
  CondVar changed_;
  // Shared, because a call may end while it is being cancelled.
  absl::flat_hash_map<Call*, std::shared_ptr<Call>> running_ ABSL_GUARDED_BY(mutex_);
  // Calls that exist. Connections must not close under one, nor on gRPC's threads.
  int calls_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace mobi

#endif  // MOBI_SERVER_LOADGEN_LOAD_TEST_H_
