#include "linears_command.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <string>

#include "engine/base/status_macros.h"
#include "kernels/numeric.h"
#include "peer_linears.h"
#include "stopwatch.h"

namespace mobi {
namespace {

using Json = nlohmann::json;

// Large batches are bound by arithmetic: two layers tell as much as all.
constexpr int kManyTokens = 64;
constexpr int kLayersOfManyTokens = 2;
// Float weights beyond this many bytes are not in any cache.
constexpr double kUncachedBytes = 400e6;

class LinearsBench {
 public:
  LinearsBench(const Model& model, int max_tokens)
      : model_(model), backend_(model.backend()), max_tokens_(max_tokens) {}

  absl::Status Prepare() {
    int64_t max_rows = 0;
    for (const Linear& linear : model_.layers()[0].linears) {
      if (!linear.routed) return absl::InvalidArgumentError("linears: the model is not quantized");
      const SlicedWeight& weight = linear.routed->weight;
      shapes_.push_back({weight.rows, weight.cols});
      max_rows = std::max(max_rows, weight.rows);
      MOBI_ASSIGN_OR_RETURN(Tensor x, Inputs(weight.cols));
      inputs_.push_back(x);
    }
    MOBI_ASSIGN_OR_RETURN(out_, Matrix(max_rows));
    for (int level = 1; level <= kNumLevels; ++level) {
      const std::vector<uint8_t> levels(kMaxSegments * max_tokens_, static_cast<uint8_t>(level));
      MOBI_ASSIGN_OR_RETURN(Buffer buffer, backend_.Allocate(levels.size(), "levels"));
      backend_.Upload(levels.data(), levels.size(), buffer.data());
      levels_.push_back(buffer.As<uint8_t>());
      buffers_.push_back(std::move(buffer));
    }
    return backend_.Synchronize();
  }

  // All linears of `num_layers` layers once; returns when they are done.
  void Run(int tokens, int level, int num_layers) {
    // The key tells records of different levels apart.
    const StepKey key{.num_tokens = tokens,
                      .num_seqs = tokens,
                      .num_logits = level,
                      .decode_only = tokens < kManyTokens};
    backend_.RunStep(key, [&] {
      for (int layer = 0; layer < num_layers; ++layer) {
        for (size_t group = 0; group < inputs_.size(); ++group) {
          const SlicedWeight& weight = model_.layers()[layer].linears[group].routed->weight;
          const Tensor out{out_.data, out_.dtype, tokens, weight.rows, out_.stride};
          backend_.SlicedMatmul(inputs_[group].FirstRows(tokens), weight, levels_[level - 1],
                                max_tokens_, out);
        }
      }
    });
    status_.Update(backend_.Synchronize());
  }

  const std::vector<MatmulShape>& shapes() const { return shapes_; }
  const absl::Status& status() const { return status_; }

 private:
  absl::StatusOr<Tensor> Matrix(int64_t cols) {
    const DType dtype = backend_.activation_dtype();
    MOBI_ASSIGN_OR_RETURN(Buffer buffer,
                          backend_.Allocate(max_tokens_ * cols * SizeOf(dtype), "activations"));
    buffers_.push_back(std::move(buffer));
    return Tensor::Of(buffers_.back().data(), dtype, max_tokens_, cols);
  }

  absl::StatusOr<Tensor> Inputs(int64_t cols) {
    MOBI_ASSIGN_OR_RETURN(Tensor x, Matrix(cols));
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const size_t count = max_tokens_ * cols;
    std::vector<float> values(count);
    std::vector<uint16_t> halves(count);
    for (size_t i = 0; i < count; ++i) {
      values[i] = normal(random);
      halves[i] = x.dtype == DType::kBF16 ? FloatToBFloat16(values[i]) : FloatToHalf(values[i]);
    }
    const void* host = x.dtype == DType::kF32 ? static_cast<const void*>(values.data())
                                              : static_cast<const void*>(halves.data());
    backend_.Upload(host, count * SizeOf(x.dtype), x.data);
    return x;
  }

