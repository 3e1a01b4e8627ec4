#include "server/kserve_service.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Service = inference::GRPCInferenceService;

TEST(KserveService, HealthFollowsTheServer) {
  TestServer server({.script = Says("x")}, TestServerOptions(), /*load=*/false);
  const auto stub = Service::NewStub(server.Channel());
  const auto ready = [&] {
    grpc::ClientContext context;
    inference::ServerReadyResponse response;
    EXPECT_TRUE(stub->ServerReady(&context, {}, &response).ok());
    return response.ready();
  };
  const auto model_ready = [&](const std::string& name, const std::string& version = "") {
    grpc::ClientContext context;
    inference::ModelReadyRequest request;
    request.set_name(name);
    request.set_version(version);
    inference::ModelReadyResponse response;
    EXPECT_TRUE(stub->ModelReady(&context, request, &response).ok());
    return response.ready();
  };
  grpc::ClientContext context;
  inference::ServerLiveResponse live;
  EXPECT_TRUE(stub->ServerLive(&context, {}, &live).ok());
  EXPECT_TRUE(live.live());
  EXPECT_FALSE(ready());
  EXPECT_FALSE(model_ready("scripted"));
  server.Load();
  EXPECT_TRUE(ready());
  EXPECT_TRUE(model_ready("scripted"));
  EXPECT_TRUE(model_ready("scripted", "1"));
  EXPECT_FALSE(model_ready("scripted", "2"));
  EXPECT_FALSE(model_ready("other"));
  EXPECT_FALSE(model_ready(""));
  server.server().Drain();
  EXPECT_FALSE(ready());
  EXPECT_FALSE(model_ready("scripted"));
}

TEST(KserveService, MetadataTellsThePrecision) {
  TestServer server({.script = Says("x")});
  const auto stub = Service::NewStub(server.Channel());
  {
    grpc::ClientContext context;
    inference::ServerMetadataResponse response;
    ASSERT_TRUE(stub->ServerMetadata(&context, {}, &response).ok());
    EXPECT_EQ(response.name(), "mobi-server");
    EXPECT_FALSE(response.version().empty());
  }
  grpc::ClientContext context;
  inference::ModelMetadataRequest request;
  request.set_name("scripted");
  inference::ModelMetadataResponse response;
  ASSERT_TRUE(stub->ModelMetadata(&context, request, &response).ok());
  EXPECT_EQ(response.name(), "scripted");
  EXPECT_THAT(response.versions(), ElementsAre("1"));
  EXPECT_EQ(response.platform(), "mobiserve_scripted");
  EXPECT_EQ(response.inputs(0).datatype(), "BYTES");
  EXPECT_THAT(response.outputs(0).shape(), ElementsAre(-1));
  const auto& metadata = context.GetServerInitialMetadata();
  const auto value = [&](const char* key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? "" : std::string(found->second.data(), found->second.size());
  };
  EXPECT_EQ(value("mobi-elastic"), "true");
  EXPECT_EQ(value("mobi-min-bits"), "2");
  EXPECT_EQ(value("mobi-max-bits"), "8");
  EXPECT_EQ(value("mobi-target-bits"), "8");
  EXPECT_NE(value("mobi-effective-bits"), "");
  grpc::ClientContext other_context;
  request.set_name("other");
  const grpc::Status refused = stub->ModelMetadata(&other_context, request, &response);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(refused.error_message(), HasSubstr("\"scripted\""));
}

}  // namespace
}  // namespace mobi
