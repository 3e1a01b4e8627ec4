// The CUDA backend: memory, one stream, one scratch area, and the checks before each op's launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/backend.h"
#include "kernels/cuda/cublas.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/fault.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/pending_ops.h"
#include "kernels/cuda/routed_matmul.h"
#include "kernels/cuda/sliced_matmul.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/step_graphs.h"

namespace mobi {
namespace {

using cuda::DeviceInfo;

constexpr size_t kScratchBytes = size_t{256} << 20;
constexpr int kNumCounters = 65536;
// Products of a float model with more tokens than this go to cuBLAS where there is one.
constexpr int64_t kOwnDenseTokens = 64;

std::string MiB(size_t bytes) {
  return absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / 1048576.0);
}

bool SameRows(const Tensor& a, const Tensor& b) {
  return a.data == b.data && a.rows == b.rows && a.stride == b.stride;
}

bool Is16Bit(DType dtype) { return dtype == DType::kF16 || dtype == DType::kBF16; }

class CudaBackend final : public Backend {
 public:
  CudaBackend(DeviceInfo device, DType activation) : device_(device), activation_(activation) {}
  ~CudaBackend() override;

  absl::Status Initialize();

  std::string_view name() const override { return "cuda"; }
  std::string description() const override;
  DType activation_dtype() const override { return activation_; }
  MemoryInfo memory() const override;

  absl::StatusOr<Buffer> Allocate(size_t bytes, std::string_view what) override;
  absl::StatusOr<Buffer> Reserve(size_t bytes, std::string_view what) override;
  absl::Status Commit(void* at, size_t bytes, std::string_view what) override;
  void Decommit(void* at, size_t bytes) override;
  size_t page_bytes() const override { return device_memory_.page_bytes(); }
  void Upload(const void* host, size_t bytes, void* device) override;
  void Download(const void* device, size_t bytes, void* host) override;
  void Zero(void* device, size_t bytes) override;
  absl::Status Synchronize() override;

  int PaddedDecodes(int num_decodes) const override;
  void RunStep(const StepKey& key, absl::FunctionRef<void()> body) override;

