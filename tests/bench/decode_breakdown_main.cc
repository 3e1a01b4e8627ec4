// Where the time of one decode step goes: the ops of a Llama stack through the Backend seam, timed
// whole and with one kind of op left out at a time. The difference is what that op adds to the
// step, overlap included. Weights are random bits; levels are pinned, routers still run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "engine/base/clock.h"
#include "kernels/backend.h"
#include "kernels/numeric.h"

ABSL_FLAG(int, layers, 32, "decoder layers");
ABSL_FLAG(int, hidden, 4096, "hidden_size");
ABSL_FLAG(int, intermediate, 14336, "intermediate_size");
ABSL_FLAG(int, heads, 32, "num_attention_heads");
ABSL_FLAG(int, kv_heads, 8, "num_key_value_heads");
ABSL_FLAG(int, head_dim, 128, "head_dim");
ABSL_FLAG(int, vocab, 128256, "vocab_size");
ABSL_FLAG(int, context, 512, "tokens in the cache of each sequence");
ABSL_FLAG(std::vector<std::string>, tokens, {"1"}, "sequences in the step");
ABSL_FLAG(std::vector<std::string>, levels, (std::vector<std::string>{"1", "2", "4"}), "1..4");
ABSL_FLAG(bool, coherent, false, "route coherently");
ABSL_FLAG(bool, breakdown, true, "leave out one kind of op at a time");
ABSL_FLAG(std::vector<std::string>, without, {}, "ops to leave out of every run");
ABSL_FLAG(int, repeats, 50, "timed steps");
ABSL_FLAG(std::string, device, "cuda", "cpu or cuda");

namespace mobi {
namespace {

constexpr int kBlockSize = 16;
constexpr int kRouterHidden = 32;

// Device memory filled from a pool of random bytes.
class Arena {
 public:
  explicit Arena(Backend& backend) : backend_(backend) {}

  // `make` turns normal variables into 16-bit values.
  void* Fill(size_t bytes, uint16_t (*make)(float), float deviation) {
    std::vector<uint16_t>& pool = pools_[{make, deviation}];
    std::normal_distribution<float> normal(0, deviation);
    while (pool.size() < (1 << 20)) pool.push_back(make(normal(random_)));
    return Repeat(pool.data(), pool.size() * 2, bytes);
  }
  void* Copy(const void* host, size_t bytes) { return Repeat(host, bytes, bytes); }

 private:
  void* Repeat(const void* host, size_t host_bytes, size_t bytes) {
    absl::StatusOr<Buffer> buffer = backend_.Allocate(bytes, "benchmark data");
    if (!buffer.ok()) {
      std::fprintf(stderr, "%s\n", std::string(buffer.status().message()).c_str());
      std::exit(2);
    }
    buffers_.push_back(*std::move(buffer));
    std::byte* data = buffers_.back().As<std::byte>();
    for (size_t at = 0; at < bytes; at += host_bytes) {
      backend_.Upload(host, std::min(host_bytes, bytes - at), data + at);
    }
    return data;
  }

  Backend& backend_;
  std::mt19937 random_{1};
  std::map<std::pair<uint16_t (*)(float), float>, std::vector<uint16_t>> pools_;
  std::vector<Buffer> buffers_;
};

uint16_t RandomBits(float value) { return static_cast<uint16_t>(std::lround(value * 65536)); }

struct Shape {
  int layers, hidden, intermediate, heads, kv_heads, head_dim, vocab;
};

class Stack {
 public:
  Stack(const Shape& shape, Backend& backend, int max_tokens, int context)
      : shape_(shape), backend_(backend), arena_(backend), max_tokens_(max_tokens) {
    const int q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
    for (int i = 0; i < shape.layers; ++i) {
      layers_.push_back({MakeLinear({q, kv, kv}, shape.hidden), MakeLinear({shape.hidden}, q),
                         MakeLinear({shape.intermediate, shape.intermediate}, shape.hidden),
                         MakeLinear({shape.hidden}, shape.intermediate)});
    }
    lm_head_ = Tensor::Of(Random16(int64_t{shape.vocab} * shape.hidden, 0.02f), Type(), shape.vocab,
                          shape.hidden);
    norm_ = Floats(shape.hidden, 1);
    MakeCache(context);
    residual_ = Activation(shape.hidden), delta_ = Activation(shape.hidden);
    normed_ = Activation(shape.hidden), qkv_ = Activation(q + 2 * kv);
    attention_ = Activation(q), gate_up_ = Activation(2 * shape.intermediate);
    swiglu_ = Activation(shape.intermediate);
    logits_ = Tensor::Of(Floats(int64_t{max_tokens} * shape.vocab, 0).data, DType::kF32, max_tokens,
                         shape.vocab);
    levels_ = static_cast<uint8_t*>(Floats(kMaxSegments * max_tokens, 0).data);
    sampled_ = static_cast<Sampled*>(Floats(2 * max_tokens, 0).data);
  }

