#include "calibrator/layer_report.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "calibrator/float_model.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/packing.h"
#include "calibrator/parallel.h"
#include "calibrator/price_table.h"
#include "calibrator/routing_samples.h"
#include "calibrator/vector_math.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint.h"
#include "engine/precision.h"
#include "engine/tokenizer.h"
#include "kernels/numeric.h"

namespace mobi {
namespace {

absl::StatusOr<RouterWeights> ReadRouter(const Checkpoint& checkpoint, const RoutedGroup& group) {
  const int64_t cols = group.linears.front().cols;
  MOBI_ASSIGN_OR_RETURN(
      const RouterTensors tensors,
      checkpoint.RouterOf(group.router, static_cast<int>(group.linears.size()), cols));
  RouterWeights router;
  router.w1 = Matrix(tensors.num_hidden, cols);
  const auto w1 = tensors.w1.As<uint16_t>();
  for (size_t i = 0; i < w1.size(); ++i) router.w1.data()[i] = HalfToFloat(w1[i]);
  const auto copy = [](const HostTensor& from) {
    const auto values = from.As<float>();
    return std::vector<float>(values.begin(), values.end());
  };
  router.b1 = copy(tensors.b1);
  router.u = copy(tensors.u);
  router.b2 = copy(tensors.b2);
  const std::vector<float> w2 = copy(tensors.w2);
  router.w2 = Matrix(static_cast<int64_t>(router.b2.size()), tensors.num_hidden);
  std::copy(w2.begin(), w2.end(), router.w2.data());
  return router;
}

absl::StatusOr<std::vector<FittedBlock>> ReadBlocks(const Checkpoint& checkpoint) {
  std::vector<FittedBlock> blocks;
  for (int layer = 0; layer < checkpoint.config().num_hidden_layers; ++layer) {
    FittedBlock& block = blocks.emplace_back();
    const auto groups = RoutedGroupsOfLayer(checkpoint.config(), layer);
    for (int g = 0; g < kNumLinearGroups; ++g) {
      int64_t rows = 0, begin = 0;
      for (const LinearShape& linear : groups[g].linears) rows += linear.rows;
      block.linear[g] = NestedWeight(rows, groups[g].linears.front().cols);
      for (const LinearShape& linear : groups[g].linears) {
        MOBI_ASSIGN_OR_RETURN(const SlicedTensors tensors,
                              checkpoint.Sliced(linear.name, linear.rows, linear.cols));
        UnpackLinear(tensors, begin, block.linear[g]);
        begin += linear.rows;
      }
    }
  }
  return blocks;
}

std::vector<float> Column(const Matrix& m, int64_t column) {
  std::vector<float> values;
  for (int64_t t = 0; t < m.rows(); ++t) values.push_back(m(t, column));
  return values;
}

// Indices of the largest tenth.
std::vector<int64_t> WorstTenth(const std::vector<float>& values) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  const auto tenth = static_cast<std::ptrdiff_t>(values.size() / 10);
  std::nth_element(order.begin(), order.begin() + tenth, order.end(),
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  order.resize(static_cast<size_t>(tenth));
  std::sort(order.begin(), order.end());
  return order;
}

// The reports of one group's linears.
void ReportGroup(const RoutedGroup& group, const Matrix& weight, const RouterWeights& router,
                 const RoutingSamples& samples, const std::vector<double>& prices,
                 LinearReport* reports) {
  const int64_t tokens = samples.inputs.rows();
  Matrix output(tokens, weight.rows());
  MultiplyTransposed(samples.inputs, weight, output);
  Matrix losses = RouterScores(router, samples.inputs);
  for (int64_t i = 0; i < losses.size(); ++i) losses.data()[i] = std::exp(losses.data()[i]);
  const std::vector<SegmentCost> costs = CostsOf(group);
  int64_t begin = 0;
  for (size_t s = 0; s < group.linears.size(); ++s) {
    LinearReport& report = reports[s];
    report.name = group.linears[s].name;
    double size = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      size += DotProduct(output.Row(t) + begin, output.Row(t) + begin, group.linears[s].rows);
    }
    begin += group.linears[s].rows;
    std::array<std::vector<float>, kNumLevels> errors;
    for (int k = 0; k < kNumLevels; ++k) {
      errors[k] = Column(samples.errors, static_cast<int64_t>(s) * kNumLevels + k);
      const double sum = std::accumulate(errors[k].begin(), errors[k].end(), 0.0);
      report.error[k] = size > 0 ? sum / size : 0;
    }
    for (int a = 0; a < kNumLevels; ++a) {
      for (int b = 0; b < kNumLevels; ++b) {
        report.overlap[a][b] = WorstTenthOverlap(errors[a], errors[b]);
      }
    }
  }
  std::vector<uint8_t> levels(costs.size() * static_cast<size_t>(tokens));
  for (const double price : prices) {
    ChooseLevels(losses, costs, price, {false, tokens}, levels.data());
    for (size_t s = 0; s < group.linears.size(); ++s) {
      double bits = 0;
      for (int64_t t = 0; t < tokens; ++t) bits += BitsOfLevel(levels[s * tokens + t]);
      reports[s].bits.push_back(bits / static_cast<double>(tokens));
    }
  }
}

absl::StatusOr<std::vector<int32_t>> ReadIds(const LayerReportOptions& options,
                                             const ModelConfig& config) {
  MOBI_ASSIGN_OR_RETURN(const std::string text, ReadText(options.data_path, options.layout));
  MOBI_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(options.float_dir));
  MOBI_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer->Encode(text));
  const size_t windows = std::min<size_t>(ids.size() / options.window, options.windows);
  if (windows == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        options.data_path, ": ", ids.size(), " tokens, less than one window of ", options.window));
  }
  ids.resize(windows * static_cast<size_t>(options.window));
  for (const int32_t id : ids) {
    if (id < config.vocab_size) continue;
    return absl::InvalidArgumentError(absl::StrCat(options.float_dir, ": the tokenizer gives id ",
                                                   id, ", the model's vocab_size is ",
                                                   config.vocab_size));
  }
  return ids;
}