  void Embed(Tensor table, const int32_t* ids, Tensor out) override;
  void RmsNorm(Tensor x, Tensor weight, float eps, Tensor out) override;
  void AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out) override;
  void Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch, uint8_t* levels,
             int64_t levels_stride) override;
  void SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                    int64_t levels_stride, Tensor out) override;
  void DenseMatmul(Tensor x, Tensor weight, Tensor out) override;
  void RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                      const int32_t* slots, const AttentionShape& shape, KvLayer kv) override;
  void Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
                 const AttentionShape& shape, Tensor out) override;
  void SwiGlu(Tensor gate_up, Tensor out) override;
  void GatherRows(Tensor x, const int32_t* rows, Tensor out) override;
  void Sample(Tensor logits, const SamplingBatch& batch, Sampled* out) override;
  void TokenLogprobs(Tensor logits, const int32_t* ids, float* out) override;
  void MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count,
                  TopLogprobs* out) override;

 private:
  // Before any CUDA call: false once the device has failed. The current device belongs to the
  // calling thread, and a backend may change threads between start and first step.
  bool Enter();
  // The same, and what is pending is launched. Every public method begins with one of the two.
  bool EnterAlone();
  // Whether the route and the matmul of x's long prompts, which read one level, need no router:
  // then Route is of the short ones alone.
  bool RoutesShortAlone(const Tensor& x, const SlicedWeight& weight) const;
  // The matmul of pinned tokens, with the input that is pending; none: no kernel does both.
  std::optional<cuda::RoutedMatmul> TakePinned(Tensor x, const SlicedWeight& weight,
                                               const uint8_t* levels, Tensor out);
  // The matmul of long prompts that read one level; false: they do not, or there is no room.
  bool LaunchLongPrompts(Tensor x, const SlicedWeight& weight, int64_t num_short, Tensor out);
  void LaunchRoute(const cuda::RoutedMatmul& op);
  cuda::SlicedMatmulLaunch MatmulLaunch() const;
  bool IsActivation(const Tensor& t) const { return t.dtype == activation_; }
  bool HasCublas();
  absl::Status OutOfMemory(std::string_view what, size_t bytes) const;
  void Free(void* data) override;

  const DeviceInfo device_;
  const DType activation_;
  cuda::Fault fault_;
  std::thread::id thread_;
  cudaStream_t stream_ = nullptr;
  cuda::LaunchContext context_;
  cuda::DeviceMemory device_memory_;
  int clusters_[4] = {};  // of 2^i blocks that run at a time
  std::unique_ptr<cuda::Staging> staging_;
  std::unique_ptr<cuda::StepGraphs> graphs_;
  // Ops that wait for the next one, which may be able to do both in one kernel. A norm or SwiGLU is
  // taken by the route that follows, that by its matmul, and that by the norm that adds its output
  // to the residual; pinned tokens have no route, and the matmul takes the norm or SwiGLU. Of long
  // prompts that read one level, these ops and attention leave their results as the matmul reads
  // them. At most one is set, but for a route of short prompts beside the input of long ones.
  std::optional<cuda::PendingInput> pending_input_;
  std::optional<cuda::RoutedMatmul> pending_route_;   // without its output
  std::optional<cuda::RoutedMatmul> pending_matmul_;  // without its residual
  std::optional<cuda::PendingRope> pending_rope_;
  std::optional<cuda::PendingAttention> pending_attention_;
  std::optional<StepKey> step_;           // while a step with prompts runs
  std::unique_ptr<cuda::Cublas> cublas_;  // loaded by the first op that can use it
  bool cublas_asked_ = false;
};

CudaBackend::~CudaBackend() {
  cudaSetDevice(device_.device);
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  graphs_.reset();
  staging_.reset();
  cublas_.reset();
  cudaFree(context_.counters);
  cudaFree(context_.scratch);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

absl::Status CudaBackend::Initialize() {
  thread_ = std::this_thread::get_id();
  if (!fault_.Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream")) {
    return fault_.status();
  }
  if (!fault_.Check(device_memory_.Create(device_.device), "device memory")) {
    return fault_.status();
  }
  staging_ = std::make_unique<cuda::Staging>();
  graphs_ = std::make_unique<cuda::StepGraphs>();
  if (!fault_.Check(staging_->Create(stream_), "pinned host memory")) return fault_.status();
  const size_t counter_bytes = kNumCounters * sizeof(uint32_t);
  if (cudaMalloc(&context_.scratch, kScratchBytes) != cudaSuccess ||
      cudaMalloc(&context_.counters, counter_bytes) != cudaSuccess) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the CUDA backend's scratch needs ", MiB(kScratchBytes + counter_bytes), ", ",
                     MiB(memory().free), " are free on ", device_.name));
  }
  fault_.Check(cudaMemsetAsync(context_.counters, 0, counter_bytes, stream_), "counters");
  fault_.Check(cuda::FindClusterLimits(device_.compute_capability, device_.num_sms, clusters_),
               "clusters");
  context_.stream = stream_;
  context_.num_sms = device_.num_sms;
  context_.dependent_launch = context_.clusters = device_.compute_capability >= 90;
  context_.wgmma = device_.compute_capability == 90;
  context_.scratch_bytes = kScratchBytes;
  context_.num_counters = kNumCounters;
  return Synchronize();
}

std::string CudaBackend::description() const {
  return absl::StrFormat(
      "CUDA device %d: %s, compute capability %d.%d, %d multiprocessors, %s, CUDA %d.%d, %s",
      device_.device, device_.name, device_.compute_capability / 10,
      device_.compute_capability % 10, device_.num_sms, MiB(device_.total_memory),
      device_.runtime_version / 1000, device_.runtime_version % 1000 / 10,
      activation_ == DType::kF16 ? "F16" : "BF16");
}

