// Checks and times the CUDA sliced matmul alone, without a model: every case first against float64
// on the device (fresh random bits, poisoned outputs), then LLaMA-3-8B's decoder linears, with
// weights rotated through more memory than L2 holds, as medians of CUDA-graph replays, beside
// cuBLAS fp16 in the same run.
//   sliced-bench [check] [time] [prefill] [--quick] [--no-pdl]   prefill: that path instead of
//   decode sliced-bench profile LINEAR TOKENS LEVEL [prefill]
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/sliced_matmul.h"
#include "kernels/sliced_weight.h"

namespace mobi::cuda {
namespace {

constexpr double kPeakBytes = 3.15e12;  // pure read, measured on this chip

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK_CUDA(call) Check(call, #call)

// ---- Device memory and random contents.

__device__ uint32_t Hash(uint64_t i) {
  i = (i ^ (i >> 30)) * 0xBF58476D1CE4E5B9u;
  i = (i ^ (i >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>((i ^ (i >> 31)) >> 16);
}

__device__ float Uniform(uint64_t seed, uint64_t i) {
  return static_cast<float>(Hash(seed * 0x9E3779B97F4A7C15u + i + 1)) * 0x1p-32f;
}

__device__ float Normal(uint64_t seed, uint64_t i) {
  const float u = fmaxf(Uniform(seed, 2 * i), 1e-7f), v = Uniform(seed, 2 * i + 1);
  return sqrtf(-2 * logf(u)) * cosf(6.2831853f * v);
}

__global__ void FillBits(uint32_t* to, size_t words, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{gridDim.x} * blockDim.x) {
    to[i] = Hash(seed * 0x9E3779B97F4A7C15u + i);
  }
}

__global__ void FillPairs(half2* to, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const float range = 0.02f + 0.1f * Uniform(seed, 2 * i);
    to[i] = __floats2half2_rn(range, -range * (0.3f + 0.4f * Uniform(seed, 2 * i + 1)));
  }
}

__global__ void FillNormal(void* to, size_t count, uint64_t seed, bool bf16, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const float x = scale * Normal(seed, i);
    if (bf16) {
      static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(x);
    } else {
      static_cast<half*>(to)[i] = __float2half_rn(x);
    }
  }
}

template <typename T>
struct Device {
  T* data = nullptr;
  size_t count = 0;
  Device() = default;
  explicit Device(size_t n) : count(n) {
    CHECK_CUDA(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T)));
  }
  Device(Device&& other) noexcept { std::swap(data, other.data), std::swap(count, other.count); }
  Device& operator=(Device&& other) noexcept {
    std::swap(data, other.data), std::swap(count, other.count);
    return *this;
  }
  ~Device() { cudaFree(data); }
};

struct Weight {
  Device<uint8_t> slices, scales;
  SlicedWeight view;
};

Weight RandomWeight(const std::vector<int64_t>& segments, int64_t cols, uint64_t seed) {
  Weight weight;
  int64_t rows = 0;
  weight.view.num_segments = static_cast<int>(segments.size());
  for (size_t s = 0; s < segments.size(); ++s) weight.view.segment_end[s] = rows += segments[s];
  weight.view.rows = rows;
  weight.view.cols = cols;
  const size_t slice = SliceBytes(rows, cols), scale = ScaleBytes(rows, cols);
  weight.slices = Device<uint8_t>(kNumSlices * slice);
  weight.scales = Device<uint8_t>(kNumLevels * scale);
  FillBits<<<2048, 256>>>(reinterpret_cast<uint32_t*>(weight.slices.data), kNumSlices * slice / 4,
                          seed);
  FillPairs<<<2048, 256>>>(reinterpret_cast<half2*>(weight.scales.data), kNumLevels * scale / 4,
                           seed + 1);
  CHECK_CUDA(cudaGetLastError());
  for (int s = 0; s < kNumSlices; ++s) weight.view.slices[s] = weight.slices.data + s * slice;
  for (int k = 0; k < kNumLevels; ++k) {
    weight.view.scales[k] = reinterpret_cast<const uint16_t*>(weight.scales.data + k * scale);
  }
  return weight;
}

