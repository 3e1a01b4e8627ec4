#include "calibrator/calibrate.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "calibrator/fit_journal.h"
#include "calibrator/float_model.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/lm_head_fit.h"
#include "calibrator/packing.h"
#include "calibrator/parallel.h"
#include "calibrator/price_table.h"
#include "calibrator/scale_tuning.h"
#include "engine/base/sha256.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint.h"
#include "engine/checkpoint_writer.h"
#include "engine/tokenizer.h"
#include "kernels/numeric.h"

namespace mobi {
namespace {

constexpr int64_t kDefaultSeqLen = 1024;
constexpr int64_t kMinSeqLen = 32;
// Positions of each sampled sequence whose losses the price forecast is made from.
constexpr int64_t kForecastPositions = 64;
// Time of the later phases beside one block's fit, for the estimate of what is left: per block, and
// per block and sequence of a tuning step; for lm_head, beside a block of as many weights: it has
// one stream, of fewer tokens.
constexpr double kSampleUnits = 0.3, kPriceUnits = 0.1, kTuningUnits = 0.003, kLmHeadUnits = 0.4;

// Stages of the journal.
constexpr std::string_view kFitted = "fitted", kTuned = "tuned", kHeadPiece = "lm_head";

double LmHeadUnits(const Recipe& recipe, const ModelConfig& config) {
  if (!recipe.lm_head.slices) return 0;
  int64_t block = 0;
  for (const RoutedGroup& group : RoutedGroupsOfLayer(config, 0)) {
    for (const LinearShape& linear : group.linears) block += linear.rows * linear.cols;
  }
  return kLmHeadUnits * static_cast<double>(int64_t{config.vocab_size} * config.hidden_size) /
         static_cast<double>(block);
}

template <typename T>
absl::Span<const std::byte> Bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

// Everything between reading the source and committing the result.
class Calibration {
 public:
  Calibration(const CalibrateOptions& options, const Checkpoint& source, FloatModel model,
              std::vector<int32_t> ids, int64_t seq_len, FitJournal& journal, Progress& progress)
      : options_(options),
        source_(source),
        model_(std::move(model)),
        ids_(std::move(ids)),
        seq_len_(seq_len),
        journal_(journal),
        progress_(progress) {}

  absl::Status Run();

 private:
  // True when all blocks of the stage were there.
  bool LoadBlocks(std::string_view stage);
  // Gives what the float model has behind its last block for the fitted windows, if it ran.
  absl::StatusOr<Matrix> FitBlocks();
  // Leaves the block in the journal.
  absl::Status FitBlock(int layer, const BlockCalibrationOptions& options,
                        CalibrationStreams& streams);
  absl::Status TuneBlocks(Matrix float_hidden);
  absl::Status FitLmHead();
  RouterTrainingOptions RouterTraining() const;
  absl::Status TrainRouters();
  absl::Status WriteCheckpoint();
  absl::Status WriteBlock(int layer, CheckpointWriter& writer);
  absl::Status WriteRouter(const std::string& name, const RouterWeights& router,
                           CheckpointWriter& writer);
  void RecordLosses(const RoutedGroup& group, const RouterWeights& router,
                    const RoutingSamples& samples);
  absl::Status MeasurePrices();
  nlohmann::json Description() const;
  // CANCELLED once the caller asked to stop.
  absl::Status CheckInterrupt() const {
    if (!options_.interrupted || !options_.interrupted()) return absl::OkStatus();
    return absl::CancelledError(absl::StrCat("interrupted; the same command goes on from ",
                                             options_.output_dir, ".progress"));
  }
  double TuningUnits() const {
    const ScaleTuningOptions& tuning = options_.recipe.tuning;
    return kTuningUnits * model_.num_layers() * tuning.steps * tuning.batch;
  }
  int64_t num_sequences() const { return static_cast<int64_t>(ids_.size()) / seq_len_; }
  int64_t num_routing_sequences() const {
    return std::min(options_.recipe.routing.sequences, num_sequences());
  }
  int64_t num_fit_sequences() const {
    const int64_t wanted = options_.recipe.fit_sequences;
    return wanted > 0 ? std::min(wanted, num_sequences()) : num_sequences();
  }
  // Tokens of a sequence that blocks are fitted on, from its start.
  int64_t fit_positions() const {
    const int64_t wanted = options_.recipe.fit_positions;
    return wanted > 0 ? std::min(wanted, seq_len_) : seq_len_;
  }
  absl::Span<const int32_t> FirstSequences(int64_t count) const {
    return absl::MakeConstSpan(ids_).subspan(0, static_cast<size_t>(count * seq_len_));
  }

