// A MobiServer on loopback over a ScriptedEngine and a real tokenizer, and a client of it.
#ifndef MOBI_TESTS_SERVER_SERVER_FIXTURE_H_
#define MOBI_TESTS_SERVER_SERVER_FIXTURE_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/base/clock.h"
#include "grpcpp/channel.h"
#include "mobi/v1/inference.grpc.pb.h"
#include "mobi/v1/precision.grpc.pb.h"
#include "server/client.h"
#include "server/load_model.h"
#include "server/mobi_server.h"
#include "tests/server/scripted_engine.h"

namespace mobi {

// The tokenizer of the test models, loaded once per process.
const Tokenizer& TestTokenizer();
std::unique_ptr<Tokenizer> NewTestTokenizer();

// Ids of `text` without a begin-of-text token; one id per byte when `bytes` is set, so that
// characters and stop strings are split wherever possible.
std::vector<int32_t> TokensOf(const std::string& text, bool bytes = false);

// Says this text, then ends.
ScriptedEngine::Script Says(const std::string& text, bool bytes = false);

// A model whose engine is scripted; tokenizer (the test models' unless given), chat template and
// limits are real.
std::unique_ptr<ServedModel> ScriptedModel(ScriptedEngine::Options options,
                                           std::unique_ptr<Tokenizer> tokenizer = nullptr);

// A real model; null, and a failure of the test, where it does not load. Nothing that waits is
// refused: a busy machine is slow.
std::unique_ptr<ServedModel> LoadForTest(LoadOptions load, const Clock& clock);

// Ports are free ones; limits are for tests: short times.
ServerOptions TestServerOptions();

class TestServer {
 public:
  explicit TestServer(ScriptedEngine::Options engine,
                      const ServerOptions& options = TestServerOptions(), bool load = true);

  // Over a model that is loaded already; engine() is not for it.
  explicit TestServer(std::unique_ptr<ServedModel> model,
                      const ServerOptions& options = TestServerOptions());

  // Takes requests; done by the constructor unless load was false.
  void Load();

  MobiServer& server() { return *server_; }
  ScriptedEngine& engine() { return *engine_; }
  std::string address() const;
  std::string admin_address() const;
  // A connection of its own each time.
  std::shared_ptr<grpc::Channel> Channel() const;
  std::unique_ptr<v1::Inference::Stub> Client() const { return v1::Inference::NewStub(Channel()); }
  std::unique_ptr<v1::Precision::Stub> Admin() const;
  std::string MetricsText() const;  // what /metrics would say

 private:
  void Start(const ServerOptions& options);

  RealClock clock_;
  std::unique_ptr<ServedModel> model_;
  ScriptedEngine* engine_ = nullptr;
  std::unique_ptr<MobiServer> server_;
};

// A connection of its own to a server that is there, for which a failed one is therefore tried
// again until it stands: gRPC 1.51 now and then takes a connection under way for a failed one.
std::shared_ptr<grpc::Channel> ConnectTo(const std::string& address,
                                         const ClientSecurity& security = {});

// Everything one call returned.
struct Collected {
  absl::Status status;
  std::vector<v1::GenerateResponse> messages;
  std::vector<std::string> text;                // by completion
  std::vector<std::vector<int32_t>> token_ids;  // by completion
  std::vector<v1::Chunk> last_chunks;           // by completion
  v1::Prompt prompt;
  bool has_prompt = false;
  v1::Summary summary;
  bool has_summary = false;
};

using ContextSetup = std::function<void(grpc::ClientContext&)>;
Collected Collect(v1::Inference::Stub& stub, const v1::GenerateRequest& request,
                  const ContextSetup& setup = {});

v1::GenerateRequest TextRequest(const std::string& text, int max_new_tokens = 1000);

// Polls until `condition` holds; false after minutes.
bool Eventually(const std::function<bool()>& condition);

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_SERVER_FIXTURE_H_
