// Model::Load: from the host views of a weight source to tensors in the backend's memory. Every
// view gets its place first, without being read; then the source is read once, in its own order,
// and what comes is moved there. Linears that share an input are stacked by rows, so that one op
// reads them all.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/mutex.h"
#include "engine/base/status_macros.h"
#include "engine/model.h"
#include "engine/rope.h"
#include "kernels/numeric.h"

namespace mobi {
namespace {

std::vector<float> ToFloat(DType dtype, absl::Span<const std::byte> bytes) {
  std::vector<float> values(bytes.size() / SizeOf(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(values.data(), bytes.data(), bytes.size());
  } else {
    const auto bits = ElementsOf<uint16_t>(bytes);
    const bool bf16 = dtype == DType::kBF16;
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = bf16 ? BFloat16ToFloat(bits[i]) : HalfToFloat(bits[i]);
    }
  }
  return values;
}

// Where a view of the source goes, and as what.
struct Move {
  std::string name = {};
  DType from = DType::kU8;
  DType to = DType::kU8;
  bool finite = false;  // a value that is not is an error
  std::byte* device = nullptr;
};

double ToMiB(size_t bytes) { return static_cast<double>(bytes) / 1048576; }

bool IsFloat(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
}

}  // namespace

class ModelLoader {
 public:
  ModelLoader(const WeightSource& source, Backend& backend, int max_positions)
      : source_(source), backend_(backend), model_(new Model(source.config(), backend)) {
    model_->routed_ = source.quantized();
    model_->max_positions_ =
        max_positions > 0 ? max_positions : model_->config_.max_position_embeddings;
  }

  absl::StatusOr<std::unique_ptr<Model>> Load(const ReadOptions& options) {
    MOBI_RETURN_IF_ERROR(Place());
    MOBI_RETURN_IF_ERROR(source_.Read(views_, options, [this](size_t i, size_t offset, auto bytes) {
      MoveBytes(moves_[i], offset, bytes);
    }));
    MOBI_RETURN_IF_ERROR(backend_.Synchronize());
    MutexLock lock(mutex_);
    MOBI_RETURN_IF_ERROR(status_);
    return std::move(model_);
  }

 private:
  absl::Status Place() {
    const ModelConfig& config = model_->config_;
    MOBI_RETURN_IF_ERROR(CheckMemory());
    MOBI_RETURN_IF_ERROR(LoadRope());
    if (model_->routed_) {
      MOBI_ASSIGN_OR_RETURN(model_->slice_planes_, SlicePlanes::Create(config, backend_));
      model_->weight_bytes_ += model_->slice_planes_.resident_bytes();
    }
    MOBI_ASSIGN_OR_RETURN(model_->embedding_, Dense("model.embed_tokens.weight", config.vocab_size,
                                                    config.hidden_size));
    MOBI_ASSIGN_OR_RETURN(model_->final_norm_, Norm("model.norm.weight"));
    MOBI_RETURN_IF_ERROR(PlaceLmHead());
    for (int i = 0; i < config.num_hidden_layers; ++i) {
      MOBI_ASSIGN_OR_RETURN(DecoderLayer layer, PlaceLayer(i));
      model_->layers_.push_back(layer);
    }
    return absl::OkStatus();
  }

  void Add(absl::Span<const std::byte> view, Move move) {
    views_.push_back(view);
    moves_.push_back(std::move(move));
  }

  // By the thread that has the bytes in its cache.
  void MoveBytes(const Move& move, size_t offset, absl::Span<const std::byte> bytes) {
    if (move.finite) Check(move, offset, bytes);
    if (move.from == move.to) return Upload(bytes, move.device + offset);
    std::byte* const to = move.device + offset / SizeOf(move.from) * SizeOf(move.to);
    const std::vector<float> values = ToFloat(move.from, bytes);
    if (move.to == DType::kF32) return Upload(absl::MakeConstSpan(values), to);
    std::vector<uint16_t> bits(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      bits[i] = move.to == DType::kBF16 ? FloatToBFloat16(values[i]) : FloatToHalf(values[i]);
    }
    Upload(absl::MakeConstSpan(bits), to);
  }

  void Check(const Move& move, size_t offset, absl::Span<const std::byte> bytes) {
    const std::optional<size_t> index = FirstNonFinite(move.from, bytes);
    if (!index) return;
    MutexLock lock(mutex_);
    status_.Update(absl::InvalidArgumentError(
        absl::StrFormat("%s: %s: element %u is not finite", source_.name(), move.name,
                        offset / SizeOf(move.from) + *index)));
  }