  void SetStep(int tokens, int level, int context, bool coherent) {
    tokens_ = tokens;
    context_ = context;
    const auto copy = [&](const auto& values) {
      return arena_.Copy(values.data(), values.size() * sizeof(values[0]));
    };
    std::vector<int32_t> ids(tokens), starts(tokens + 1), contexts(tokens, context);
    std::vector<int32_t> positions(tokens, context - 1), slots(tokens), tables, rows(tokens);
    std::vector<SamplingRow> sampling(tokens);
    for (int i = 0; i < tokens; ++i) {
      ids[i] = i, starts[i + 1] = i + 1, rows[i] = i;
      for (int b = 0; b < blocks_per_seq_; ++b) tables.push_back(i * blocks_per_seq_ + b);
      slots[i] = i * blocks_per_seq_ * kBlockSize + context - 1;
      sampling[i] = {};
      sampling[i].logits_row = i;
    }
    ids_ = static_cast<int32_t*>(copy(ids)), rows_ = static_cast<int32_t*>(copy(rows));
    positions_ = static_cast<int32_t*>(copy(positions));
    slots_ = static_cast<int32_t*>(copy(slots));
    batch_ = {tokens,
              1,
              context,
              static_cast<int32_t*>(copy(starts)),
              static_cast<int32_t*>(copy(contexts)),
              static_cast<int32_t*>(copy(tables)),
              blocks_per_seq_};
    const std::vector<uint8_t> pinned(tokens, static_cast<uint8_t>(level));
    const auto* bounds = static_cast<uint8_t*>(copy(pinned));
    routing_ = {tokens,
                coherent ? tokens : 0,
                static_cast<float*>(copy(std::vector<float>(tokens, 1e-9f))),
                bounds,
                bounds,
                static_cast<uint32_t*>(copy(std::vector<uint32_t>(tokens))),
                static_cast<uint64_t*>(copy(std::vector<uint64_t>(1)))};
    sampling_ = {tokens, static_cast<SamplingRow*>(copy(sampling)), nullptr};
  }

  void Enqueue(const std::set<std::string>& omit) {
    const auto with = [&](const char* op) { return omit.count(op) == 0; };
    const Tensor residual = residual_.FirstRows(tokens_), delta = delta_.FirstRows(tokens_);
    const Tensor normed = normed_.FirstRows(tokens_), qkv = qkv_.FirstRows(tokens_);
    const Tensor attention = attention_.FirstRows(tokens_), swiglu = swiglu_.FirstRows(tokens_);
    const Tensor gate_up = gate_up_.FirstRows(tokens_);
    const auto linear = [&](const RoutedWeight& weight, Tensor x, Tensor out) {
      if (with("router")) backend_.Route(x, weight, routing_, levels_, max_tokens_);
      if (with("linears")) backend_.SlicedMatmul(x, weight.weight, levels_, max_tokens_, out);
    };
    const AttentionShape shape{shape_.heads, shape_.kv_heads, shape_.head_dim, kBlockSize};
    backend_.Embed(lm_head_, ids_, residual);
    for (size_t i = 0; i < layers_.size(); ++i) {
      const KvLayer kv{cache_[2 * i], cache_[2 * i + 1]};
      if (with("norm")) backend_.AddRmsNorm(delta, norm_, 1e-5f, residual, normed);
      linear(layers_[i][0], normed, qkv);
      if (with("rope")) backend_.RopeAndWriteKv(qkv, rope_, positions_, slots_, shape, kv);
      if (with("attention"))
        backend_.Attention(qkv.Columns(0, attention.cols), kv, batch_, shape, attention);
      linear(layers_[i][1], attention, delta);
      if (with("norm")) backend_.AddRmsNorm(delta, norm_, 1e-5f, residual, normed);
      linear(layers_[i][2], normed, gate_up);
      if (with("swiglu")) backend_.SwiGlu(gate_up, swiglu);
      linear(layers_[i][3], swiglu, delta);
    }
    backend_.AddRmsNorm(delta, norm_, 1e-5f, residual, normed);
    const Tensor logits = logits_.FirstRows(tokens_);
    if (with("lm_head")) backend_.DenseMatmul(normed, lm_head_, logits);
    if (with("sampling")) backend_.Sample(logits, sampling_, sampled_);
  }

