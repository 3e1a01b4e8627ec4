#include "tests/server/server_fixture.h"

#include <gtest/gtest.h>

#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "prometheus/text_serializer.h"
#include "server/rpc_status.h"
#include "server/transport.h"
#include "tests/engine/test_models.h"

namespace mobi {

std::unique_ptr<Tokenizer> NewTestTokenizer() {
  const TempDir dir;
  EXPECT_TRUE(WriteTestModel(dir.Sub("float")).ok());
  auto tokenizer = Tokenizer::Load(dir.Sub("float"));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

const Tokenizer& TestTokenizer() {
  static const auto& tokenizer = *NewTestTokenizer().release();
  return tokenizer;
}

std::vector<int32_t> TokensOf(const std::string& text, bool bytes) {
  const EncodeOptions plain{.add_special_tokens = false};
  if (!bytes) return *TestTokenizer().Encode(text, plain);
  std::vector<int32_t> ids;
  for (const char byte : text) {
    for (int32_t id = 0; id < 256; ++id) {  // the byte alphabet comes first
      if (TestTokenizer().TokenBytes(id) == std::string_view(&byte, 1)) ids.push_back(id);
    }
  }
  EXPECT_EQ(ids.size(), text.size());
  return ids;
}

ScriptedEngine::Script Says(const std::string& text, bool bytes) {
  return [tokens = TokensOf(text, bytes)](const GenerationRequest&, int) { return tokens; };
}

std::unique_ptr<ServedModel> ScriptedModel(ScriptedEngine::Options options,
                                           std::unique_ptr<Tokenizer> tokenizer) {
  auto model = std::make_unique<ServedModel>();
  model->tokenizer = tokenizer == nullptr ? NewTestTokenizer() : std::move(tokenizer);
  model->chat_template = ChatTemplate::Create(*model->tokenizer);
  model->info.name = "scripted";
  model->info.backend = "scripted";
  model->info.config.vocab_size = model->tokenizer->vocab_size();
  model->info.config.eos_token_ids = {kScriptedEos};
  model->info.elastic = true;
  model->info.prices.token = {{2, 1e-3f}, {4, 1e-5f}, {6, 1e-7f}, {8, 1e-9f}};
  model->engine = std::make_unique<ScriptedEngine>(std::move(options));
  return model;
}

std::unique_ptr<ServedModel> LoadForTest(LoadOptions load, const Clock& clock) {
  load.engine.max_queue_wait = load.engine.max_expected_wait = std::chrono::minutes(5);
  auto opened = OpenModel(load);
  EXPECT_TRUE(opened.ok()) << opened.status();
  if (!opened.ok()) return nullptr;
  auto model = LoadModel(load, *std::move(opened), clock, nullptr);
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? *std::move(model) : nullptr;
}

ServerOptions TestServerOptions() {
  ServerOptions options;
  options.listen = options.admin_listen = "127.0.0.1:0";
  options.metrics_listen = "";  // its library takes two seconds to stop
  options.drain_grace = std::chrono::seconds(5);
  options.housekeeping_interval = std::chrono::milliseconds(20);
  options.controller.interval = std::chrono::milliseconds(10);
  options.access_interval = std::chrono::milliseconds(20);
  return options;
}

TestServer::TestServer(ScriptedEngine::Options engine, const ServerOptions& options, bool load)
    : model_(ScriptedModel(std::move(engine))) {
  engine_ = static_cast<ScriptedEngine*>(model_->engine.get());
  Start(options);
  if (load) Load();
}

TestServer::TestServer(std::unique_ptr<ServedModel> model, const ServerOptions& options)
    : model_(std::move(model)) {
  Start(options);
  Load();
}

void TestServer::Start(const ServerOptions& options) {
  [[maybe_unused]] static const bool once = (EnableTransportPlugins(), true);
  auto server = MobiServer::Start(options, PolicyFromFlags(8), clock_);
  if (!server.ok()) ADD_FAILURE() << server.status();
  server_ = *std::move(server);
}

void TestServer::Load() { server_->Serve(std::move(model_)); }

std::string TestServer::address() const { return absl::StrCat("127.0.0.1:", server_->data_port()); }

std::string TestServer::admin_address() const {
  return absl::StrCat("127.0.0.1:", server_->admin_port());
}

std::shared_ptr<grpc::Channel> TestServer::Channel() const { return ConnectTo(address()); }

std::unique_ptr<v1::Precision::Stub> TestServer::Admin() const {
  return v1::Precision::NewStub(ConnectTo(admin_address()));
}

std::string TestServer::MetricsText() const {
  return prometheus::TextSerializer().Serialize(server_->metrics().Collect());
}

std::shared_ptr<grpc::Channel> ConnectTo(const std::string& address,
                                         const ClientSecurity& security) {
  auto channel = Connect(address, security);
  AwaitConnection(*channel, std::chrono::minutes(4));
  return channel;
}

Collected Collect(v1::Inference::Stub& stub, const v1::GenerateRequest& request,
                  const ContextSetup& setup) {
  grpc::ClientContext context;
  if (setup) setup(context);
  Collected result;
  const size_t n = request.has_n() ? request.n() : 1;
  result.text.resize(n);
  result.token_ids.resize(n);
  result.last_chunks.resize(n);
  const auto reader = stub.Generate(&context, request);
  v1::GenerateResponse message;
  while (reader->Read(&message)) {
    result.messages.push_back(message);
    EXPECT_FALSE(result.has_summary) << "a message after the summary";
    if (message.has_prompt()) {
      EXPECT_EQ(result.messages.size(), 1u) << "the prompt is in the first message only";
      result.prompt = message.prompt();
      result.has_prompt = true;
    }
    for (const v1::Chunk& chunk : message.chunks()) {
      EXPECT_EQ(result.last_chunks[chunk.index()].finish_reason(), v1::FINISH_REASON_UNSPECIFIED)
          << "a chunk after the completion's last";
      result.text[chunk.index()] += chunk.text();
      auto& ids = result.token_ids[chunk.index()];
      ids.insert(ids.end(), chunk.token_ids().begin(), chunk.token_ids().end());
      result.last_chunks[chunk.index()] = chunk;
    }
    if (message.has_summary()) {
      result.summary = message.summary();
      result.has_summary = true;
    }
  }
  result.status = FromGrpcStatus(reader->Finish());
  return result;
}

v1::GenerateRequest TextRequest(const std::string& text, int max_new_tokens) {
  v1::GenerateRequest request;
  request.set_text(text);
  request.set_max_new_tokens(max_new_tokens);
  return request;
}

bool Eventually(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(4);
  while (std::chrono::steady_clock::now() < deadline) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return condition();
}

}  // namespace mobi