  const CalibrateOptions& options_;
  const Checkpoint& source_;
  const FloatModel model_;
  const std::vector<int32_t> ids_;
  const int64_t seq_len_;
  FitJournal& journal_;
  Progress& progress_;

  std::vector<FittedBlock> blocks_;
  std::optional<LmHeadFit> lm_head_;  // when the recipe wants it in slices
  std::vector<BlockRouters> routers_;
  std::vector<RecordedLosses> recorded_;
  std::vector<PricePoint> token_prices_, coherent_prices_;
};

bool Calibration::LoadBlocks(std::string_view stage) {
  blocks_.clear();
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    auto block = journal_.Load(stage, layer, model_.config());
    if (!block) return false;
    blocks_.push_back(*std::move(block));
  }
  return true;
}

absl::StatusOr<Matrix> Calibration::FitBlocks() {
  if (LoadBlocks(kFitted)) {
    progress_.Advance(model_.num_layers(), "blocks were fitted before");
    return Matrix();
  }
  BlockCalibrationOptions options = options_.recipe.blocks;
  options.num_threads = options_.num_threads;
  options.clipping.gates = options_.recipe.routing.gates;
  options.clipping.gate_sequences = options_.recipe.routing.sequences;
  options.clipping.gate_training = RouterTraining();
  CalibrationStreams streams;
  streams.seq_len = fit_positions();
  streams.float_hidden = Matrix(num_fit_sequences() * streams.seq_len, model_.config().hidden_size);
  for (int64_t s = 0; s < num_fit_sequences(); ++s) {
    model_.Embed(absl::MakeConstSpan(ids_).subspan(static_cast<size_t>(s * seq_len_),
                                                   static_cast<size_t>(streams.seq_len)),
                 MatrixView(streams.float_hidden).Rows(s * streams.seq_len, streams.seq_len));
  }
  streams.hidden.assign(options.stream_levels.size(), streams.float_hidden);
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    const absl::Status status = FitBlock(layer, options, streams);
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat(options_.model_dir, ": layer ", layer, ": ",
                                                      status.message()));
    }
  }
  // Blocks are in memory only when the levels' streams no longer are.
  Matrix float_hidden = std::move(streams.float_hidden);
  streams = {};
  if (LoadBlocks(kFitted)) return float_hidden;
  return absl::DataLossError(absl::StrCat(options_.output_dir,
                                          ".progress: a block written there "
                                          "can no longer be read"));
}

absl::Status Calibration::FitBlock(int layer, const BlockCalibrationOptions& options,
                                   CalibrationStreams& streams) {
  MOBI_ASSIGN_OR_RETURN(const BlockWeights weights, model_.LoadBlock(layer));
  const std::string name = absl::StrCat("block ", layer + 1, "/", model_.num_layers());
  if (auto saved = journal_.Load(kFitted, layer, model_.config())) {
    AdvanceStreams(model_.config(), weights, model_.rope(), options, *saved, streams);
    progress_.Advance(1, name + " was fitted before");
    return absl::OkStatus();
  }
  const auto on_part = [&](const std::string& what, double share) {
    progress_.Advance(share, absl::StrCat(name, " ", what));
    return CheckInterrupt();
  };
  MOBI_ASSIGN_OR_RETURN(
      const FittedBlock block,
      CalibrateBlock(model_.config(), weights, model_.rope(), options, streams, on_part));
  return journal_.Save(kFitted, layer, block);
}