  // Microseconds of one step, or what went wrong.
  absl::StatusOr<double> Time(const std::set<std::string>& omit, int repeats) {
    // The key's last field tells the variants apart.
    const StepKey key{.num_tokens = tokens_,
                      .num_seqs = tokens_,
                      .num_logits = tokens_,
                      .num_coherent = ++variant_,
                      .max_context_len = context_,
                      .decode_only = true};
    const auto run = [&] { backend_.RunStep(key, [&] { Enqueue(omit); }); };
    for (int i = 0; i < 4; ++i) run();
    absl::Status status = backend_.Synchronize();
    const TimePoint begin = RealClock().Now();
    for (int i = 0; i < repeats; ++i) run();
    status.Update(backend_.Synchronize());
    if (!status.ok()) return status;
    const Duration taken = RealClock().Now() - begin;
    return std::chrono::duration<double, std::micro>(taken).count() / repeats;
  }

  // Bytes that a step at `level` has to move.
  double LinearBytes(int level) const {
    double bytes = 0;
    for (const auto& layer : layers_) {
      for (const RoutedWeight& linear : layer) {
        bytes += BytesAtLevel(linear.weight.rows, linear.weight.cols, level);
      }
    }
    return bytes;
  }
  double OtherBytes() const {
    const double kv = 2.0 * shape_.layers * tokens_ * context_ * shape_.kv_heads * shape_.head_dim;
    return 2 * (kv + static_cast<double>(shape_.vocab) * shape_.hidden);
  }

 private:
  using Layer = std::vector<RoutedWeight>;

  DType Type() const { return backend_.activation_dtype(); }
  void* Random16(int64_t count, float deviation) {
    return arena_.Fill(count * SizeOf(Type()),
                       Type() == DType::kBF16 ? FloatToBFloat16 : FloatToHalf, deviation);
  }
  Tensor Activation(int64_t cols) {
    return Tensor::Of(Random16(max_tokens_ * cols, 1), Type(), max_tokens_, cols);
  }
  Tensor Floats(int64_t count, float value) {
    const std::vector<float> values(count, value);
    return Tensor::Of(arena_.Copy(values.data(), count * sizeof(float)), DType::kF32, 1, count);
  }

  RoutedWeight MakeLinear(const std::vector<int>& segments, int64_t cols) {
    RoutedWeight linear;
    SlicedWeight& weight = linear.weight;
    weight.cols = cols;
    weight.num_segments = static_cast<int>(segments.size());
    for (size_t s = 0; s < segments.size(); ++s) {
      weight.segment_end[s] = weight.rows += segments[s];
      for (int k = 0; k < kNumLevels; ++k) {
        linear.router.bytes[s][k] = static_cast<float>(BytesAtLevel(segments[s], cols, k + 1));
      }
    }
    for (auto& slice : weight.slices) {
      slice = static_cast<uint8_t*>(arena_.Fill(SliceBytes(weight.rows, cols), RandomBits, 4));
    }
    for (auto& scales : weight.scales) {
      scales =
          static_cast<uint16_t*>(arena_.Fill(ScaleBytes(weight.rows, cols), FloatToHalf, 0.02f));
    }
    Router& router = linear.router;
    const int scores = weight.num_segments * kNumLevels;
    router.num_hidden = kRouterHidden;
    router.w1 = Tensor::Of(arena_.Fill(kRouterHidden * cols * 2, FloatToHalf, 0.01f), DType::kF16,
                           kRouterHidden, cols);
    router.b1 = router.u = Floats(kRouterHidden, 0);
    router.w2 = Floats(scores * kRouterHidden, 0.1f);
    router.w2.rows = scores, router.w2.cols = router.w2.stride = kRouterHidden;
    router.b2 = Floats(scores, 0);
    return linear;
  }