  template <typename T>
  void Upload(absl::Span<const T> values, std::byte* device) {
    const size_t bytes = values.size() * sizeof(T);
    if (backend_.concurrent_uploads()) return backend_.Upload(values.data(), bytes, device);
    MutexLock lock(mutex_);
    backend_.Upload(values.data(), bytes, device);
  }

  // What the weights will take, near enough to refuse what cannot fit before anything is moved.
  absl::StatusOr<size_t> WeightBytes() const {
    const ModelConfig& config = model_->config_;
    const size_t element = std::min(SizeOf(backend_.activation_dtype()), sizeof(uint16_t));
    const size_t embedding = element * config.vocab_size * config.hidden_size;
    size_t layer = 0;
    for (const RoutedGroup& group : RoutedGroupsOfLayer(config, 0)) {
      const int64_t cols = group.linears.front().cols;
      for (const LinearShape& linear : group.linears) {
        layer += model_->routed_ ? SlicedBytes(linear.rows, cols) : element * linear.rows * cols;
      }
      if (!model_->routed_) continue;
      MOBI_ASSIGN_OR_RETURN(
          const RouterTensors router,
          source_.RouterViews(group.router, static_cast<int>(group.linears.size()), cols));
      layer += router.w1.bytes.size();
    }
    size_t lm_head = config.tie_word_embeddings ? 0 : embedding;
    if (source_.lm_head().has_value()) {
      lm_head = SlicedBytes(config.vocab_size, config.hidden_size);
    }
    return embedding + lm_head + layer * config.num_hidden_layers;
  }

  static size_t SlicedBytes(int64_t rows, int64_t cols) {
    return kNumSlices * SliceBytes(rows, cols) + kNumLevels * ScaleBytes(rows, cols);
  }

  absl::Status CheckMemory() const {
    MOBI_ASSIGN_OR_RETURN(const size_t needed, WeightBytes());
    const MemoryInfo memory = backend_.memory();
    if (memory.total == 0 || needed <= memory.free) return absl::OkStatus();
    return absl::ResourceExhaustedError(absl::StrFormat(
        "%s: the weights need %.1f MiB, %.1f of %.1f MiB are free on %s", source_.name(),
        ToMiB(needed), ToMiB(memory.free), ToMiB(memory.total), backend_.description()));
  }

  // A piece of backend memory that lives as long as the model.
  absl::StatusOr<std::byte*> Allocate(size_t bytes, std::string_view what) {
    MOBI_ASSIGN_OR_RETURN(Buffer buffer, backend_.Allocate(bytes, what));
    auto* data = buffer.As<std::byte>();
    model_->buffers_.push_back(std::move(buffer));
    model_->weight_bytes_ += bytes;
    return data;
  }

  absl::StatusOr<Tensor> Floats(const std::vector<float>& values, int64_t rows, int64_t cols,
                                std::string_view what) {
    const size_t bytes = values.size() * sizeof(float);
    MOBI_ASSIGN_OR_RETURN(std::byte * data, Allocate(bytes, what));
    backend_.Upload(values.data(), bytes, data);
    return Tensor::Of(data, DType::kF32, rows, cols);
  }

  absl::Status LoadRope() {
    const RopeValues rope = ComputeRope(model_->config_, model_->max_positions_);
    const int64_t rows = model_->max_positions_, cols = model_->config_.head_dim / 2;
    MOBI_ASSIGN_OR_RETURN(model_->rope_.cos, Floats(rope.cos, rows, cols, "rope table"));
    MOBI_ASSIGN_OR_RETURN(model_->rope_.sin, Floats(rope.sin, rows, cols, "rope table"));
    return absl::OkStatus();
  }

  absl::StatusOr<Tensor> Norm(const std::string& name) {
    const int64_t size = model_->config_.hidden_size;
    MOBI_ASSIGN_OR_RETURN(HostTensor host, source_.Tensor(name, {size}));
    MOBI_RETURN_IF_ERROR(CheckFloat(host));
    MOBI_ASSIGN_OR_RETURN(std::byte * data,
                          Allocate(static_cast<size_t>(size) * sizeof(float), name));
    Add(host.bytes, {name, host.dtype, DType::kF32, false, data});
    return Tensor::Of(data, DType::kF32, 1, size);
  }

  absl::Status CheckFloat(const HostTensor& host) const {
    if (IsFloat(host.dtype)) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat(source_.name(), ": tensor ", host.name, " is ",
                                            std::string(Name(host.dtype)), ", not a float type"));
  }