// ---- The float64 reference, written from bit_slice.h's words alone.

__device__ double ToDouble(const void* p, int64_t i, DType type) {
  if (type == DType::kF32) return static_cast<const float*>(p)[i];
  if (type == DType::kF16) return __half2float(static_cast<const half*>(p)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
}

__global__ void Reference(SlicedWeight weight, Tensor x, const uint8_t* levels, int64_t stride,
                          double* out) {
  const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, token = blockIdx.y;
  if (row >= weight.rows) return;
  int segment = 0;
  while (row >= weight.segment_end[segment]) ++segment;
  const int level = levels[segment * stride + token];
  const int64_t groups = weight.cols / kGroupSize;
  double sum = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t tile = row / kTileRows * groups + group;
    const half2 pair = reinterpret_cast<const half2*>(
        weight.scales[level - 1])[tile * kTileRows + row % kTileRows];
    const double range = __low2float(pair), offset = __high2float(pair);
    for (int col = 0; col < kGroupSize; ++col) {
      const int g = row % 8, h = row % 16 / 8;
      const int word = (4 * g + col / 32) * 4 + col / 8 % 4;
      const int bit = 8 - 4 * (col / 2 % 4) - 2 * h;
      const int shift = (bit < 0 ? bit + 16 : bit) + 16 * (col % 2);
      int code = 0;
      for (int s = 0; s < level; ++s) {
        const uint32_t bits =
            reinterpret_cast<const uint32_t*>(weight.slices[s])[tile * kTileWords + word];
        code = code * 4 + (bits >> shift & 3);
      }
      const double w = offset + range * (code + 0.5) / (1 << (2 * level));
      sum += w * ToDouble(x.data, token * x.stride + group * kGroupSize + col, x.dtype);
    }
  }
  out[token * weight.rows + row] = sum;
}

// sums[0] = |out - ref|^2, sums[1] = |ref|^2, sums[2] = elements that are not finite; worst =
// largest |out - ref|.
__global__ void Compare(Tensor out, const double* reference, double* sums,
                        unsigned long long* worst) {
  const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, token = blockIdx.y;
  if (row >= out.cols) return;
  const double expected = reference[token * out.cols + row];
  const double actual = ToDouble(out.data, token * out.stride + row, out.dtype);
  const double difference = actual - expected;
  if (!isfinite(actual)) atomicAdd(&sums[2], 1.0);
  atomicAdd(&sums[0], difference * difference);
  atomicAdd(&sums[1], expected * expected);
  atomicMax(worst, static_cast<unsigned long long>(__double_as_longlong(fabs(difference))));
}

__global__ void CountDifferent(const uint32_t* a, const uint32_t* b, size_t words,
                               unsigned long long* count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{gridDim.x} * blockDim.x) {
    if (a[i] != b[i]) atomicAdd(count, 1ull);
  }
}

// ---- A machine: properties, workspace, launches.

struct Machine {
  cudaDeviceProp properties{};
  SlicedMatmulLaunch launch;
  Device<uint8_t> workspace;

  Machine() {
    CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
    CHECK_CUDA(cudaStreamCreateWithFlags(&launch.stream, cudaStreamNonBlocking));
    launch.num_sms = properties.multiProcessorCount;
    launch.compute_capability = 10 * properties.major + properties.minor;
    const char* pretend = std::getenv("SLICED_BENCH_CAPABILITY");
    if (pretend != nullptr) launch.compute_capability = std::atoi(pretend);
    CHECK_CUDA(FindClusterLimits(launch.compute_capability, launch.num_sms, launch.clusters));
    launch.workspace_bytes = size_t{256} << 20;  // as the backend has it
    workspace = Device<uint8_t>(launch.workspace_bytes);
    launch.workspace = workspace.data;
  }
};

Tensor Slice(Tensor t, int64_t first, int64_t count) {
  t.data =
      static_cast<std::byte*>(t.data) + first * t.stride * static_cast<int64_t>(SizeOf(t.dtype));
  t.rows = count;
  return t;
}

// ---- Checks.