absl::Status CheckSameModel(const LayerReportOptions& options, const Checkpoint& checkpoint,
                            const ModelConfig& config) {
  if (!checkpoint.quantized()) {
    return absl::InvalidArgumentError(options.model_dir + ": not a MoBiQuant checkpoint");
  }
  const ModelConfig& other = checkpoint.config();
  if (other.hidden_size == config.hidden_size && other.vocab_size == config.vocab_size &&
      other.num_hidden_layers == config.num_hidden_layers &&
      other.intermediate_size == config.intermediate_size &&
      other.num_key_value_heads == config.num_key_value_heads) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(options.float_dir, ": not the model that ",
                                                 options.model_dir, " was made from"));
}

}  // namespace

double WorstTenthOverlap(const std::vector<float>& a, const std::vector<float>& b) {
  const std::vector<int64_t> worst_a = WorstTenth(a), worst_b = WorstTenth(b);
  std::vector<int64_t> both;
  std::set_intersection(worst_a.begin(), worst_a.end(), worst_b.begin(), worst_b.end(),
                        std::back_inserter(both));
  return static_cast<double>(both.size()) / static_cast<double>(worst_a.size());
}

absl::StatusOr<std::vector<LinearReport>> ReportLayers(const LayerReportOptions& options) {
  MOBI_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(options.model_dir, {}));
  MOBI_ASSIGN_OR_RETURN(const Checkpoint source, Checkpoint::Open(options.float_dir, {}));
  const ModelConfig& config = source.config();
  if (options.window < 10 || options.window > config.max_position_embeddings ||
      options.windows < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("windows ", options.windows, " of ", options.window,
                     " tokens: at least one of 10 to ", config.max_position_embeddings));
  }
  MOBI_ASSIGN_OR_RETURN(const FloatModel model, FloatModel::Open(source, options.window));
  MOBI_RETURN_IF_ERROR(CheckSameModel(options, checkpoint, config));
  MOBI_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, ReadIds(options, config));
  MOBI_ASSIGN_OR_RETURN(const std::vector<FittedBlock> blocks, ReadBlocks(checkpoint));
  const PriceTable table({checkpoint.price_table().begin(), checkpoint.price_table().end()});
  std::vector<double> prices;
  for (const float bits : options.bits) prices.push_back(table.PriceOf(bits));

  SetBlasThreads(options.num_threads);
  std::vector<std::vector<LinearReport>> of_layer(blocks.size());
  const auto on_layer = [&](int layer,
                            std::array<RoutingSamples, kNumLinearGroups>& samples) -> absl::Status {
    MOBI_ASSIGN_OR_RETURN(const BlockWeights weights, model.LoadBlock(layer));
    const auto groups = RoutedGroupsOfLayer(config, layer);
    for (int g = 0; g < kNumLinearGroups; ++g) {
      MOBI_ASSIGN_OR_RETURN(const RouterWeights router, ReadRouter(checkpoint, groups[g]));
      std::vector<LinearReport> reports(groups[g].linears.size());
      ReportGroup(groups[g], weights.linear[g], router, samples[g], prices, reports.data());
      std::move(reports.begin(), reports.end(), std::back_inserter(of_layer[layer]));
    }
    return absl::OkStatus();
  };
  // Inputs as the highest level gives them, which is as good as the float model's.
  RoutingSampleOptions sampling;
  sampling.level_shares = {0, 0, 0, 1};
  sampling.num_threads = options.num_threads;
  MOBI_RETURN_IF_ERROR(SampleRouting(model, blocks, ids, options.window, sampling, on_layer));
  std::vector<LinearReport> reports;
  for (auto& layer : of_layer) std::move(layer.begin(), layer.end(), std::back_inserter(reports));
  return reports;
}

}  // namespace mobi
