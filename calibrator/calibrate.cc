#include "calibrator/calibrate.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "calibrator/float_model.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/packing.h"
#include "calibrator/price_table.h"
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
// Time of the later phases beside one block's fit, for the estimate of what is left.
constexpr double kSampleUnits = 0.2, kPriceUnits = 0.2;

template <typename T>
absl::Span<const std::byte> Bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

// Everything between reading the source and committing the result.
class Calibration {
 public:
  Calibration(const CalibrateOptions& options, FloatModel model, std::vector<int32_t> ids,
              int64_t seq_len, CheckpointWriter& writer, Progress& progress)
      : options_(options),
        model_(std::move(model)),
        ids_(std::move(ids)),
        seq_len_(seq_len),
        writer_(writer),
        progress_(progress) {}

  absl::Status Run();

 private:
  absl::Status FitBlocks();
  absl::Status WriteBlock(int layer, const FittedBlock& block);
  absl::Status TrainRouters();
  absl::Status WriteRouter(const std::string& name, const RouterWeights& router);
  void RecordLosses(const RoutedGroup& group, const RouterWeights& router,
                    const RoutingSamples& samples);
  absl::Status MeasurePrices();
  nlohmann::json Description() const;
  int64_t num_sequences() const { return static_cast<int64_t>(ids_.size()) / seq_len_; }
  int64_t num_routing_sequences() const {
    return std::min(options_.routing.sample_sequences, num_sequences());
  }
  absl::Span<const int32_t> RoutingIds() const {
    return absl::MakeConstSpan(ids_).subspan(
        0, static_cast<size_t>(num_routing_sequences() * seq_len_));
  }

  const CalibrateOptions& options_;
  const FloatModel model_;
  const std::vector<int32_t> ids_;
  const int64_t seq_len_;
  CheckpointWriter& writer_;
  Progress& progress_;

  std::vector<FittedBlock> blocks_;
  std::vector<BlockRouters> routers_;
  std::vector<RecordedLosses> recorded_;
  std::vector<PricePoint> token_prices_, coherent_prices_;
};

absl::Status Calibration::FitBlocks() {
  BlockCalibrationOptions options = options_.blocks;
  options.num_threads = options_.num_threads;
  CalibrationStreams streams;
  streams.seq_len = seq_len_;
  streams.float_hidden = Matrix(static_cast<int64_t>(ids_.size()), model_.config().hidden_size);
  model_.Embed(ids_, streams.float_hidden);
  streams.hidden.assign(options.stream_levels.size(), streams.float_hidden);
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    MOBI_ASSIGN_OR_RETURN(const BlockWeights weights, model_.LoadBlock(layer));
    const auto on_group = [&](LinearGroup group, const std::array<double, kNumLevels>& losses) {
      constexpr const char* kNames[] = {"qkv", "o", "gate_up", "down"};
      progress_.Advance(
          1.0 / kNumLinearGroups,
          absl::StrCat("block ", layer + 1, "/", model_.num_layers(), " ",
                       kNames[static_cast<int>(group)], " loss ", absl::SixDigits(losses[0]), " ",
                       absl::SixDigits(losses[1]), " ", absl::SixDigits(losses[2]), " ",
                       absl::SixDigits(losses[3])));
    };
    auto fitted =
        CalibrateBlock(model_.config(), weights, model_.rope(), options, streams, on_group);
    if (!fitted.ok()) {
      return absl::Status(
          fitted.status().code(),
          absl::StrCat(options_.model_dir, ": layer ", layer, ": ", fitted.status().message()));
    }
    MOBI_RETURN_IF_ERROR(WriteBlock(layer, *fitted));
    blocks_.push_back(*std::move(fitted));
  }
  return absl::OkStatus();
}

absl::Status Calibration::WriteBlock(int layer, const FittedBlock& block) {
  const auto groups = RoutedGroupsOfLayer(model_.config(), layer);
  for (int g = 0; g < kNumLinearGroups; ++g) {
    int64_t begin = 0;
    for (const LinearShape& linear : groups[g].linears) {
      const PackedLinear packed = PackLinear(block.linear[g], begin, linear.rows);
      MOBI_RETURN_IF_ERROR(writer_.AddSliced(linear.name, packed.view()));
      begin += linear.rows;
    }
  }
  return absl::OkStatus();
}