  void MakeCache(int context) {
    blocks_per_seq_ = (context + kBlockSize - 1) / kBlockSize;
    const int64_t rows = int64_t{max_tokens_} * blocks_per_seq_ * kBlockSize;
    const int64_t cols = shape_.kv_heads * shape_.head_dim;
    for (int i = 0; i < 2 * shape_.layers; ++i) {
      cache_.push_back(Tensor::Of(Random16(rows * cols, 1), Type(), rows, cols));
    }
    const int half = shape_.head_dim / 2;
    rope_.cos = Floats(int64_t{context} * half, 0.6f);
    rope_.sin = Floats(int64_t{context} * half, 0.8f);
    rope_.cos.rows = rope_.sin.rows = context;
    rope_.cos.cols = rope_.cos.stride = rope_.sin.cols = rope_.sin.stride = half;
  }

  Shape shape_;
  Backend& backend_;
  Arena arena_;
  int max_tokens_, tokens_ = 0, context_ = 0, blocks_per_seq_ = 0, variant_ = 0;
  std::vector<Layer> layers_;
  Tensor lm_head_, norm_, residual_, delta_, normed_, qkv_, attention_, gate_up_, swiglu_, logits_;
  RopeTable rope_;
  std::vector<Tensor> cache_;
  uint8_t* levels_ = nullptr;
  Sampled* sampled_ = nullptr;
  int32_t *ids_ = nullptr, *rows_ = nullptr, *positions_ = nullptr, *slots_ = nullptr;
  AttentionBatch batch_;
  RoutingBatch routing_;
  SamplingBatch sampling_;
};

absl::Status Run(Backend& backend) {
  const Shape shape{absl::GetFlag(FLAGS_layers),       absl::GetFlag(FLAGS_hidden),
                    absl::GetFlag(FLAGS_intermediate), absl::GetFlag(FLAGS_heads),
                    absl::GetFlag(FLAGS_kv_heads),     absl::GetFlag(FLAGS_head_dim),
                    absl::GetFlag(FLAGS_vocab)};
  const int context = absl::GetFlag(FLAGS_context), repeats = absl::GetFlag(FLAGS_repeats);
  std::vector<int> tokens;
  for (const std::string& count : absl::GetFlag(FLAGS_tokens)) tokens.push_back(std::stoi(count));
  Stack stack(shape, backend, *std::max_element(tokens.begin(), tokens.end()), context);
  std::printf("%s\n%6s %5s %9s %9s %6s", backend.description().c_str(), "tokens", "level",
              "step us", "floor us", "ratio");
  const std::vector<const char*> ops = {"router",    "linears", "norm",    "rope",
                                        "attention", "swiglu",  "lm_head", "sampling"};
  for (const char* op : ops) std::printf(" %9s", op);
  std::printf("\n");
  for (const int count : tokens) {
    for (const std::string& level : absl::GetFlag(FLAGS_levels)) {
      stack.SetStep(count, std::stoi(level), context, absl::GetFlag(FLAGS_coherent));
      const std::vector<std::string> without = absl::GetFlag(FLAGS_without);
      std::set<std::string> omit(without.begin(), without.end());
      const absl::StatusOr<double> whole = stack.Time(omit, repeats);
      if (!whole.ok()) return whole.status();
      const double floor =
          (stack.LinearBytes(std::stoi(level)) + stack.OtherBytes()) / 3.15e12 * 1e6;
      std::printf("%6d %5s %9.1f %9.1f %6.2f", count, level.c_str(), *whole, floor, *whole / floor);
      for (const char* op : ops) {
        if (!absl::GetFlag(FLAGS_breakdown)) break;
        const bool added = omit.insert(op).second;
        const absl::StatusOr<double> less = stack.Time(omit, repeats);
        if (!less.ok()) return less.status();
        if (added) omit.erase(op);
        std::printf(" %9.1f", *whole - *less);
      }
      std::printf("\n");
      std::fflush(stdout);
    }
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace mobi

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  std::unique_ptr<mobi::Backend> backend;
  if (absl::GetFlag(FLAGS_device) == "cuda") {
    auto created = mobi::CreateCudaBackend({});
    if (!created.ok()) {
      std::fprintf(stderr, "%s\n", std::string(created.status().message()).c_str());
      return 2;
    }
    backend = *std::move(created);
  } else {
    backend = mobi::CreateCpuBackend({});
  }
  const absl::Status status = mobi::Run(*backend);
  if (!status.ok()) std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return status.ok() ? 0 : 1;
}