absl::Status Calibration::TuneBlocks(Matrix float_hidden) {
  ScaleTuningOptions options = options_.recipe.tuning;
  options.seed = options_.seed;
  options.num_threads = options_.num_threads;
  if (options.steps == 0) return absl::OkStatus();
  const double gib = TuningGib(model_.config(), options);
  if (gib > options.max_memory_gib) {
    progress_.Advance(TuningUnits(), absl::StrFormat("no tuning: it would need %.0f GiB, "
                                                     "tuning.max_memory_gib is %d",
                                                     std::ceil(gib), options.max_memory_gib));
    return absl::OkStatus();
  }
  const auto on_step = [&](int step, double kl) {
    progress_.Advance(
        TuningUnits() / options.steps,
        absl::StrCat("tuning step ", step + 1, "/", options.steps, " KL ", absl::SixDigits(kl)));
    return CheckInterrupt();
  };
  // The fitted windows are the first that tuning reads, if they are as long.
  if (std::min<int64_t>(options.positions, seq_len_) != fit_positions()) float_hidden = {};
  MOBI_RETURN_IF_ERROR(
      TuneScales(model_, ids_, seq_len_, options, std::move(float_hidden), on_step, blocks_));
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    MOBI_RETURN_IF_ERROR(journal_.Save(kTuned, layer, blocks_[layer]));
  }
  return absl::OkStatus();
}

absl::Status Calibration::FitLmHead() {
  const Recipe& recipe = options_.recipe;
  if (!recipe.lm_head.slices) return absl::OkStatus();
  RoutingSampleOptions sampling = recipe.routing.samples;
  sampling.seed = options_.seed;
  sampling.num_threads = options_.num_threads;
  MOBI_ASSIGN_OR_RETURN(Matrix inputs,
                        QuantizedHidden(model_, blocks_, FirstSequences(num_routing_sequences()),
                                        seq_len_, sampling));
  model_.Normalise(inputs, inputs);
  BlockCalibrationOptions fit = recipe.blocks;
  fit.num_threads = options_.num_threads;
  lm_head_.emplace(model_, recipe.lm_head, fit, inputs);
  const int pieces = lm_head_->num_pieces();
  for (int piece = 0; piece < pieces; ++piece) {
    auto weight = journal_.LoadWeight(kHeadPiece, piece, lm_head_->PieceRows(piece), inputs.cols());
    if (!weight) {
      MOBI_ASSIGN_OR_RETURN(weight, lm_head_->Fit(piece));
      MOBI_RETURN_IF_ERROR(journal_.SaveWeight(kHeadPiece, piece, *weight));
    }
    lm_head_->Take(piece, *weight);
    progress_.Advance(LmHeadUnits(recipe, model_.config()) / pieces,
                      absl::StrCat("lm_head ", piece + 1, "/", pieces));
    MOBI_RETURN_IF_ERROR(CheckInterrupt());
  }
  return absl::OkStatus();
}

absl::Status Calibration::WriteBlock(int layer, CheckpointWriter& writer) {
  const auto groups = RoutedGroupsOfLayer(model_.config(), layer);
  for (int g = 0; g < kNumLinearGroups; ++g) {
    int64_t begin = 0;
    for (const LinearShape& linear : groups[g].linears) {
      const PackedLinear packed = PackLinear(blocks_[layer].linear[g], begin, linear.rows);
      MOBI_RETURN_IF_ERROR(writer.AddSliced(linear.name, packed.view()));
      begin += linear.rows;
    }
    MOBI_RETURN_IF_ERROR(WriteRouter(groups[g].router, routers_[layer][g], writer));
  }
  return absl::OkStatus();
}