MemoryInfo CudaBackend::memory() const {
  MemoryInfo info;
  cudaSetDevice(device_.device);
  if (cudaMemGetInfo(&info.free, &info.total) != cudaSuccess) return {};
  return info;
}

bool CudaBackend::Enter() {
  if (!fault_.ok()) return false;
  if (thread_ == std::this_thread::get_id()) return true;
  thread_ = std::this_thread::get_id();
  return fault_.Check(cudaSetDevice(device_.device), "set device");
}

bool CudaBackend::EnterAlone() {
  if (!Enter()) return false;
  if (const auto input = std::exchange(pending_input_, std::nullopt)) {
    fault_.Check(input->Launch(context_), "RmsNorm or SwiGlu");
  }
  if (const auto attention = std::exchange(pending_attention_, std::nullopt)) {
    fault_.Check(attention->Launch(context_), "Attention");
  }
  if (const auto route = std::exchange(pending_route_, std::nullopt)) LaunchRoute(*route);
  if (const auto matmul = std::exchange(pending_matmul_, std::nullopt)) {
    fault_.Check(cuda::LaunchRoutedMatmul(context_, MatmulLaunch(), *matmul), "SlicedMatmul");
  }
  if (const auto rope = std::exchange(pending_rope_, std::nullopt)) {
    fault_.Check(rope->Launch(context_), "RopeAndWriteKv");
  }
  return fault_.ok();
}

absl::StatusOr<Buffer> CudaBackend::Allocate(size_t bytes, std::string_view what) {
  if (!Enter()) return fault_.status();
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, std::max<size_t>(bytes, 1));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is not sticky and is reported here
    return OutOfMemory(what, bytes);
  }
  if (!fault_.Check(error, "cudaMalloc")) return fault_.status();
  return Buffer(this, data, bytes);
}

absl::Status CudaBackend::OutOfMemory(std::string_view what, size_t bytes) const {
  const MemoryInfo info = memory();
  return absl::ResourceExhaustedError(absl::StrCat(
      std::string(what), " needs ", bytes, " bytes (", MiB(bytes), "); ", info.free, " bytes (",
      MiB(info.free), ") of ", MiB(info.total), " are free on ", device_.name));
}

absl::StatusOr<Buffer> CudaBackend::Reserve(size_t bytes, std::string_view what) {
  if (!Enter()) return fault_.status();
  if (!device_memory_.supported()) return Backend::Reserve(bytes, what);
  void* data = nullptr;
  const cudaError_t error = device_memory_.Reserve(bytes, &data);
  if (error == cudaErrorMemoryAllocation) return OutOfMemory(what, bytes);
  if (!fault_.Check(error, "reserve")) return fault_.status();
  return Buffer(this, data, bytes);
}

absl::Status CudaBackend::Commit(void* at, size_t bytes, std::string_view what) {
  if (!EnterAlone() || !fault_.Require(!graphs_->capturing(), "Commit inside a step")) {
    return fault_.status();
  }
  const cudaError_t error = device_memory_.Commit(at, bytes);
  if (error == cudaErrorMemoryAllocation) return OutOfMemory(what, bytes);
  if (fault_.Check(error, "commit")) Zero(at, bytes);
  return fault_.status();
}

void CudaBackend::Decommit(void* at, size_t bytes) {
  if (!Synchronize().ok()) return;
  fault_.Check(device_memory_.Decommit(at, bytes), "decommit");
}

void CudaBackend::Free(void* data) {
  EnterAlone();
  cudaSetDevice(device_.device);
  cudaStreamSynchronize(stream_);
  graphs_->Clear();
  if (device_memory_.Free(data)) return;
  cudaFree(data);  // waits for the device; after a fault its error is the fault's
}