  absl::Status PlaceLmHead() {
    const ModelConfig& config = model_->config_;
    const int64_t rows = config.vocab_size, cols = config.hidden_size;
    if (const std::optional<LmHeadLevels> levels = source_.lm_head()) {
      MOBI_ASSIGN_OR_RETURN(SlicedLmHead head, PlaceSlicedLmHead(rows, cols));
      head.levels = *levels;
      model_->sliced_lm_head_ = head;
      return absl::OkStatus();
    }
    model_->lm_head_ = model_->embedding_;
    if (!config.tie_word_embeddings) {
      MOBI_ASSIGN_OR_RETURN(model_->lm_head_, Dense("lm_head.weight", rows, cols));
    }
    return absl::OkStatus();
  }

  // Slices that always stay: SlicePlanes has those that may leave.
  absl::StatusOr<SlicedLmHead> PlaceSlicedLmHead(int64_t rows, int64_t cols) {
    MOBI_ASSIGN_OR_RETURN(const SlicedTensors host, source_.SlicedViews(kLmHead, rows, cols));
    SlicedLmHead head;
    head.weight.rows = head.weight.segment_end[0] = PaddedRows(rows);
    head.weight.cols = cols;
    for (int i = 0; i < kNumSlices; ++i) {
      const size_t slice_bytes = host.slices[i].size();
      const size_t scale_bytes = host.scales[i].size() * sizeof(uint16_t);
      MOBI_ASSIGN_OR_RETURN(std::byte * slice, Allocate(slice_bytes, "lm_head"));
      MOBI_ASSIGN_OR_RETURN(std::byte * scales, Allocate(scale_bytes, "lm_head"));
      AddSlice(host, i, slice);
      AddScales(host, kLmHead, i, scales);
      head.weight.slices[i] = reinterpret_cast<const uint8_t*>(slice);
      head.weight.scales[i] = reinterpret_cast<const uint16_t*>(scales);
      head.bytes[i] = static_cast<float>(BytesAtLevel(rows, cols, i + 1));
    }
    return head;
  }

  void AddSlice(const SlicedTensors& host, int i, std::byte* device) {
    Add(host.slice_bytes(i), {.device = device});
  }
  void AddScales(const SlicedTensors& host, std::string_view linear, int i, std::byte* device) {
    Add(host.scale_bytes(i),
        {absl::StrFormat("%s.scales_%d", linear, i + 1), DType::kF16, DType::kF16, true, device});
  }

  absl::StatusOr<Tensor> Dense(const std::string& name, int64_t rows, int64_t cols) {
    return Stacked({{name, rows, cols}});
  }

  // Float weights of several linears, one above the other, in one 16-bit or 32-bit type that the
  // backend multiplies with.
  absl::StatusOr<Tensor> Stacked(const std::vector<LinearShape>& parts) {
    std::vector<HostTensor> hosts;
    int64_t rows = 0;
    const int64_t cols = parts.front().cols;
    DType dtype = backend_.activation_dtype();
    for (const LinearShape& part : parts) {
      MOBI_ASSIGN_OR_RETURN(HostTensor host, source_.Tensor(part.name, {part.rows, part.cols}));
      MOBI_RETURN_IF_ERROR(CheckFloat(host));
      hosts.push_back(std::move(host));
      rows += part.rows;
    }
    // A backend with fp32 activations reads any float type as it is; 16-bit backends their own.
    if (dtype == DType::kF32) dtype = hosts.front().dtype;
    MOBI_ASSIGN_OR_RETURN(
        std::byte * data,
        Allocate(static_cast<size_t>(rows * cols) * SizeOf(dtype), parts[0].name));
    std::byte* at = data;
    for (const HostTensor& host : hosts) {
      Add(host.bytes, {host.name, host.dtype, dtype, false, at});
      at += static_cast<size_t>(host.num_elements()) * SizeOf(dtype);
    }
    return Tensor::Of(data, dtype, rows, cols);
  }

  absl::StatusOr<DecoderLayer> PlaceLayer(int index) {
    DecoderLayer layer;
    const std::string prefix = absl::StrCat("model.layers.", index, ".");
    MOBI_ASSIGN_OR_RETURN(layer.input_norm, Norm(prefix + "input_layernorm.weight"));
    MOBI_ASSIGN_OR_RETURN(layer.post_attention_norm,
                          Norm(prefix + "post_attention_layernorm.weight"));
    const auto groups = RoutedGroupsOfLayer(model_->config_, index);
    for (int g = 0; g < kNumLinearGroups; ++g) {
      if (model_->routed_) {
        MOBI_ASSIGN_OR_RETURN(layer.linears[g].routed, Routed(groups[g]));
      } else {
        std::vector<LinearShape> parts = groups[g].linears;
        for (LinearShape& part : parts) part.name += ".weight";
        MOBI_ASSIGN_OR_RETURN(layer.linears[g].dense, Stacked(parts));
      }
    }
    return layer;
  }

