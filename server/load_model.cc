#include "server/load_model.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/step_surface.h"
#include "kernels/create_backend.h"

namespace mobi {

namespace {

// Before the engine takes its memory.
absl::StatusOr<StepSurface> SurfaceOf(const LoadOptions& options, const Model& model,
                                      const Checkpoint& checkpoint, const Clock& clock) {
  constexpr int kContext = 256;
  SurfaceOptions surface;
  surface.coherent = options.engine.coherent_decode;
  surface.whole_level_decodes = options.engine.whole_level_decodes;
  surface.context = std::min(kContext, model.max_positions());
  surface.limit = options.surface_limit;
  const int points = static_cast<int>(surface.bits.size() * surface.sequences.size());
  surface.per_point = options.surface_limit / (4 * points);
  std::erase_if(surface.sequences, [&](int n) { return n > options.engine.max_num_seqs; });
  MOBI_ASSIGN_OR_RETURN(const std::vector<SurfaceRow> rows,
                        MeasureSurface(model, checkpoint, surface, clock, {}));
  std::vector<double> tokens;
  std::vector<std::vector<double>> step_ms(surface.bits.size());
  for (const SurfaceRow& row : rows) {
    tokens.push_back(row.sequences);
    for (size_t i = 0; i < step_ms.size(); ++i) step_ms[i].push_back(row.milliseconds[i]);
  }
  return StepSurface::Create({surface.bits.begin(), surface.bits.end()}, std::move(tokens),
                             std::move(step_ms));
}

absl::StatusOr<std::unique_ptr<Model>> ReadModel(const LoadOptions& options,
                                                 const Checkpoint& checkpoint, Backend& backend,
                                                 const LoadProgress& progress) {
  const ModelConfig& config = checkpoint.config();
  const int positions = options.engine.max_model_len > 0 ? options.engine.max_model_len
                                                         : config.max_position_embeddings;
  MOBI_RETURN_IF_ERROR(
      CheckEngineOptions(options.engine, config, positions, backend.activation_dtype()).status());
  return Model::Load(
      checkpoint, backend, positions,
      {.verify = options.verify_manifest, .direct = options.direct_io, .progress = progress});
}

}  // namespace

absl::StatusOr<OpenedModel> OpenModel(const LoadOptions& options) {
  MOBI_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(options.dir, {}));
  MOBI_ASSIGN_OR_RETURN(auto tokenizer, Tokenizer::Load(options.dir));
  if (tokenizer->vocab_size() > checkpoint.config().vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.dir, "/tokenizer.json: ids up to ", tokenizer->vocab_size() - 1,
                     ", but config.json has vocab_size ", checkpoint.config().vocab_size));
  }
  return OpenedModel{std::move(checkpoint), std::move(tokenizer)};
}

absl::StatusOr<std::unique_ptr<ServedModel>> LoadModel(const LoadOptions& options,
                                                       OpenedModel opened, const Clock& clock,
                                                       const LoadProgress& progress) {
  auto served = std::make_unique<ServedModel>();
  MOBI_ASSIGN_OR_RETURN(served->backend, CreateBackend(options.device, options.threads));
  served->checkpoint = std::make_unique<Checkpoint>(std::move(opened.checkpoint));
  const Checkpoint& checkpoint = *served->checkpoint;
  MOBI_ASSIGN_OR_RETURN(served->model, ReadModel(options, checkpoint, *served->backend, progress));
  if (options.surface_limit > Duration::zero() && checkpoint.quantized()) {
    MOBI_ASSIGN_OR_RETURN(served->info.surface,
                          SurfaceOf(options, *served->model, checkpoint, clock));
  }
  MOBI_ASSIGN_OR_RETURN(served->engine, Engine::Create(options.engine, *served->model, checkpoint,
                                                       *served->backend, clock));
  served->tokenizer = std::move(opened.tokenizer);
  // Models without a template, or with one that we do not know, serve text.
  served->chat_template = ChatTemplate::Create(*served->tokenizer);
  ModelInfo& info = served->info;
  info.name = options.name.empty() ? ModelNameOf(options.dir) : options.name;
  info.backend = std::string(served->backend->name());
  info.device = served->backend->description();
  info.config = checkpoint.config();
  info.num_parameters = NumParameters(info.config);
  info.elastic = checkpoint.quantized();
  const auto token = checkpoint.price_table();
  const auto coherent = checkpoint.coherent_price_table();
  info.prices = {{token.begin(), token.end()}, {coherent.begin(), coherent.end()}};
  info.engine_options = options.engine;
  checkpoint.ReleasePages();  // the backend has copies
  if (!options.engine.residency.enabled || !served->model->slice_planes().can_drop().ok()) {
    served->checkpoint.reset();
  }
  return served;
}

int64_t NumParameters(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size;
  const int64_t attention = hidden * (2 * config.attention_size() + 2 * config.key_value_size());
  const int64_t mlp = 3 * hidden * config.intermediate_size;
  const int64_t embeddings = hidden * config.vocab_size * (config.tie_word_embeddings ? 1 : 2);
  return embeddings + config.num_hidden_layers * (attention + mlp + 2 * hidden) + hidden;
}

std::string ModelNameOf(const std::string& dir) {
  std::filesystem::path path = std::filesystem::path(dir).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();  // a trailing slash
  const bool generic = path.filename() == "checkpoint" || path.filename() == "model";
  if (generic && path.has_parent_path()) path = path.parent_path();
  const std::string name = path.filename().string();
  return name.empty() || name == "." || name == ".." ? "model" : name;
}

}  // namespace mobi
