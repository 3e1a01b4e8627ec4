// Checks and times the CUDA sliced matmul alone, without a model: every case first against float64
// on the device (sliced_bench_check.cu), then LLaMA-3-8B's decoder linears, with weights rotated
// through more memory than L2 holds, as medians of CUDA-graph replays, beside cuBLAS fp16 and a
// pure read of memory in the same run.
//   sliced-bench [check] [time] [prefill] [--quick] [--no-pdl]   prefill: that path, not decode
//   sliced-bench profile LINEAR TOKENS LEVEL [prefill]
#include <cublas_v2.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "peer_linears.h"
#include "sliced_bench_check.cuh"
#include "sliced_bench_device.cuh"

namespace mobi::cuda {
namespace {

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

constexpr float kWarmUpMs = 50;  // clocks rise

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
  float warm_ms = 0;
  while (std::ssize(times) < replays) {
    CHECK_CUDA(cudaEventRecord(begin, stream));
    CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(end, stream));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (warm_ms >= kWarmUpMs) times.push_back(ms * 1000);
    warm_ms += ms;
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
    levels_stride_ = level != 0 ? 0 : max_tokens_;
  }

  void Launch(int linear, int set, int tokens) {
    const Linear& shape = kLayer[linear];
    CHECK_CUDA(LaunchSlicedMatmul(
        machine_.launch, Tensor::Of(x_.data, DType::kF16, tokens, shape.cols),
        weights_[set * kLayer.size() + linear].view, levels_.data, levels_stride_,
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
  int levels_stride_ = 0;  // 0: of pinned tokens
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

// peak: bytes a second of a pure read.
void PrintLine(const char* path, int tokens, const char* level, double us, double bytes,
               double peak, double cublas) {
  std::printf("%-8s %5d %6s %9.0f %7.0f %5.1f%% %8.1f", path, tokens, level, us, bytes / us * 1e-3,
              100 * bytes / (us * 1e-6) / peak, DecoderFlops(tokens) / us * 1e-6);
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
  const absl::StatusOr<double> peak = CudaReadBytesPerSecond();
  if (!peak.ok()) {
    std::printf("FAILED %s\n", std::string(peak.status().message()).c_str());
    std::exit(1);
  }
  Timer timer(machine, tokens.back(), pdl);
  const char* name = prefill ? "prefill" : "decode";
  std::printf("\ndecoder linears, 32 x (qkv o gate_up down), PDL %s, pure read %.0f GB/s\n",
              pdl ? "on" : "off", *peak * 1e-9);
  std::printf("path    tokens  level        us    GB/s  peak  TFLOP/s  /cublas\n");
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (!quick) PrintLine("cublas", tokens[i], "fp16", cublas[i], DecoderFlops(1), *peak, 0);
    for (const int level : {1, 2, 3, 4, 0}) {
      if (quick && level == 3) continue;
      timer.SetLevels(level);
      static const char* const kNames[] = {"mixed", "1", "2", "3", "4"};
      const double us = timer.Decoder(tokens[i], path, tokens[i] > 1000 ? 5 : 15);
      PrintLine(name, tokens[i], kNames[level], us, DecoderBytes(level == 0 ? 4 : level), *peak,
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
