// What of a decoder block is not a product alone, made on the device by DeviceProducts.
#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/cuda/device_products_lane.h"
#include "kernels/device_products.h"

namespace mobi {

namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
// Query rows scored at once: keys behind the last of them are never touched.
constexpr int64_t kQueryBlock = 256;
// Multiplications below which a call costs more than the host's attention.
constexpr int64_t kLeastWork = int64_t{1} << 24;

// The sum, or the largest, of every thread's value, in the same order every time.
template <typename Combine>
__device__ float Reduce(float value, float* shared, Combine combine) {
  for (int other = kWarp / 2; other > 0; other /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, other));
  }
  __syncthreads();  // what was read of the last reduction
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, shared[warp]);
  return value;
}

// Row blockIdx.x of head blockIdx.y, in place: softmax of its first + blockIdx.x + 1 values, then
// zeros up to `cols`.
__global__ void CausalSoftmax(float* scores, int64_t stride, int64_t head_stride, int64_t first,
                              int64_t cols) {
  __shared__ float shared[kWarps];
  float* row = scores + blockIdx.y * head_stride + blockIdx.x * stride;
  const int64_t seen = first + blockIdx.x + 1;
  float max = row[0];
  for (int64_t j = threadIdx.x; j < seen; j += kThreads) max = fmaxf(max, row[j]);
  max = Reduce(max, shared, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int64_t j = threadIdx.x; j < seen; j += kThreads) {
    row[j] = expf(row[j] - max);
    sum += row[j];
  }
  const float scale = 1.0f / Reduce(sum, shared, [](float a, float b) { return a + b; });
  for (int64_t j = threadIdx.x; j < cols; j += kThreads) row[j] = j < seen ? row[j] * scale : 0.0f;
}

// out [rows, cols] = silu(gate) * up of gate_up [rows, 2 cols].
__global__ void SwiGluRows(const float* gate_up, int64_t stride, int64_t rows, int64_t cols,
                           float* out, int64_t out_stride) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * cols; i += step) {
    const float* row = gate_up + i / cols * stride + i % cols;
    out[i / cols * out_stride + i % cols] = row[0] / (1.0f + expf(-row[0])) * row[cols];
  }
}

}  // namespace

// Heads that share keys and values go side by side.
bool DeviceProducts::CausalAttention(const Operand& qkv, int64_t heads, int64_t kv_heads,
                                     float scale, float* out, int64_t out_stride) {
  const int64_t tokens = qkv.rows, dim = qkv.cols / (heads + 2 * kv_heads), width = heads * dim;
  const int64_t group = heads / kv_heads;
  if (tokens * tokens * width < kLeastWork) return false;
  std::unique_ptr<DeviceLane> lane = Take();
  const Placed at = Place(*lane, 0, qkv);
  const int64_t head_stride = std::min(kQueryBlock, tokens) * tokens;
  float* scores = lane->Room(1, group * head_stride);
  float* device_out = lane->Room(2, tokens * width);
  const auto ld = static_cast<int>(at.stride), ld_scores = static_cast<int>(tokens);
  const int count_dim = static_cast<int>(dim), count_heads = static_cast<int>(group);
  const float zero = 0, one = 1;
  for (int64_t kv = 0; kv < kv_heads; ++kv) {
    const float* q = at.data + kv * group * dim;
    const float* k = at.data + (heads + kv) * dim;
    const float* v = at.data + (heads + kv_heads + kv) * dim;
    for (int64_t first = 0; first < tokens; first += kQueryBlock) {
      const int64_t count = std::min(kQueryBlock, tokens - first), seen = first + count;
      CheckDevice(cublasSgemmStridedBatched(
          lane->cublas(), CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(seen), static_cast<int>(count),
          count_dim, &scale, k, ld, 0, q + first * at.stride, ld, dim, &zero, scores, ld_scores,
          head_stride, count_heads));
      CausalSoftmax<<<dim3(static_cast<unsigned>(count), static_cast<unsigned>(group)), kThreads, 0,
                      lane->stream()>>>(scores, tokens, head_stride, first, seen);
      CheckDevice(cudaGetLastError());
      CheckDevice(cublasSgemmStridedBatched(lane->cublas(), CUBLAS_OP_N, CUBLAS_OP_N, count_dim,
                                            static_cast<int>(count), static_cast<int>(seen), &one,
                                            v, ld, 0, scores, ld_scores, head_stride, &zero,
                                            device_out + first * width + kv * group * dim,
                                            static_cast<int>(width), dim, count_heads));
    }
  }
  lane->CopyDown(out, out_stride, device_out, width, tokens, width);
  GiveBack(std::move(lane));
  return true;
}

bool DeviceProducts::SwiGlu(const Operand& gate_up, float* out, int64_t out_stride) {
  const int64_t rows = gate_up.rows, cols = gate_up.cols / 2;
  const auto at_out = FindHeld({out, rows, cols, out_stride, false});
  if (!at_out && !FindHeld(gate_up)) return false;
  std::unique_ptr<DeviceLane> lane = Take();
  const Placed at = Place(*lane, 0, gate_up);
  const Placed to = at_out ? *at_out : Placed{lane->Room(2, rows * cols), cols, false};
  const int64_t blocks = std::min<int64_t>(1024, (rows * cols + kThreads - 1) / kThreads);
  SwiGluRows<<<static_cast<unsigned>(blocks), kThreads, 0, lane->stream()>>>(
      at.data, at.stride, rows, cols, to.data, to.stride);
  CheckDevice(cudaGetLastError());
  if (at_out) {
    lane->Wait();
  } else {
    lane->CopyDown(out, out_stride, to.data, cols, rows, cols);
  }
  GiveBack(std::move(lane));
  return true;
}

}  // namespace mobi