void CudaBackend::Upload(const void* host, size_t bytes, void* device) {
  if (!EnterAlone() || !fault_.Require(!graphs_->capturing(), "Upload inside a step")) return;
  fault_.Check(staging_->Upload(host, bytes, device), "upload");
}

void CudaBackend::Download(const void* device, size_t bytes, void* host) {
  if (!EnterAlone() || !fault_.Require(!graphs_->capturing(), "Download inside a step")) return;
  fault_.Check(staging_->Download(device, bytes, host), "download");
}

void CudaBackend::Zero(void* device, size_t bytes) {
  if (!EnterAlone() || bytes == 0) return;
  fault_.Check(cudaMemsetAsync(device, 0, bytes, stream_), "zero");
}

absl::Status CudaBackend::Synchronize() {
  if (!EnterAlone()) return fault_.status();
  if (fault_.Check(cudaStreamSynchronize(stream_), "synchronize")) staging_->Finish();
  return fault_.status();
}

// Powers of two, then steps of 8 and 16: at most a third of a step's rows are padding.
int CudaBackend::PaddedDecodes(int num_decodes) const {
  int padded = 1;
  while (padded < num_decodes) padded += padded < 8 ? padded : padded < 64 ? 8 : 16;
  return padded;
}

void CudaBackend::RunStep(const StepKey& key, absl::FunctionRef<void()> body) {
  if (!EnterAlone()) return;
  if (!key.decode_only) {
    step_ = key;
    body();
    step_.reset();
    return;
  }
  fault_.Check(graphs_->Run(key, stream_,
                            [&] {
                              body();
                              EnterAlone();
                            }),
               "step");
}

void CudaBackend::Embed(Tensor table, const int32_t* ids, Tensor out) {
  if (!EnterAlone() || out.rows == 0) return;
  fault_.Check(cuda::LaunchGather(context_, table, ids, out), "Embed");
}

void CudaBackend::GatherRows(Tensor x, const int32_t* rows, Tensor out) {
  if (!EnterAlone() || out.rows == 0) return;
  fault_.Check(cuda::LaunchGather(context_, x, rows, out), "GatherRows");
}

void CudaBackend::RmsNorm(Tensor x, Tensor weight, float eps, Tensor out) {
  AddRmsNorm(Tensor{}, weight, eps, x, out);
}

void CudaBackend::AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out) {
  if (pending_matmul_.has_value() && cuda::TakesResidual(*pending_matmul_) &&
      delta.data != nullptr && pending_matmul_->out.data == delta.data &&
      pending_matmul_->out.rows == residual.rows && pending_matmul_->out.cols == residual.cols &&
      IsActivation(residual) && residual.data != delta.data) {
    pending_matmul_->residual = residual;
    delta = Tensor{};
  }
  if (!EnterAlone() || out.rows == 0) return;
  if (!fault_.Require(IsActivation(residual) && IsActivation(out) && weight.dtype == DType::kF32 &&
                          out.cols <= cuda::kMaxNormColumns,
                      "RmsNorm: types or more than 16384 columns")) {
    return;
  }
  pending_input_ = {{cuda::RouteInput::kNorm, residual, delta, weight, eps}, out};
}

bool CudaBackend::RoutesShortAlone(const Tensor& x, const SlicedWeight& weight) const {
  if (!step_.has_value() || step_->long_level == 0 || step_->num_short == 0 ||
      step_->num_tokens != x.rows || !context_.clusters) {
    return false;
  }
  Tensor out = x;
  out.cols = out.stride = weight.rows;
  return cuda::TakesPrefillImages(MatmulLaunch(), x, weight, out);
}

