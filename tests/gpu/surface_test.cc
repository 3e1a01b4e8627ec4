// A server that has measured its own steps serves on the backend that they ran on.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/step_surface.h"
#include "tests/engine/collecting_sink.h"
#include "tests/engine/loaded_engine.h"
#include "tests/paths.h"

namespace mobi {
namespace {

GenerationRequest Completion(int first_token) {
  GenerationRequest request;
  request.prompt = {first_token, 7, 11};
  request.max_new_tokens = 20;
  request.sampling.temperature = 0;
  request.ignore_eos = true;
  return request;
}

// Steps of the measurement are recorded; those of the engine, whose memory is elsewhere, have keys
// like theirs.
TEST(Surface, AnEngineAfterAMeasuredSurfaceGivesTheTokensOfOneWithout) {
  std::vector<std::vector<int32_t>> tokens[2];
  for (const bool measured : {false, true}) {
    auto backend = CreateCudaBackend({});
    if (!backend.ok()) GTEST_SKIP() << "NOT COMPARED: " << backend.status().message();
    const std::string dir = std::string(MOBI_SOURCE_DIR) + "/deploy/demo/checkpoint";
    auto checkpoint = Checkpoint::Open(dir, {});
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    auto model = Model::Load(*checkpoint, **backend, 0);
    ASSERT_TRUE(model.ok()) << model.status();
    EngineOptions options;
    options.coherent_decode = true;
    RealClock clock;
    if (measured) {
      const SurfaceOptions surface{
          .sequences = {1, 4}, .coherent = true, .per_point = std::chrono::milliseconds(1)};
      const auto rows = MeasureSurface(**model, *checkpoint, surface, clock, {});
      ASSERT_TRUE(rows.ok()) << rows.status();
    }
    auto engine = Engine::Create(options, **model, *checkpoint, **backend, clock);
    ASSERT_TRUE(engine.ok()) << engine.status();
    for (const float bits : {2.0f, 3.0f, 8.0f}) {
      (*engine)->SetPrecision({.target_bits = bits});
      CollectingSink sink;
      ASSERT_TRUE((*engine)->Submit(Completion(static_cast<int>(bits)), &sink).ok());
      ASSERT_TRUE(sink.Wait().status.ok()) << sink.Wait().status << " at " << bits << " bits";
      tokens[measured].push_back(sink.completions[0]);
    }
  }
  EXPECT_EQ(tokens[1], tokens[0]);
}

}  // namespace
}  // namespace mobi