struct CheckCase {
  std::vector<int64_t> segments;
  int64_t cols;
  int tokens;
  DType x, out;
  std::vector<uint8_t> levels;  // [segment][token]
  const char* mode;
};

class Checker {
 public:
  explicit Checker(Machine& machine) : machine_(machine) {}

  void Run(SlicedMatmulPath path, const CheckCase& c) {
    const Weight weight = RandomWeight(c.segments, c.cols, ++seed_);
    const int64_t rows = weight.view.rows, stride = c.cols + 8 * (seed_ % 3);
    Device<uint16_t> x(c.tokens * stride);
    FillNormal<<<512, 256>>>(x.data, x.count, ++seed_, c.x == DType::kBF16,
                             c.x == DType::kBF16 ? 3e4f : 1);
    Device<uint8_t> levels(c.levels.size());
    CHECK_CUDA(cudaMemcpy(levels.data, c.levels.data(), c.levels.size(), cudaMemcpyHostToDevice));
    const int64_t out_stride = rows + 2 * (seed_ % 5);
    Device<uint8_t> out(c.tokens * out_stride * SizeOf(c.out));
    CHECK_CUDA(cudaMemset(out.data, 0xFF, out.count));
    Tensor xt{x.data, c.x, c.tokens, c.cols, stride};
    Tensor ot{out.data, c.out, c.tokens, rows, out_stride};
    CHECK_CUDA(cudaDeviceSynchronize());
    SlicedMatmulLaunch launch = machine_.launch;
    launch.path = path;
    CHECK_CUDA(LaunchSlicedMatmul(launch, xt, weight.view, levels.data, c.tokens, ot));
    CHECK_CUDA(cudaStreamSynchronize(launch.stream));

    Device<double> reference(c.tokens * rows), sums(3);
    Device<unsigned long long> worst(1);
    CHECK_CUDA(cudaMemset(sums.data, 0, 3 * sizeof(double)));
    CHECK_CUDA(cudaMemset(worst.data, 0, 8));
    const dim3 grid((rows + 127) / 128, c.tokens);
    Reference<<<grid, 128>>>(weight.view, xt, levels.data, c.tokens, reference.data);
    Compare<<<grid, 128>>>(ot, reference.data, sums.data, worst.data);
    double s[3];
    unsigned long long bits;
    CHECK_CUDA(cudaMemcpy(s, sums.data, sizeof(s), cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemcpy(&bits, worst.data, 8, cudaMemcpyDeviceToHost));
    double largest;
    std::memcpy(&largest, &bits, 8);
    const double error = std::sqrt(s[0] / s[1]);
    const double scaled = largest / std::sqrt(s[1] / (c.tokens * rows));
    // fp32 out: what the sums lose; 16-bit outs: their rounding. kPrefill rounds weights to 16
    // bits.
    double bound = c.out == DType::kF32 ? 1e-4 : c.out == DType::kF16 ? 4e-4 : 3e-3;
    if (path == SlicedMatmulPath::kPrefill) {
      bound = std::max(bound, c.x == DType::kF16 ? 5e-4 : 4e-3);
    }
    const bool ok = s[2] == 0 && error < bound;
    worst_error_[static_cast<int>(c.out)] = std::max(worst_error_[static_cast<int>(c.out)], error);
    worst_scaled_[static_cast<int>(c.out)] =
        std::max(worst_scaled_[static_cast<int>(c.out)], scaled);
    ++cases_;
    if (!ok) {
      ++failures_;
      if (failures_ <= 20) {
        std::printf(
            "  WRONG %ldx%ld, %d segments, %d tokens, x %d out %d, %s: error %.2e, worst "
            "%.2e rms, %.0f not finite\n",
            rows, c.cols, weight.view.num_segments, c.tokens, static_cast<int>(c.x),
            static_cast<int>(c.out), c.mode, error, scaled, s[2]);
      }
    }
  }

  std::vector<uint8_t> Levels(size_t segments, int tokens, int mode) {
    std::vector<uint8_t> levels(segments * tokens);
    for (size_t s = 0; s < segments; ++s) {
      const int one = 1 + static_cast<int>(random_() % 4);
      for (int t = 0; t < tokens; ++t) {
        levels[s * tokens + t] = static_cast<uint8_t>(mode >= 1 && mode <= 4 ? mode
                                                      : mode == 5            ? one
                                                                             : 1 + random_() % 4);
      }
    }
    return levels;
  }

  void Sweep(SlicedMatmulPath path, const std::vector<int64_t>& segments, int64_t cols,
             const std::vector<int>& tokens, bool all) {
    static const char* const kModes[] = {
        "", "level 1", "level 2", "level 3", "level 4", "one level per segment", "mixed"};
    for (const int m : tokens) {
      for (int mode = 1; mode <= 6; ++mode) {
        if (!all && mode != 6 && mode != 1 + m % 5) continue;
        for (const DType x : {DType::kF16, DType::kBF16}) {
          for (const DType out : {DType::kF32, x}) {
            if (!all && (out == DType::kF32) == (x == DType::kBF16)) continue;
            Run(path, {segments, cols, m, x, out, Levels(segments.size(), m, mode), kModes[mode]});
          }
        }
      }
    }
  }

  // The same bits alone, in company, again, and in a graph of dependent launches.
  void Invariance(SlicedMatmulPath path, const std::vector<int64_t>& segments, int64_t cols,
                  int tokens, const std::vector<int>& counts) {
    const Weight weight = RandomWeight(segments, cols, ++seed_);
    const int64_t rows = weight.view.rows;
    Device<uint16_t> x(tokens * cols);
    FillNormal<<<512, 256>>>(x.data, x.count, ++seed_, false, 1);
    const std::vector<uint8_t> host_levels = Levels(segments.size(), tokens, 6);
    Device<uint8_t> levels(host_levels.size());
    CHECK_CUDA(
        cudaMemcpy(levels.data, host_levels.data(), host_levels.size(), cudaMemcpyHostToDevice));
    Device<float> together(tokens * rows), some(tokens * rows);
    const Tensor xt = Tensor::Of(x.data, DType::kF16, tokens, cols);
    const Tensor all = Tensor::Of(together.data, DType::kF32, tokens, rows);
    const Tensor part = Tensor::Of(some.data, DType::kF32, tokens, rows);
    CHECK_CUDA(cudaDeviceSynchronize());
    SlicedMatmulLaunch launch = machine_.launch;
    launch.path = path;
    CHECK_CUDA(LaunchSlicedMatmul(launch, xt, weight.view, levels.data, tokens, all));
    Device<unsigned long long> count(1);
    CHECK_CUDA(cudaMemset(count.data, 0, 8));
    for (const int m : counts) {
      for (int first = 0; first < tokens; first += m) {
        const int n = std::min(m, tokens - first);
        CHECK_CUDA(cudaMemsetAsync(some.data, 0xFF, n * rows * 4, launch.stream));
        CHECK_CUDA(LaunchSlicedMatmul(launch, Slice(xt, first, n), weight.view, levels.data + first,
                                      tokens, part.FirstRows(n)));
        CountDifferent<<<256, 256, 0, launch.stream>>>(
            reinterpret_cast<uint32_t*>(together.data) + first * rows,
            reinterpret_cast<uint32_t*>(some.data), n * rows, count.data);
      }
    }
    CHECK_CUDA(cudaStreamSynchronize(launch.stream));
    unsigned long long different;
    CHECK_CUDA(cudaMemcpy(&different, count.data, 8, cudaMemcpyDeviceToHost));
    ++cases_;
    if (different != 0) {
      ++failures_;
      std::printf("  NOT INVARIANT %ldx%ld, %d tokens: %llu words differ\n", rows, cols, tokens,
                  different);
    }
  }

  // A chain of dependent launches in a graph gives what separate launches give.
  void Chain(SlicedMatmulPath path, int tokens) {
    constexpr int kLength = 24;
    const int64_t n = 2048;
    std::vector<Weight> weights;
    for (int i = 0; i < 4; ++i) weights.push_back(RandomWeight({n}, n, ++seed_));
    const std::vector<uint8_t> host_levels = Levels(1, tokens, 6);
    Device<uint8_t> levels(tokens);
    CHECK_CUDA(cudaMemcpy(levels.data, host_levels.data(), tokens, cudaMemcpyHostToDevice));
    std::array<Device<uint16_t>, 3> x{Device<uint16_t>(tokens * n), Device<uint16_t>(tokens * n),
                                      Device<uint16_t>(tokens * n)};
    Device<uint16_t> expected(tokens * n);
    Device<unsigned long long> count(1);
    CHECK_CUDA(cudaMemset(count.data, 0, 8));
    SlicedMatmulLaunch launch = machine_.launch;
    launch.path = path;
    const auto run = [&](bool pdl, bool wait) {
      launch.pdl = pdl;
      for (int i = 0; i < kLength; ++i) {
        CHECK_CUDA(LaunchSlicedMatmul(launch, Tensor::Of(x[i % 3].data, DType::kF16, tokens, n),
                                      weights[i % 4].view, levels.data, tokens,
                                      Tensor::Of(x[(i + 1) % 3].data, DType::kF16, tokens, n)));
        if (wait) CHECK_CUDA(cudaStreamSynchronize(launch.stream));
      }
    };
    FillNormal<<<64, 256>>>(x[0].data, tokens * n, ++seed_, false, 1);
    CHECK_CUDA(cudaDeviceSynchronize());
    run(false, true);
    CHECK_CUDA(
        cudaMemcpy(expected.data, x[kLength % 3].data, tokens * n * 2, cudaMemcpyDeviceToDevice));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK_CUDA(cudaStreamBeginCapture(launch.stream, cudaStreamCaptureModeThreadLocal));
    run(true, false);
    CHECK_CUDA(cudaStreamEndCapture(launch.stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 20; ++i) {
      FillNormal<<<64, 256, 0, launch.stream>>>(x[0].data, tokens * n, seed_, false, 1);
      CHECK_CUDA(cudaGraphLaunch(exec, launch.stream));
      CountDifferent<<<64, 256, 0, launch.stream>>>(
          reinterpret_cast<uint32_t*>(expected.data),
          reinterpret_cast<uint32_t*>(x[kLength % 3].data), tokens * n / 2, count.data);
    }
    CHECK_CUDA(cudaStreamSynchronize(launch.stream));
    unsigned long long different;
    CHECK_CUDA(cudaMemcpy(&different, count.data, 8, cudaMemcpyDeviceToHost));
    ++cases_;
    if (different != 0) {
      ++failures_;
      std::printf("  CHAIN at %d tokens: %llu words differ\n", tokens, different);
    }
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    CHECK_CUDA(cudaGraphDestroy(graph));
  }

  bool Report(const char* name) {
    std::printf(
        "check %s: %d cases, %d wrong; worst relative error fp32 %.1e fp16 %.1e bf16 %.1e; "
        "worst element / rms %.1e %.1e %.1e\n",
        name, cases_, failures_, worst_error_[0], worst_error_[1], worst_error_[2],
        worst_scaled_[0], worst_scaled_[1], worst_scaled_[2]);
    const bool ok = failures_ == 0;
    cases_ = failures_ = 0;
    std::fill(worst_error_, worst_error_ + 3, 0.0);
    std::fill(worst_scaled_, worst_scaled_ + 3, 0.0);
    return ok;
  }

 private:
  Machine& machine_;
  uint64_t seed_ = 20260;
  std::mt19937 random_{7};
  int cases_ = 0, failures_ = 0;
  double worst_error_[3] = {}, worst_scaled_[3] = {};
};

bool RunChecks(Machine& machine, SlicedMatmulPath path, bool quick) {
  Checker checker(machine);
  const bool decode = path == SlicedMatmulPath::kDecode;
  const std::vector<int> tokens = {1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 64, 65, 130};
  checker.Sweep(path, {16}, 128, tokens, true);
  checker.Sweep(path, {48, 16}, 384, tokens, true);
  checker.Sweep(path, {96, 32, 48}, 640, tokens, true);
  checker.Sweep(path, {272}, 1152, tokens, true);
  checker.Invariance(path, {96, 32, 48}, 640, 200, {1, 2, 3, 5, 8, 16, 33, 97});
  checker.Invariance(path, {1024, 512, 512}, 4096, 130, {1, 7, 16, 31, 64});
  bool ok = checker.Report(decode ? "decode, small" : "prefill, small");
  if (quick) return ok;
  checker.Sweep(path, {4096, 1024, 1024}, 4096, {1, 8, 16, 33}, false);
  checker.Sweep(path, {4096}, 4096, {1, 4, 16, 64}, false);
  checker.Sweep(path, {14336, 14336}, 4096, {1, 16, 20}, false);
  checker.Sweep(path, {4096}, 14336, {1, 8, 16, 32, 64}, false);
  checker.Sweep(path, {1024}, 28672, {1, 16, 64}, false);
  if (!decode) checker.Sweep(path, {4096, 1024, 1024}, 4096, {256, 700}, false);
  checker.Invariance(path, {4096}, 14336, 70, {1, 16, 33});
  for (const int m : {1, 4, 16, 40}) checker.Chain(path, m);
  ok &= checker.Report(decode ? "decode, real shapes" : "prefill, real shapes");
  return ok;
}

// ---- Timing.

struct Linear {
  const char* name;
  std::vector<int64_t> segments;
  int64_t cols;
};

const std::array<Linear, 4> kLayer = {{{"qkv", {4096, 1024, 1024}, 4096},
                                       {"o", {4096}, 4096},
                                       {"gate_up", {14336, 14336}, 4096},
                                       {"down", {4096}, 14336}}};
constexpr int kLayers = 32;

int64_t RowsOf(const Linear& linear) {
  int64_t rows = 0;
  for (const int64_t r : linear.segments) rows += r;
  return rows;
}

// Median microseconds of a graph of what `body` enqueues.
double TimeGraph(cudaStream_t stream, int replays, const std::function<void()>& body) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  body();
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < replays + 3; ++i) {
    CHECK_CUDA(cudaEventRecord(begin, stream));
    CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(end, stream));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms * 1000);
  }
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  CHECK_CUDA(cudaGraphExecDestroy(exec));
  CHECK_CUDA(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

class Timer {
 public:
  Timer(Machine& machine, int max_tokens, bool pdl) : machine_(machine), max_tokens_(max_tokens) {
    machine_.launch.pdl = pdl;
    for (int set = 0; set < kSets; ++set) {
      for (size_t i = 0; i < kLayer.size(); ++i) {
        weights_.push_back(RandomWeight(kLayer[i].segments, kLayer[i].cols, 1000 + set * 8 + i));
      }
    }
    x_ = Device<uint16_t>(size_t{14336} * max_tokens);
    out_ = Device<uint16_t>(size_t{28672} * max_tokens);
    levels_ = Device<uint8_t>(size_t{kMaxSegments} * max_tokens);
    FillNormal<<<512, 256>>>(x_.data, x_.count, 5, false, 1);
    CHECK_CUDA(cudaDeviceSynchronize());
  }

  void SetLevels(int level) {  // 0: mixed
    std::vector<uint8_t> levels(levels_.count);
    std::mt19937 random(3);
    for (uint8_t& l : levels) l = static_cast<uint8_t>(level != 0 ? level : 1 + random() % 4);
    CHECK_CUDA(cudaMemcpy(levels_.data, levels.data(), levels.size(), cudaMemcpyHostToDevice));
  }

  void Launch(int linear, int set, int tokens) {
    const Linear& shape = kLayer[linear];
    CHECK_CUDA(
        LaunchSlicedMatmul(machine_.launch, Tensor::Of(x_.data, DType::kF16, tokens, shape.cols),
                           weights_[set * kLayer.size() + linear].view, levels_.data, max_tokens_,
                           Tensor::Of(out_.data, DType::kF16, tokens, RowsOf(shape))));
  }

  double Decoder(int tokens, SlicedMatmulPath path, int replays = 15) {
    machine_.launch.path = path;
    return TimeGraph(machine_.launch.stream, replays, [&] {
      for (int layer = 0; layer < kLayers; ++layer) {
        for (size_t i = 0; i < kLayer.size(); ++i)
          Launch(static_cast<int>(i), layer % kSets, tokens);
      }
    });
  }

  double One(int linear, int tokens, SlicedMatmulPath path) {
    machine_.launch.path = path;
    constexpr int kRepeats = 32;
    return TimeGraph(machine_.launch.stream, 9,
                     [&] {
                       for (int i = 0; i < kRepeats; ++i) Launch(linear, i % kSets, tokens);
                     }) /
           kRepeats;
  }

 private:
  static constexpr int kSets = 8;  // 8 layers: 480 MB even at level 1
  Machine& machine_;
  int max_tokens_;
  std::vector<Weight> weights_;
  Device<uint16_t> x_, out_;
  Device<uint8_t> levels_;
};

double DecoderBytes(double level) {
  double bytes = 0;
  for (const Linear& linear : kLayer) {
    const double weights = static_cast<double>(RowsOf(linear)) * linear.cols;
    bytes += kLayers * (weights * level / 4 + weights / kGroupSize * 4);
  }
  return bytes;
}

double DecoderFlops(int tokens) {
  double flops = 0;
  for (const Linear& linear : kLayer) {
    flops += 2.0 * kLayers * static_cast<double>(RowsOf(linear)) * linear.cols * tokens;
  }
  return flops;
}

// cuBLAS fp16 on the same linears; weights rotated through two layers, 870 MB.
std::vector<double> TimeCublas(cudaStream_t stream, const std::vector<int>& tokens) {
  constexpr int kSets = 2;
  cublasHandle_t handle;
  if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS) std::exit(1);
  cublasSetStream(handle, stream);
  Device<uint8_t> workspace(64 << 20);
  cublasSetWorkspace(handle, workspace.data, workspace.count);
  const int most = *std::max_element(tokens.begin(), tokens.end());
  std::vector<Device<uint16_t>> weights;
  for (int set = 0; set < kSets; ++set) {
    for (const Linear& linear : kLayer) {
      weights.emplace_back(static_cast<size_t>(RowsOf(linear)) * linear.cols);
      FillNormal<<<2048, 256>>>(weights.back().data, weights.back().count, 9 + set, false, 0.02f);
    }
  }
  Device<uint16_t> x(size_t{14336} * most), out(size_t{28672} * most);
  FillNormal<<<512, 256>>>(x.data, x.count, 5, false, 1);
  CHECK_CUDA(cudaDeviceSynchronize());
  std::vector<double> times;
  for (const int m : tokens) {
    times.push_back(TimeGraph(stream, m > 1000 ? 5 : 11, [&] {
      const float one = 1, zero = 0;
      for (int layer = 0; layer < kLayers; ++layer) {
        for (size_t i = 0; i < kLayer.size(); ++i) {
          const int rows = static_cast<int>(RowsOf(kLayer[i]));
          const int cols = static_cast<int>(kLayer[i].cols);
          const cublasStatus_t status = cublasGemmEx(
              handle, CUBLAS_OP_T, CUBLAS_OP_N, rows, m, cols, &one,
              weights[layer % kSets * kLayer.size() + i].data, CUDA_R_16F, cols, x.data, CUDA_R_16F,
              cols, &zero, out.data, CUDA_R_16F, rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
          if (status != CUBLAS_STATUS_SUCCESS) std::exit(1);
        }
      }
    }));
  }
  cublasDestroy(handle);
  return times;
}

void PrintLine(const char* path, int tokens, const char* level, double us, double bytes,
               double cublas) {
  std::printf("%-8s %5d %6s %9.0f %7.0f %5.1f%% %8.1f", path, tokens, level, us, bytes / us * 1e-3,
              100 * bytes / (us * 1e-6) / kPeakBytes, DecoderFlops(tokens) / us * 1e-6);
  if (cublas > 0) std::printf(" %7.3f", us / cublas);
  std::printf("\n");
}

void RunTimes(Machine& machine, SlicedMatmulPath path, bool quick, bool pdl) {
  const bool prefill = path == SlicedMatmulPath::kPrefill;
  std::vector<int> tokens = prefill ? std::vector<int>{64, 256, 512, 2048}
                            : quick ? std::vector<int>{1, 16, 32, 64}
                                    : std::vector<int>{1, 2, 4, 8, 16, 32, 64, 128};
  const std::vector<double> cublas =
      quick ? std::vector<double>(tokens.size(), 0.0) : TimeCublas(machine.launch.stream, tokens);
  Timer timer(machine, tokens.back(), pdl);
  const char* name = prefill ? "prefill" : "decode";
  std::printf("\ndecoder linears, 32 x (qkv o gate_up down), PDL %s\n", pdl ? "on" : "off");
  std::printf("path    tokens  level        us    GB/s  peak  TFLOP/s  /cublas\n");
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (!quick) PrintLine("cublas", tokens[i], "fp16", cublas[i], DecoderFlops(1), 0);
    for (const int level : {1, 2, 3, 4, 0}) {
      if (quick && level == 3) continue;
      timer.SetLevels(level);
      static const char* const kNames[] = {"mixed", "1", "2", "3", "4"};
      const double us = timer.Decoder(tokens[i], path, tokens[i] > 1000 ? 5 : 15);
      PrintLine(name, tokens[i], kNames[level], us, DecoderBytes(level == 0 ? 4 : level),
                cublas[i]);
    }
  }
  std::printf("\none linear, us\npath    tokens  level");
  for (const Linear& linear : kLayer) std::printf("%9s", linear.name);
  std::printf("\n");
  for (const int m : prefill ? std::vector<int>{256, 2048}
                     : quick ? std::vector<int>{1, 16, 64}
                             : std::vector<int>{1, 8, 16, 64}) {
    for (const int level : {1, 2, 4}) {
      timer.SetLevels(level);
      std::printf("%-8s %5d %6d", name, m, level);
      for (int i = 0; i < 4; ++i) std::printf("%9.2f", timer.One(i, m, path));
      std::printf("\n");
    }
  }
}