RouterTrainingOptions Calibration::RouterTraining() const {
  const RoutingOptions& routing = options_.recipe.routing;
  RouterTrainingOptions training = routing.training;
  training.seed = options_.seed;
  training.num_hidden = RouterHiddenUnits(model_.config(), routing.byte_share_bits,
                                          routing.byte_share, routing.max_hidden);
  return training;
}

absl::Status Calibration::TrainRouters() {
  const RoutingOptions& routing = options_.recipe.routing;
  routers_.resize(static_cast<size_t>(model_.num_layers()));
  RoutingSampleOptions sampling = routing.samples;
  sampling.seed = options_.seed;
  sampling.num_threads = options_.num_threads;
  const RouterTrainingOptions training = RouterTraining();
  const auto on_layer = [&](int layer,
                            std::array<RoutingSamples, kNumLinearGroups>& samples) -> absl::Status {
    const auto groups = RoutedGroupsOfLayer(model_.config(), layer);
    ParallelFor(options_.num_threads, kNumLinearGroups, [&](int64_t g) {
      routers_[layer][g] = routing.method == RoutingMethod::kGates
                               ? TrainGates(samples[g], CostsOf(groups[g]), training, routing.gates)
                               : TrainRouter(samples[g], training);
    });
    for (int g = 0; g < kNumLinearGroups; ++g) {
      RecordLosses(groups[g], routers_[layer][g], samples[g]);
    }
    progress_.Advance(kSampleUnits, absl::StrCat("routers of block ", layer + 1));
    return CheckInterrupt();
  };
  return SampleRouting(model_, blocks_, FirstSequences(num_routing_sequences()), seq_len_, sampling,
                       on_layer);
}

absl::Status Calibration::WriteRouter(const std::string& name, const RouterWeights& router,
                                      CheckpointWriter& writer) {
  std::vector<uint16_t> w1;
  for (int64_t i = 0; i < router.w1.size(); ++i) w1.push_back(FloatToHalf(router.w1.data()[i]));
  const std::vector<float> w2(router.w2.data(), router.w2.data() + router.w2.size());
  const int64_t hidden = router.w1.rows(), outputs = router.w2.rows();
  RouterTensors tensors;
  tensors.num_hidden = static_cast<int>(hidden);
  tensors.num_segments = static_cast<int>(outputs / kNumLevels);
  tensors.w1 = {"w1", DType::kF16, {hidden, router.w1.cols()}, Bytes(w1)};
  tensors.b1 = {"b1", DType::kF32, {hidden}, Bytes(router.b1)};
  tensors.u = {"u", DType::kF32, {hidden}, Bytes(router.u)};
  tensors.w2 = {"w2", DType::kF32, {outputs, hidden}, Bytes(w2)};
  tensors.b2 = {"b2", DType::kF32, {outputs}, Bytes(router.b2)};
  return writer.AddRouter(name, tensors);
}

void Calibration::RecordLosses(const RoutedGroup& group, const RouterWeights& router,
                               const RoutingSamples& samples) {
  const int64_t positions = std::min(kForecastPositions, seq_len_);
  const int64_t sequences = num_routing_sequences();
  Matrix inputs(sequences * positions, samples.inputs.cols());
  for (int64_t t = 0; t < inputs.rows(); ++t) {
    const int64_t position = t % positions * seq_len_ / positions;
    std::copy_n(samples.inputs.Row(t / positions * seq_len_ + position), inputs.cols(),
                inputs.Row(t));
  }
  RecordedLosses recorded{RouterScores(router, inputs), CostsOf(group)};
  for (int64_t i = 0; i < recorded.losses.size(); ++i) {
    recorded.losses.data()[i] = std::exp(recorded.losses.data()[i]);
  }
  recorded_.push_back(std::move(recorded));
}

