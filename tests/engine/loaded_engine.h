// A real engine over a model folder, on the CPU unless told otherwise, for tests.
#ifndef MOBI_TESTS_ENGINE_LOADED_ENGINE_H_
#define MOBI_TESTS_ENGINE_LOADED_ENGINE_H_

#include <memory>
#include <string>
#include <utility>

#include "engine/base/status_macros.h"
#include "engine/checkpoint.h"
#include "engine/engine.h"
#include "engine/model.h"

namespace mobi {

struct LoadedEngine {
  std::unique_ptr<Backend> backend;
  RealClock clock;
  std::unique_ptr<Model> model;
  std::unique_ptr<Engine> engine;  // destroyed first

  static absl::StatusOr<std::unique_ptr<LoadedEngine>> Open(
      const std::string& dir, const EngineOptions& options = {},
      std::unique_ptr<Backend> backend = CreateCpuBackend({})) {
    auto loaded = std::make_unique<LoadedEngine>();
    MOBI_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(dir, {}));
    loaded->backend = std::move(backend);
    MOBI_ASSIGN_OR_RETURN(loaded->model, Model::Load(checkpoint, *loaded->backend, 0));
    MOBI_ASSIGN_OR_RETURN(loaded->engine, Engine::Create(options, *loaded->model, checkpoint,
                                                         *loaded->backend, loaded->clock));
    return loaded;
  }
};

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_LOADED_ENGINE_H_
