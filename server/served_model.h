// A loaded model with everything that serves it, in the order that destruction needs reversed: the
// engine stops first, then weights, device and text go. Owned by the main; services borrow it.
#ifndef MOBI_SERVER_SERVED_MODEL_H_
#define MOBI_SERVER_SERVED_MODEL_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "engine/chat_template.h"
#include "engine/checkpoint.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/model_config.h"
#include "engine/tokenizer.h"
#include "kernels/backend.h"
#include "server/controller.h"
#include "server/pressure_surface.h"

namespace mobi {

struct ModelInfo {
  std::string name;
  std::string backend;
  std::string device;
  ModelConfig config;
  int64_t num_parameters = 0;
  bool elastic = false;
  PriceTables prices;  // empty when not elastic
  EngineOptions engine_options;
  std::optional<StepSurface> surface;  // where it was measured
};

struct ServedModel {
  ModelInfo info;
  std::unique_ptr<Tokenizer> tokenizer;
  // FAILED_PRECONDITION or INVALID_ARGUMENT: why chats are refused.
  absl::StatusOr<ChatTemplate> chat_template = absl::FailedPreconditionError("no chat template");
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Checkpoint> checkpoint;  // kept where slices may have to be read again
  std::unique_ptr<Model> model;
  std::unique_ptr<Engine> engine;
};

}  // namespace mobi

#endif  // MOBI_SERVER_SERVED_MODEL_H_