absl::Status Calibration::MeasurePrices() {
  const int batch = static_cast<int>(num_routing_sequences());
  const int64_t length = std::min(options_.recipe.routing.price_tokens, seq_len_);
  std::vector<int32_t> ids;
  for (int64_t s = 0; s < batch; ++s) {
    const auto begin = ids_.begin() + s * seq_len_;
    ids.insert(ids.end(), begin, begin + length);
  }
  std::vector<PriceJob> jobs;
  for (const double price : ProbePrices(recorded_, 1)) jobs.push_back({price, {false, length}});
  const auto num_token_jobs = static_cast<std::ptrdiff_t>(jobs.size());
  for (const double price : ProbePrices(recorded_, batch)) jobs.push_back({price, {true, length}});
  MOBI_RETURN_IF_ERROR(
      MeasureBits(model_, blocks_, routers_, ids, length, options_.num_threads, jobs));
  token_prices_ = BuildPriceTable(recorded_, 1, {jobs.begin(), jobs.begin() + num_token_jobs});
  coherent_prices_ = BuildPriceTable(recorded_, batch, {jobs.begin() + num_token_jobs, jobs.end()});
  progress_.Advance(kPriceUnits * model_.num_layers(), "price table");
  return absl::OkStatus();
}

nlohmann::json Calibration::Description() const {
  const auto table = [](const std::vector<PricePoint>& points) {
    nlohmann::json json = nlohmann::json::array();
    for (const PricePoint& point : points) json.push_back({point.bits, point.price});
    return json;
  };
  nlohmann::json data = nlohmann::json::array();
  for (const std::string& path : options_.data_paths) {
    data.push_back(std::filesystem::path(path).filename().string());
  }
  nlohmann::json description = {
      {"price_table",
       {{"token", table(token_prices_)},
        {"coherent", {{"batch", num_routing_sequences()}, {"table", table(coherent_prices_)}}}}},
      {"recipe", RecipeToJson(options_.recipe)},
      {"calibration",
       {{"data", data},
        {"samples", num_sequences()},
        {"seq_len", seq_len_},
        {"seed", options_.seed},
        {"router_hidden", routers_.front().front().num_hidden()}}}};
  if (lm_head_.has_value()) {
    description["lm_head"] = {{"min_level", options_.recipe.lm_head.min_level},
                              {"loss", lm_head_->Losses()}};
  }
  return description;
}

absl::Status Calibration::WriteCheckpoint() {
  MOBI_ASSIGN_OR_RETURN(const auto writer,
                        CheckpointWriter::Create(source_, {.output_dir = options_.output_dir,
                                                           .overwrite = options_.overwrite}));
  MOBI_RETURN_IF_ERROR(writer->AddUnquantized(lm_head_.has_value()));
  if (lm_head_.has_value()) {
    const NestedWeight& head = lm_head_->weight();
    MOBI_RETURN_IF_ERROR(writer->AddSliced(kLmHead, PackLinear(head, 0, head.rows).view()));
  }
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    MOBI_RETURN_IF_ERROR(WriteBlock(layer, *writer));
  }
  return writer->Commit(Description());
}

absl::Status Calibration::Run() {
  if (!LoadBlocks(kTuned)) {
    MOBI_ASSIGN_OR_RETURN(Matrix float_hidden, FitBlocks());
    MOBI_RETURN_IF_ERROR(TuneBlocks(std::move(float_hidden)));
  } else {
    progress_.Advance(model_.num_layers() + TuningUnits(), "blocks were fitted and tuned before");
  }
  MOBI_RETURN_IF_ERROR(FitLmHead());
  MOBI_RETURN_IF_ERROR(TrainRouters());
  MOBI_RETURN_IF_ERROR(MeasurePrices());
  return WriteCheckpoint();
}

