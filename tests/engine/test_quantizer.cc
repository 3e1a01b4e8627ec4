// Makes the mobiquant folder of test_models.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint_writer.h"
#include "kernels/numeric.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

constexpr int kNumSamples = 64;  // random tokens behind the price table

// Router weights of one group, owned.
struct TestRouter {
  std::vector<uint16_t> w1;
  std::vector<float> b1, u, w2, b2;
  RouterTensors views;  // into the above
};

std::vector<float> Normal(size_t count, float deviation, std::mt19937_64& random) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

template <typename T>
HostTensor View(const std::vector<T>& values, DType dtype, std::vector<int64_t> shape) {
  return {"",
          dtype,
          std::move(shape),
          {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)}};
}

TestRouter RandomRouter(int segments, int64_t cols, int hidden, std::mt19937_64& random) {
  TestRouter router;
  const auto width = static_cast<size_t>(hidden);
  const auto scores = static_cast<size_t>(segments) * kNumLevels;
  for (const float value :
       Normal(width * static_cast<size_t>(cols), 1 / std::sqrt(static_cast<float>(cols)), random)) {
    router.w1.push_back(FloatToHalf(value));
  }
  router.b1 = Normal(width, 0.5f, random);
  router.u = Normal(width, 0.2f, random);
  // The same change of all levels moves a token's choice; a little of it is the level's own.
  const float deviation = 2 / std::sqrt(static_cast<float>(hidden));
  for (int segment = 0; segment < segments; ++segment) {
    const std::vector<float> shared = Normal(width, deviation, random);
    const float base = Normal(1, 1, random)[0];
    for (int level = 1; level <= kNumLevels; ++level) {
      const std::vector<float> own = Normal(width, deviation / 8, random);
      for (size_t i = 0; i < width; ++i) router.w2.push_back(shared[i] + own[i]);
      // Squared error falls by 4^2 with every two bits.
      router.b2.push_back(base - static_cast<float>(level) * std::log(16.0f));
    }
  }
  router.views.num_hidden = hidden;
  router.views.num_segments = segments;
  router.views.w1 = View(router.w1, DType::kF16, {hidden, cols});
  router.views.b1 = View(router.b1, DType::kF32, {hidden});
  router.views.u = View(router.u, DType::kF32, {hidden});
  router.views.w2 = View(router.w2, DType::kF32, {static_cast<int64_t>(scores), hidden});
  router.views.b2 = View(router.b2, DType::kF32, {static_cast<int64_t>(scores)});
  return router;
}

// exp(score) of every segment and level for one input (see Router in sliced_weight.h).
std::vector<double> Losses(const TestRouter& router, const std::vector<float>& x) {
  double square = 0;
  for (const float value : x) square += double{value} * value;
  const double log_rms = 0.5 * std::log(square / static_cast<double>(x.size()));
  std::vector<double> hidden;
  for (size_t h = 0; h < router.b1.size(); ++h) {
    double sum = router.b1[h] + router.u[h] * log_rms;
    for (size_t c = 0; c < x.size(); ++c) {
      sum += double{HalfToFloat(router.w1[h * x.size() + c])} * x[c];
    }
    hidden.push_back(sum / (1 + std::exp(-sum)));
  }
  std::vector<double> losses;
  for (size_t s = 0; s < router.b2.size(); ++s) {
    double score = router.b2[s];
    for (size_t h = 0; h < hidden.size(); ++h)
      score += router.w2[s * hidden.size() + h] * hidden[h];
    losses.push_back(std::exp(score));
  }
  return losses;
}

// What one linear's routing depends on: losses[sample][level] and its size.
struct RoutedSamples {
  std::vector<std::array<double, kNumLevels>> losses;
  int64_t rows, cols;
};

// Average bits over samples and weights at a price.
double AverageBits(const std::vector<RoutedSamples>& linears, double price) {
  double bits = 0, weights = 0;
  for (const RoutedSamples& linear : linears) {
    for (const auto& losses : linear.losses) {
      int best = 1;
      double best_cost = HUGE_VAL;
      for (int level = 1; level <= kNumLevels; ++level) {
        const double cost = losses[static_cast<size_t>(level) - 1] +
                            price * BytesAtLevel(linear.rows, linear.cols, level);
        if (cost < best_cost) std::tie(best, best_cost) = std::pair(level, cost);
      }
      const auto size = static_cast<double>(linear.rows * linear.cols);
      bits += size * BitsOfLevel(best);
      weights += size;
    }
  }
  return bits / weights;
}

// A batch that routes coherently is one token with the losses of all.
std::vector<RoutedSamples> Coherent(const std::vector<RoutedSamples>& linears) {
  std::vector<RoutedSamples> merged;
  for (const RoutedSamples& linear : linears) {
    std::array<double, kNumLevels> sum{};
    for (const auto& losses : linear.losses) {
      for (size_t i = 0; i < kNumLevels; ++i) sum[i] += losses[i];
    }
    merged.push_back({{sum}, linear.rows, linear.cols});
  }
  return merged;
}

// Prices from dear to cheap; a point wherever the bits rise.
nlohmann::json PriceTableOf(const std::vector<RoutedSamples>& linears) {
  nlohmann::json table = nlohmann::json::array();
  double last = 0;
  for (double log_price = 0; log_price > -40; log_price -= 0.1) {
    const double price = std::exp(log_price);
    const double bits = AverageBits(linears, price);
    if (bits < last + 0.01) continue;
    table.push_back(nlohmann::json::array({bits, price}));
    last = bits;
  }
  return table;
}

}  // namespace