// A few launches of one linear, for a profiler.
void RunProfile(Machine& machine, int linear, int tokens, int level, bool prefill) {
  Timer timer(machine, tokens, false);
  timer.SetLevels(level);
  machine.launch.path = prefill ? SlicedMatmulPath::kPrefill : SlicedMatmulPath::kDecode;
  for (int i = 0; i < 6; ++i) timer.Launch(linear, i, tokens);
  CHECK_CUDA(cudaStreamSynchronize(machine.launch.stream));
}

int Main(int argc, char** argv) {
  std::vector<std::string> args(argv + 1, argv + argc);
  const auto has = [&](const char* name) {
    return std::find(args.begin(), args.end(), name) != args.end();
  };
  Machine machine;
  int driver = 0, runtime = 0;
  CHECK_CUDA(cudaDriverGetVersion(&driver));
  CHECK_CUDA(cudaRuntimeGetVersion(&runtime));
  std::printf("%s, %d SMs, L2 %d MB, driver %d, runtime %d\n", machine.properties.name,
              machine.launch.num_sms, machine.properties.l2CacheSize >> 20, driver, runtime);
  std::printf("clusters of 2, 4, 8 at a time: %d %d %d\n", machine.launch.clusters[1],
              machine.launch.clusters[2], machine.launch.clusters[3]);
  const bool quick = has("--quick"), pdl = !has("--no-pdl");
  if (argc >= 5 && args[0] == "profile") {
    RunProfile(machine, std::stoi(args[1]), std::stoi(args[2]), std::stoi(args[3]), has("prefill"));
    return 0;
  }
  bool ok = true;
  const SlicedMatmulPath path =
      has("prefill") ? SlicedMatmulPath::kPrefill : SlicedMatmulPath::kDecode;
  if (has("check")) ok &= RunChecks(machine, path, quick);
  if (has("time")) RunTimes(machine, path, quick, pdl);
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace mobi::cuda

int main(int argc, char** argv) { return mobi::cuda::Main(argc, argv); }
