// From a model folder to a ServedModel, in two steps: opening checks everything that can be checked
// without a device and takes well below a second; loading moves weights and allocates the KV cache.
#ifndef MOBI_SERVER_LOAD_MODEL_H_
#define MOBI_SERVER_LOAD_MODEL_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "engine/checkpoint.h"
#include "engine/engine.h"
#include "server/served_model.h"

namespace mobi {

struct LoadOptions {
  std::string dir;
  std::string name;  // empty: the folder's, or its parent's when it is "checkpoint" or "model"
  bool verify_manifest = true;
  std::string device = "cpu";  // cpu, cuda, or auto: cuda where there is a usable GPU
  int threads = 0;             // of the CPU backend; 0: one per core
  EngineOptions engine;
  // Time to measure the step latency surface in, of a MoBiQuant checkpoint; zero: it is not
  // measured.
  Duration surface_limit{};
};

struct OpenedModel {
  Checkpoint checkpoint;
  std::unique_ptr<Tokenizer> tokenizer;
};

// One line with file, field and reason.
absl::StatusOr<OpenedModel> OpenModel(const LoadOptions& options);

// UNAVAILABLE: no such device. RESOURCE_EXHAUSTED: it does not fit. `progress` hears layers done
// and their number. `clock` outlives the model.
absl::StatusOr<std::unique_ptr<ServedModel>> LoadModel(
    const LoadOptions& options, OpenedModel opened, const Clock& clock,
    const std::function<void(int done, int total)>& progress);

// Of a Llama with this configuration; tied embeddings count once.
int64_t NumParameters(const ModelConfig& config);

// What a person calls the model in `dir`.
std::string ModelNameOf(const std::string& dir);

}  // namespace mobi

#endif  // MOBI_SERVER_LOAD_MODEL_H_