absl::StatusOr<std::vector<int32_t>> ReadTokens(const CalibrateOptions& options,
                                                const ModelConfig& config, int64_t seq_len) {
  MOBI_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(options.model_dir));
  std::vector<std::vector<int32_t>> texts;
  for (const std::string& path : options.data_paths) {
    MOBI_ASSIGN_OR_RETURN(const std::string text, ReadText(path, options.layout));
    MOBI_ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                          tokenizer->Encode(text, {.add_special_tokens = false}));
    for (const int32_t id : ids) {
      if (id < config.vocab_size) continue;
      return absl::InvalidArgumentError(absl::StrCat(options.model_dir, ": the tokenizer gives id ",
                                                     id, ", the model's vocab_size is ",
                                                     config.vocab_size));
    }
    texts.push_back(std::move(ids));
  }
  return DrawWindows(texts, options.num_samples, seq_len, tokenizer->bos_id().value_or(-1),
                     options.seed);
}

// What the fitted blocks depend on: the model's files, the tokens, the recipe.
absl::StatusOr<std::string> JournalKey(const CalibrateOptions& options, int64_t seq_len,
                                       const std::vector<int32_t>& ids) {
  nlohmann::json key = {{"recipe", RecipeToJson(options.recipe)},
                        {"seed", options.seed},
                        {"seq_len", seq_len},
                        {"format", 1}};
  Sha256 tokens;
  tokens.Update(Bytes(ids));
  key["tokens"] = tokens.HexDigest();
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(options.model_dir, error)) {
    const std::string name = entry.path().filename().string();
    if (entry.path().extension() != ".safetensors" && name != "config.json") continue;
    MOBI_ASSIGN_OR_RETURN(key["model"][name], Sha256OfFile(entry.path().string()));
  }
  if (error) return absl::ErrnoToStatus(error.value(), options.model_dir);
  return key.dump(1);
}

// An interruption or a full disk leaves the journal for the next try; a finished checkpoint and
// input that can never work leave nothing.
bool CanGoOn(const absl::Status& status) {
  return !status.ok() && !absl::IsInvalidArgument(status) && !absl::IsFailedPrecondition(status);
}

}  // namespace

absl::Status Calibrate(const CalibrateOptions& options, const Clock& clock, std::FILE* progress_out,
                       bool progress_is_terminal) {
  MOBI_ASSIGN_OR_RETURN(const Checkpoint source, Checkpoint::Open(options.model_dir, {}));
  const ModelConfig& config = source.config();
  const int64_t seq_len = options.seq_len > 0
                              ? options.seq_len
                              : std::min<int64_t>(kDefaultSeqLen, config.max_position_embeddings);
  if (seq_len < kMinSeqLen || seq_len > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("seq-len ", seq_len, " is not within ",
                                                   kMinSeqLen, " and the model's ",
                                                   config.max_position_embeddings));
  }
  // Whatever is in the way of the output is found now, not after the work.
  MOBI_RETURN_IF_ERROR(CheckpointWriter::Create(source, {.output_dir = options.output_dir,
                                                         .overwrite = options.overwrite})
                           .status());
  MOBI_ASSIGN_OR_RETURN(std::vector<int32_t> ids, ReadTokens(options, config, seq_len));
  MOBI_ASSIGN_OR_RETURN(FloatModel model, FloatModel::Open(source, static_cast<int>(seq_len)));
  MOBI_ASSIGN_OR_RETURN(std::string key, JournalKey(options, seq_len, ids));
  MOBI_ASSIGN_OR_RETURN(FitJournal journal, FitJournal::Open(options.output_dir, std::move(key)));
  SetBlasThreads(options.num_threads);
  const ScaleTuningOptions& tuning = options.recipe.tuning;
  Progress progress(config.num_hidden_layers * (1 + kSampleUnits + kPriceUnits +
                                                kTuningUnits * tuning.steps * tuning.batch) +
                        LmHeadUnits(options.recipe, config),
                    clock, progress_out, progress_is_terminal);
  const absl::Status status =
      Calibration(options, source, std::move(model), std::move(ids), seq_len, journal, progress)
          .Run();
  if (!CanGoOn(status)) journal.Remove();
  return status;
}

}  // namespace mobi