std::vector<float> TestFloats(const HostTensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.num_elements()));
  for (size_t i = 0; i < values.size(); ++i) {
    if (tensor.dtype == DType::kF32) {
      values[i] = tensor.As<float>()[i];
    } else {
      const uint16_t bits = tensor.As<uint16_t>()[i];
      values[i] = tensor.dtype == DType::kF16 ? HalfToFloat(bits) : BFloat16ToFloat(bits);
    }
  }
  return values;
}

TestSliced QuantizeMinMax(const std::vector<float>& weights, int64_t rows, int64_t cols) {
  TestSliced sliced;
  for (auto& slice : sliced.slices) slice.resize(SliceBytes(rows, cols));
  std::vector<uint16_t> scales(ScaleBytes(rows, cols) / sizeof(uint16_t));
  std::vector<uint8_t> codes(weights.size());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < cols / kGroupSize; ++group) {
      const auto begin = static_cast<size_t>(row * cols + group * kGroupSize);
      const auto [low, high] = std::minmax_element(&weights[begin], &weights[begin] + kGroupSize);
      const uint16_t lo = FloatToHalf(*low);
      const uint16_t range = FloatToHalf(std::max(*high - *low, 1e-4f));
      const auto at = static_cast<size_t>(2 * ScaleIndex(row, group, cols));
      scales[at] = range;
      scales[at + 1] = lo;
      for (size_t i = begin; i < begin + kGroupSize; ++i) {
        codes[i] =
            static_cast<uint8_t>(EncodeWeight(weights[i], HalfToFloat(lo), HalfToFloat(range)));
      }
    }
  }
  uint8_t* const slices[kNumSlices] = {sliced.slices[0].data(), sliced.slices[1].data(),
                                       sliced.slices[2].data(), sliced.slices[3].data()};
  PackSlices(codes.data(), rows, cols, slices);
  sliced.scales.fill(scales);
  sliced.views.rows = rows;
  sliced.views.cols = cols;
  for (size_t i = 0; i < kNumSlices; ++i) {
    sliced.views.slices[i] = sliced.slices[i];
    sliced.views.scales[i] = sliced.scales[i];
  }
  return sliced;
}

absl::Status WriteQuantizedTestModel(const std::string& float_dir, const std::string& dir,
                                     const TestQuantizeOptions& options) {
  MOBI_ASSIGN_OR_RETURN(const Checkpoint source, Checkpoint::Open(float_dir, {}));
  CheckpointWriterOptions writer_options;
  writer_options.output_dir = dir;
  writer_options.overwrite = options.overwrite;
  writer_options.max_shard_bytes = options.max_shard_bytes;
  MOBI_ASSIGN_OR_RETURN(const auto writer, CheckpointWriter::Create(source, writer_options));
  std::mt19937_64 random(options.seed);
  std::vector<RoutedSamples> samples;
  for (int layer = 0; layer < source.config().num_hidden_layers; ++layer) {
    for (const RoutedGroup& group : RoutedGroupsOfLayer(source.config(), layer)) {
      const int64_t cols = group.linears[0].cols;
      const TestRouter router =
          RandomRouter(static_cast<int>(group.linears.size()), cols, options.router_hidden, random);
      MOBI_RETURN_IF_ERROR(writer->AddRouter(group.router, router.views));
      const size_t first = samples.size();
      for (const LinearShape& linear : group.linears) {
        MOBI_ASSIGN_OR_RETURN(const HostTensor weights,
                              source.Tensor(linear.name + ".weight", {linear.rows, linear.cols}));
        MOBI_RETURN_IF_ERROR(writer->AddSliced(
            linear.name, QuantizeMinMax(TestFloats(weights), linear.rows, linear.cols).views));
        samples.push_back({{}, linear.rows, linear.cols});
      }
      for (int i = 0; i < kNumSamples; ++i) {
        const std::vector<double> losses =
            Losses(router, Normal(static_cast<size_t>(cols), 1, random));
        for (size_t s = 0; s < group.linears.size(); ++s) {
          std::array<double, kNumLevels> of_segment;
          std::copy_n(&losses[s * kNumLevels], kNumLevels, of_segment.begin());
          samples[first + s].losses.push_back(of_segment);
        }
      }
    }
  }
  MOBI_RETURN_IF_ERROR(writer->AddUnquantized(options.sliced_lm_head));
  nlohmann::json prices = {{"token", PriceTableOf(samples)}};
  if (options.coherent_table) {
    prices["coherent"] = {{"batch", kNumSamples}, {"table", PriceTableOf(Coherent(samples))}};
  }
  nlohmann::json quantization = {{"price_table", prices}, {"recipe", {{"name", "min-max"}}}};
  if (options.sliced_lm_head) {
    const int64_t rows = source.config().vocab_size, cols = source.config().hidden_size;
    const bool tied = source.config().tie_word_embeddings;
    MOBI_ASSIGN_OR_RETURN(
        const HostTensor weights,
        source.Tensor(tied ? "model.embed_tokens.weight" : "lm_head.weight", {rows, cols}));
    MOBI_RETURN_IF_ERROR(
        writer->AddSliced(kLmHead, QuantizeMinMax(TestFloats(weights), rows, cols).views));
    quantization["lm_head"] = {{"min_level", kTestLmHead.min_level}, {"loss", kTestLmHead.loss}};
  }
  return writer->Commit(quantization);
}

absl::Status WriteTestModels(const TempDir& dir, const TestModelOptions& options,
                             const TestQuantizeOptions& quantize) {
  MOBI_RETURN_IF_ERROR(WriteTestModel(dir.Sub("float"), options));
  return WriteQuantizedTestModel(dir.Sub("float"), dir.Sub("mobiquant"), quantize);
}

}  // namespace mobi