absl::Status Calibration::TrainRouters() {
  const RoutingOptions& routing = options_.routing;
  routers_.resize(static_cast<size_t>(model_.num_layers()));
  RoutingSampleOptions sampling = routing.samples;
  sampling.seed = options_.seed;
  sampling.num_threads = options_.num_threads;
  RouterTrainingOptions training = routing.training;
  training.seed = options_.seed;
  training.num_hidden = RouterHiddenUnits(model_.config(), routing.byte_share_bits,
                                          routing.byte_share, routing.max_hidden);
  const auto on_layer = [&](int layer,
                            std::array<RoutingSamples, kNumLinearGroups>& samples) -> absl::Status {
    const auto groups = RoutedGroupsOfLayer(model_.config(), layer);
    for (int g = 0; g < kNumLinearGroups; ++g) {
      routers_[layer][g] = TrainRouter(samples[g], training);
      RecordLosses(groups[g], routers_[layer][g], samples[g]);
      MOBI_RETURN_IF_ERROR(WriteRouter(groups[g].router, routers_[layer][g]));
    }
    progress_.Advance(kSampleUnits, absl::StrCat("routers of block ", layer + 1));
    return absl::OkStatus();
  };
  return SampleRouting(model_, blocks_, RoutingIds(), seq_len_, sampling, on_layer);
}

absl::Status Calibration::WriteRouter(const std::string& name, const RouterWeights& router) {
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
  return writer_.AddRouter(name, tensors);
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
  const int64_t length = std::min(options_.routing.price_tokens, seq_len_);
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
  const BlockCalibrationOptions& blocks = options_.blocks;
  const LinearFitOptions& fit = blocks.fit;
  nlohmann::json data = nlohmann::json::array();
  for (const std::string& path : options_.data_paths) {
    data.push_back(std::filesystem::path(path).filename().string());
  }
  return {
      {"price_table",
       {{"token", table(token_prices_)},
        {"coherent", {{"batch", num_routing_sequences()}, {"table", table(coherent_prices_)}}}}},
      {"recipe",
       {{"streams", blocks.stream_levels},
        {"level_weights", blocks.level_weights},
        {"damping", blocks.damping},
        {"base_level_weights", fit.base.level_weights},
        {"joint_codes", fit.joint_codes},
        {"descent_rounds", fit.rounds},
        {"descent_passes", fit.passes},
        {"refit_ridge", fit.ridge},
        {"router_hidden", routers_.front().front().num_hidden()}}},
      {"calibration",
       {{"data", data},
        {"samples", num_sequences()},
        {"seq_len", seq_len_},
        {"seed", options_.seed}}}};
}

absl::Status Calibration::Run() {
  MOBI_RETURN_IF_ERROR(writer_.AddUnquantized());
  MOBI_RETURN_IF_ERROR(FitBlocks());
  MOBI_RETURN_IF_ERROR(TrainRouters());
  MOBI_RETURN_IF_ERROR(MeasurePrices());
  return writer_.Commit(Description());
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
  MOBI_ASSIGN_OR_RETURN(const auto writer,
                        CheckpointWriter::Create(source, {.output_dir = options.output_dir,
                                                          .overwrite = options.overwrite}));
  MOBI_ASSIGN_OR_RETURN(std::vector<int32_t> ids, ReadTokens(options, config, seq_len));
  MOBI_ASSIGN_OR_RETURN(FloatModel model, FloatModel::Open(source, static_cast<int>(seq_len)));
  SetBlasThreads(options.num_threads);
  Progress progress(config.num_hidden_layers * (1 + kSampleUnits + kPriceUnits), clock,
                    progress_out, progress_is_terminal);
  return Calibration(options, std::move(model), std::move(ids), seq_len, *writer, progress).Run();
}

}  // namespace mobi
