#include <cmath>
#include <cstring>
#include <random>

#include "sliced_bench_check.cuh"

namespace mobi::cuda {
namespace {

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
    const bool same = std::count(c.levels.begin(), c.levels.end(), c.levels[0]) ==
                      static_cast<std::ptrdiff_t>(c.levels.size());
    CHECK_CUDA(LaunchSlicedMatmul(launch, xt, weight.view, levels.data, same ? 0 : c.tokens, ot));
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

  // The same bits alone, in company, and in the smallest workspace.
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
    // In rounds of the fewest tokens.
    const size_t column_bytes =
        path == SlicedMatmulPath::kDecode ? 272 : 2304 * weight.view.num_segments;
    launch.workspace_bytes = column_bytes * cols;
    CHECK_CUDA(cudaMemsetAsync(some.data, 0xFF, tokens * rows * 4, launch.stream));
    CHECK_CUDA(LaunchSlicedMatmul(launch, xt, weight.view, levels.data, tokens, part));
    CountDifferent<<<256, 256, 0, launch.stream>>>(reinterpret_cast<uint32_t*>(together.data),
                                                   reinterpret_cast<uint32_t*>(some.data),
                                                   tokens * rows, count.data);
    const unsigned long long different = EndCase(launch, count);
    if (different != 0) {
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
    const unsigned long long different = EndCase(launch, count);
    if (different != 0) {
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
  // Waits for a case that counts words that differ; any makes it a failure.
  unsigned long long EndCase(const SlicedMatmulLaunch& launch,
                             const Device<unsigned long long>& count) {
    CHECK_CUDA(cudaStreamSynchronize(launch.stream));
    unsigned long long different;
    CHECK_CUDA(cudaMemcpy(&different, count.data, 8, cudaMemcpyDeviceToHost));
    ++cases_;
    if (different != 0) ++failures_;
    return different;
  }

  Machine& machine_;
  uint64_t seed_ = 20260;
  std::mt19937 random_{7};
  int cases_ = 0, failures_ = 0;
  double worst_error_[3] = {}, worst_scaled_[3] = {};
};

}  // namespace

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

}  // namespace mobi::cuda