void CudaBackend::Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch,
                        uint8_t* levels, int64_t levels_stride) {
  const bool short_alone = RoutesShortAlone(x, linear.weight);
  const int64_t routed = short_alone ? step_->num_short : batch.num_tokens;
  cuda::RouteSource source;
  std::optional<cuda::PendingInput> of_long;
  if (pending_input_.has_value() && SameRows(pending_input_->x, x.FirstRows(batch.num_tokens)) &&
      cuda::CanFuseRoute(context_, pending_input_->source, x, linear)) {
    const auto made = std::exchange(pending_input_, std::nullopt);
    source = made->source.Rows(0, routed);
    if (short_alone) of_long = made->Rows(routed, x.rows - routed);
  }
  if (!EnterAlone() || batch.num_tokens == 0) return;
  const Router& router = linear.router;
  if (!fault_.Require(IsActivation(x) && router.w1.dtype == DType::kF16 && router.num_hidden >= 1 &&
                          router.num_hidden <= cuda::kMaxRouterHidden &&
                          linear.weight.cols % kGroupSize == 0 && x.stride % 8 == 0,
                      "Route: types, more than 64 hidden units, or columns not whole groups")) {
    return;
  }
  pending_input_ = of_long;
  pending_route_ = {source, x.FirstRows(routed), linear, batch, 0, levels, levels_stride, {}, {}};
  pending_route_->batch.num_tokens = static_cast<int>(routed);
  if (short_alone) {
    pending_route_->others_level = step_->long_level;
  } else if (!cuda::CanRouteInMatmul(context_, MatmulLaunch(), *pending_route_)) {
    EnterAlone();
  }
}

void CudaBackend::LaunchRoute(const cuda::RoutedMatmul& op) {
  fault_.Check(cuda::LaunchRoute(context_, op.source, op.x, op.linear, op.batch, op.others_level,
                                 op.levels, op.levels_stride),
               "Route");
}

cuda::SlicedMatmulLaunch CudaBackend::MatmulLaunch() const {
  cuda::SlicedMatmulLaunch launch;
  launch.stream = stream_;
  launch.num_sms = device_.num_sms;
  launch.compute_capability = device_.compute_capability;
  std::copy(clusters_, clusters_ + std::size(clusters_), launch.clusters);
  launch.pdl = context_.dependent_launch;
  launch.workspace = context_.scratch;
  launch.workspace_bytes = context_.scratch_bytes;
  return launch;
}

void CudaBackend::SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                               int64_t levels_stride, Tensor out) {
  // Which kernel computes a token depends on its request alone. Logits, which are in fp32, and
  // whatever comes outside of a step: the short one's.
  const bool prompts =
      step_.has_value() && step_->num_tokens == out.rows && out.dtype != DType::kF32;
  const int64_t num_short = prompts ? step_->num_short : out.rows;
  std::optional<cuda::RoutedMatmul> routed;  // with the route that is pending
  if (pending_route_.has_value() && pending_route_->x.data == x.data &&
      pending_route_->levels == levels && pending_route_->x.rows == num_short &&
      pending_route_->linear.weight.slices == weight.slices && IsActivation(out)) {
    routed = std::exchange(pending_route_, std::nullopt);
    routed->out = out.FirstRows(num_short);
  }
  if (!routed.has_value() && levels_stride == 0 && num_short == out.rows && IsActivation(out)) {
    routed = TakePinned(x, weight, levels, out);
  }
  if (routed.has_value() && num_short == out.rows) {
    pending_matmul_ = routed;
    return;
  }
  const bool long_done = num_short < out.rows && LaunchLongPrompts(x, weight, num_short, out);
  if (!EnterAlone() || out.rows == 0) return;
  // A route of short prompts alone leaves no levels of long ones.
  if (!fault_.Require(long_done || !routed.has_value(),
                      "SlicedMatmul: type or stride of its output")) {
    return;
  }
  cuda::SlicedMatmulLaunch launch = MatmulLaunch();
  if (routed.has_value() && cuda::CanRouteInMatmul(context_, launch, *routed)) {
    fault_.Check(cuda::LaunchRoutedMatmul(context_, launch, *routed), "SlicedMatmul");
  } else if (num_short > 0) {
    if (routed.has_value()) LaunchRoute(*routed);
    fault_.Check(cuda::LaunchSlicedMatmul(launch, x.FirstRows(num_short), weight, levels,
                                          levels_stride, out.FirstRows(num_short)),
                 "SlicedMatmul");
  }
  if (num_short < out.rows && !long_done) {
    launch.path = cuda::SlicedMatmulPath::kPrefill;
    fault_.Check(cuda::LaunchSlicedMatmul(launch, x.Rows(num_short, out.rows - num_short), weight,
                                          levels + num_short, levels_stride,
                                          out.Rows(num_short, out.rows - num_short)),
                 "SlicedMatmul");
  }
}