  const Model& model_;
  Backend& backend_;
  const int64_t max_tokens_;
  std::vector<MatmulShape> shapes_;
  std::vector<Tensor> inputs_;  // of each group
  Tensor out_;
  std::vector<const uint8_t*> levels_;  // all tokens at level 1, 2, ...
  std::vector<Buffer> buffers_;
  absl::Status status_;
};

double Weights(const std::vector<MatmulShape>& shapes) {
  double weights = 0;
  for (const MatmulShape& shape : shapes) weights += static_cast<double>(shape.rows * shape.cols);
  return weights;
}

double LayerBytes(const std::vector<MatmulShape>& shapes, int level) {
  double bytes = 0;
  for (const MatmulShape& shape : shapes) {
    bytes += BytesAtLevel(shape.rows, shape.cols, level);
  }
  return bytes;
}

// As few layers as no cache holds.
absl::StatusOr<std::unique_ptr<PeerLinears>> CreatePeer(const std::vector<MatmulShape>& shapes,
                                                        bool on_cpu, int all_layers, int max_tokens,
                                                        int threads) {
  const double bytes = Weights(shapes) * (on_cpu ? sizeof(float) : sizeof(uint16_t));
  const int layers = std::clamp(static_cast<int>(kUncachedBytes / bytes) + 1, 1, all_layers);
  if (on_cpu) return CreateOpenBlas(shapes, layers, threads);
#ifdef MOBI_WITH_CUDA
  return CreateCublas(shapes, layers, max_tokens);
#else
  (void)max_tokens;
  return absl::UnavailableError("this build has no CUDA");
#endif
}

Json Row(int tokens, double layer_s, double layer_bytes, double layer_weights) {
  return {{"tokens", tokens},
          {"microseconds", layer_s * 1e6},
          {"gigabytes_per_second", layer_bytes / layer_s / 1e9},
          {"gigaflops", 2 * tokens * layer_weights / layer_s / 1e9}};
}

void PrintRow(const Json& row) {
  if (row.contains("bits")) {
    std::printf("%d bits  ", row["bits"].get<int>());
  } else {
    std::printf("%-8s", "peer");
  }
  std::printf(" %6d %12.1f %9.1f %10.1f", row["tokens"].get<int>(),
              row["microseconds"].get<double>(), row["gigabytes_per_second"].get<double>(),
              row["gigaflops"].get<double>());
  if (row.contains("times_peer")) std::printf(" %8.2f", row["times_peer"].get<double>());
  std::printf("\n");
  std::fflush(stdout);
}

// All levels, and the peer, taking turns.
absl::Status TimeTokens(LinearsBench& bench, PeerLinears* peer, int tokens, int layers,
                        const LinearsCommandOptions& options, Json& rows) {
  const double weights = Weights(bench.shapes());
  absl::Status peer_status;
  std::vector<TimedCase> cases(kNumLevels);
  for (int level = 1; level <= kNumLevels; ++level) {
    cases[level - 1].run = [&bench, tokens, level, layers] { bench.Run(tokens, level, layers); };
  }
  if (peer != nullptr) {
    cases.push_back({.run = [&, peer] { peer_status.Update(peer->Run(tokens)); }});
  }
  TimeInTurns(options.seconds, cases);
  MOBI_RETURN_IF_ERROR(bench.status());
  MOBI_RETURN_IF_ERROR(peer_status);
  const double peer_s = peer == nullptr ? 0 : cases.back().median_s / peer->num_layers();
  for (int level = 1; level <= kNumLevels; ++level) {
    const double layer_s = cases[level - 1].median_s / layers;
    Json row = Row(tokens, layer_s, LayerBytes(bench.shapes(), level), weights);
    row["bits"] = BitsOfLevel(level);
    if (peer != nullptr) row["times_peer"] = peer_s / layer_s;
    if (options.print) PrintRow(row);
    rows.push_back(std::move(row));
  }
  if (peer == nullptr) return absl::OkStatus();
  Json row = Row(tokens, peer_s, weights * peer->bytes_of_weight(), weights);
  row["peer"] = peer->description();
  if (options.print) PrintRow(row);
  rows.push_back(std::move(row));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Json> TimeLinears(const Model& model, const LinearsCommandOptions& options) {
  const int max_tokens = *std::max_element(options.tokens.begin(), options.tokens.end());
  LinearsBench bench(model, max_tokens);
  MOBI_RETURN_IF_ERROR(bench.Prepare());
  const auto all_layers = static_cast<int>(model.layers().size());
  std::unique_ptr<PeerLinears> peer;
  if (options.peer) {
    MOBI_ASSIGN_OR_RETURN(peer, CreatePeer(bench.shapes(), model.backend().name() == "cpu",
                                           all_layers, max_tokens, options.threads));
  }
  if (options.print) {
    if (peer != nullptr) std::printf("peer: %s\n", peer->description().c_str());
    std::printf("linears of one layer, of %d read in turn\n", all_layers);
    std::printf("%-8s %6s %12s %9s %10s %8s\n", "", "tokens", "us", "GB/s", "GFLOP/s", "x peer");
  }
  Json rows = Json::array();
  for (const int tokens : options.tokens) {
    const int layers =
        tokens < kManyTokens ? all_layers : std::min(all_layers, kLayersOfManyTokens);
    MOBI_RETURN_IF_ERROR(TimeTokens(bench, peer.get(), tokens, layers, options, rows));
  }
  return rows;
}

}  // namespace mobi