  absl::StatusOr<RoutedWeight> Routed(const RoutedGroup& group) {
    RoutedWeight routed;
    SlicedWeight& weight = routed.weight;
    weight.num_segments = static_cast<int>(group.linears.size());
    weight.cols = group.linears.front().cols;
    std::vector<SlicedTensors> parts;
    for (int s = 0; s < weight.num_segments; ++s) {
      const LinearShape& linear = group.linears[s];
      if (linear.rows % kTileRows != 0) {
        return absl::UnimplementedError(
            absl::StrCat(source_.name(), ": ", linear.name, " has ", linear.rows,
                         " output features, not a multiple of ", kTileRows));
      }
      MOBI_ASSIGN_OR_RETURN(SlicedTensors part,
                            source_.SlicedViews(linear.name, linear.rows, linear.cols));
      parts.push_back(part);
      weight.rows += linear.rows;
      weight.segment_end[s] = weight.rows;
    }
    for (int i = 0; i < kNumSlices; ++i) {
      std::vector<absl::Span<const std::byte>> slices, scales;
      for (const SlicedTensors& part : parts) {
        slices.push_back(part.slice_bytes(i));
        scales.push_back(part.scale_bytes(i));
      }
      SlicePlanes& planes = model_->slice_planes_;
      std::byte* slice = planes.Append(i + 1, slices);
      std::byte* scale = planes.Append(i + 1, scales);
      weight.slices[i] = reinterpret_cast<const uint8_t*>(slice);
      weight.scales[i] = reinterpret_cast<const uint16_t*>(scale);
      for (size_t s = 0; s < parts.size(); ++s) {
        AddSlice(parts[s], i, slice);
        AddScales(parts[s], group.linears[s].name, i, scale);
        slice += slices[s].size();
        scale += scales[s].size();
      }
    }
    model_->routed_tiles_ += weight.rows / kTileRows * (weight.cols / kGroupSize);
    MOBI_ASSIGN_OR_RETURN(routed.router, PlaceRouter(group, weight));
    return routed;
  }

  absl::StatusOr<Router> PlaceRouter(const RoutedGroup& group, const SlicedWeight& weight) {
    const int segments = weight.num_segments;
    MOBI_ASSIGN_OR_RETURN(RouterTensors host,
                          source_.RouterViews(group.router, segments, weight.cols));
    Router router;
    router.num_hidden = host.num_hidden;
    MOBI_ASSIGN_OR_RETURN(router.w1, Raw(host.w1, host.num_hidden, weight.cols));
    MOBI_ASSIGN_OR_RETURN(router.b1, Raw(host.b1, 1, host.num_hidden));
    MOBI_ASSIGN_OR_RETURN(router.u, Raw(host.u, 1, host.num_hidden));
    MOBI_ASSIGN_OR_RETURN(router.w2, Raw(host.w2, int64_t{segments} * kNumLevels, host.num_hidden));
    MOBI_ASSIGN_OR_RETURN(router.b2, Raw(host.b2, 1, int64_t{segments} * kNumLevels));
    for (int s = 0; s < segments; ++s) {
      for (int level = 1; level <= kNumLevels; ++level) {
        const double bytes = BytesAtLevel(group.linears[s].rows, group.linears[s].cols, level);
        router.bytes[s][level - 1] = static_cast<float>(bytes);
        model_->routed_bytes_[level - 1] += static_cast<uint64_t>(bytes);
      }
    }
    return router;
  }

  // Of a router.
  absl::StatusOr<Tensor> Raw(const HostTensor& host, int64_t rows, int64_t cols) {
    MOBI_ASSIGN_OR_RETURN(std::byte * data, Allocate(host.bytes.size(), host.name));
    Add(host.bytes, {host.name, host.dtype, host.dtype, true, data});
    return Tensor::Of(data, host.dtype, rows, cols);
  }

  const WeightSource& source_;
  Backend& backend_;
  std::unique_ptr<Model> model_;
  std::vector<absl::Span<const std::byte>> views_;
  std::vector<Move> moves_;  // one for each view
  Mutex mutex_;              // of the backend, too, where uploads must not meet
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

absl::StatusOr<std::unique_ptr<Model>> Model::Load(const WeightSource& source, Backend& backend,
                                                   int max_positions, const ReadOptions& options) {
  return ModelLoader(source, backend, max_positions).Load(options);
}

}  // namespace mobi