std::optional<cuda::RoutedMatmul> CudaBackend::TakePinned(Tensor x, const SlicedWeight& weight,
                                                          const uint8_t* levels, Tensor out) {
  cuda::RoutedMatmul op;
  op.x = x;
  op.linear.weight = weight;
  op.batch.num_tokens = static_cast<int>(x.rows);
  op.pinned_levels = levels;
  op.out = out;
  const bool makes_x = pending_input_.has_value() && SameRows(pending_input_->x, x);
  if (makes_x) op.source = pending_input_->source;
  if (x.rows == 0 || !cuda::CanRouteInMatmul(context_, MatmulLaunch(), op)) return std::nullopt;
  if (makes_x) pending_input_.reset();
  if (!EnterAlone()) return std::nullopt;
  return op;
}

bool CudaBackend::LaunchLongPrompts(Tensor x, const SlicedWeight& weight, int64_t num_short,
                                    Tensor out) {
  const Tensor long_x = x.Rows(num_short, x.rows - num_short);
  const Tensor long_out = out.Rows(num_short, x.rows - num_short);
  const cuda::SlicedMatmulLaunch launch = MatmulLaunch();
  if (step_->long_level == 0 || !cuda::TakesPrefillImages(launch, long_x, weight, long_out)) {
    return false;
  }
  // x is made by the op that is pending, of all rows or of these, or is there.
  std::optional<cuda::PendingInput> input;
  std::optional<cuda::PendingAttention> attention;
  if (pending_input_.has_value() &&
      (SameRows(pending_input_->x, x) || SameRows(pending_input_->x, long_x))) {
    input = std::exchange(pending_input_, std::nullopt);
  } else if (pending_attention_.has_value() && SameRows(pending_attention_->out, x)) {
    attention = std::exchange(pending_attention_, std::nullopt);
  }
  if (!EnterAlone()) return false;
  const auto leave = [&](cuda::PrefillImages images) {
    if (attention.has_value()) return attention->Launch(context_, images);
    if (!input.has_value()) return cuda::LaunchLeaveRows(context_, long_x, images);
    images.first_row = static_cast<int>(input->x.rows - long_x.rows);
    return input->Launch(context_, images);
  };
  fault_.Check(cuda::LaunchSlicedMatmul(launch, long_x, weight, step_->long_level, leave, long_out),
               "SlicedMatmul");
  return true;
}

bool CudaBackend::HasCublas() {
  if (!cublas_asked_) cublas_ = cuda::Cublas::Load(stream_);
  cublas_asked_ = true;
  return cublas_ != nullptr;
}

void CudaBackend::DenseMatmul(Tensor x, Tensor weight, Tensor out) {
  if (!EnterAlone() || out.rows == 0) return;
  if (!fault_.Require(IsActivation(x) && (out.dtype == DType::kF32 || IsActivation(out)),
                      "DenseMatmul: types")) {
    return;
  }
  if (out.rows > kOwnDenseTokens && IsActivation(weight) && IsActivation(out) && HasCublas()) {
    fault_.Check(cublas_->Matmul(x, weight, out), "DenseMatmul");
    return;
  }
  fault_.Check(cuda::LaunchDenseMatmul(context_, x, weight, out), "DenseMatmul");
}

