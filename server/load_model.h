// From a model folder to a ServedModel, in two steps: opening checks everything that can be checked
// without a device and without reading weights, and takes well below a second; loading reads them
// all, checks their sums, moves them and allocates the KV cache.
#ifndef MOBI_SERVER_LOAD_MODEL_H_
#define MOBI_SERVER_LOAD_MODEL_H_

#include <cstdint>
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
  // Weights are read past the page cache where they are not in it. Slices that leave then come back
  // from the disk.
  bool direct_io = false;
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

// Of the files, read, checked and moved.
using LoadProgress = std::function<void(uint64_t bytes, uint64_t of)>;

// The files are read once, and their sums are made of what moves; nothing is served before they are
// right. UNAVAILABLE: no such device. RESOURCE_EXHAUSTED: it does not fit. DATA_LOSS: a file is not
// MANIFEST's. `progress` is called by one thread at a time. `clock` outlives the model.
absl::StatusOr<std::unique_ptr<ServedModel>> LoadModel(const LoadOptions& options,
                                                       OpenedModel opened, const Clock& clock,
                                                       const LoadProgress& progress);

// Of a Llama with this configuration; tied embeddings count once.
int64_t NumParameters(const ModelConfig& config);

// What a person calls the model in `dir`.
std::string ModelNameOf(const std::string& dir);

}  // namespace mobi

#endif  // MOBI_SERVER_LOAD_MODEL_H_