void CudaBackend::RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                                 const int32_t* slots, const AttentionShape& shape, KvLayer kv) {
  if (!EnterAlone() || qkv.rows == 0) return;
  if (!fault_.Require(IsActivation(qkv) && IsActivation(kv.k) && IsActivation(kv.v),
                      "RopeAndWriteKv: types")) {
    return;
  }
  pending_rope_ = {qkv, rope, positions, slots, shape, kv};
}

void CudaBackend::Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
                            const AttentionShape& shape, Tensor out) {
  cuda::DecodeRope rope;
  if (pending_rope_.has_value() && pending_rope_->qkv.data == q.data && batch.max_query_len == 1 &&
      pending_rope_->qkv.rows == batch.num_seqs && pending_rope_->kv.k.data == kv.k.data &&
      cuda::CanFuseRope(shape)) {
    rope = {pending_rope_->rope.cos.Row<float>(0), pending_rope_->rope.sin.Row<float>(0),
            pending_rope_->rope.cos.stride, pending_rope_->positions, pending_rope_->slots};
    pending_rope_.reset();
  }
  if (!EnterAlone() || batch.num_seqs == 0 || q.rows == 0) return;
  const bool head_dim = shape.head_dim == 32 || shape.head_dim == 64 || shape.head_dim == 128;
  const bool strides =
      q.stride % 8 == 0 && kv.k.stride % 8 == 0 && kv.v.stride % 8 == 0 && out.stride % 8 == 0;
  if (!fault_.Require(IsActivation(q) && IsActivation(kv.k) && IsActivation(out) && head_dim &&
                          strides && shape.num_heads % shape.num_kv_heads == 0,
                      "Attention: types, strides, or a head_dim other than 32, 64 and 128")) {
    return;
  }
  // Decodes and short prompts beside them would need their rows of `out`.
  if (step_.has_value() && step_->long_level > 0 && step_->num_short == 0) {
    pending_attention_ = {q, kv, batch, shape, out};
    return;
  }
  fault_.Check(cuda::LaunchAttention(context_, q, kv, batch, shape, rope, out), "Attention");
}

void CudaBackend::SwiGlu(Tensor gate_up, Tensor out) {
  if (!EnterAlone() || out.rows == 0) return;
  if (!fault_.Require(IsActivation(gate_up) && IsActivation(out), "SwiGlu: types")) return;
  pending_input_ = {{cuda::RouteInput::kSwiGlu, gate_up, {}, {}, 0}, out};
}

void CudaBackend::Sample(Tensor logits, const SamplingBatch& batch, Sampled* out) {
  if (!EnterAlone() || batch.num_rows == 0) return;
  fault_.Check(cuda::LaunchSample(context_, logits, batch, out), "Sample");
}

void CudaBackend::TokenLogprobs(Tensor logits, const int32_t* ids, float* out) {
  if (!EnterAlone() || logits.rows == 0) return;
  fault_.Check(cuda::LaunchTokenLogprobs(context_, logits, ids, out), "TokenLogprobs");
}

void CudaBackend::MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count,
                             TopLogprobs* out) {
  if (!EnterAlone() || num_rows == 0 || count == 0) return;
  fault_.Check(cuda::LaunchMostLikely(context_, logits, rows, num_rows, count, out), "MostLikely");
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaOptions& options) {
  if (!Is16Bit(options.activation_dtype)) {
    return absl::InvalidArgumentError("CUDA: activations are fp16 or bf16");
  }
  absl::StatusOr<DeviceInfo> device = cuda::OpenDevice(options.device);
  if (!device.ok()) return device.status();
  auto backend = std::make_unique<CudaBackend>(*std::move(device), options.activation_dtype);
  const absl::Status status = backend->Initialize();
  if (!status.ok()) return status;
  return backend;
}

}  // namespace mobi
