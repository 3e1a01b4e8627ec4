// Products that DeviceProducts reduces on the device by pieces of their rows.
#include <algorithm>
#include <utility>

#include "kernels/cuda/device_products_lane.h"
#include "kernels/device_products.h"

namespace mobi {

namespace {

// Multiplications below which a call costs more than the host's products.
constexpr int64_t kLeastWork = int64_t{1} << 24;
// Values of products that are made at once: they are read again while the cache still holds them.
constexpr int64_t kProductsAtOnce = int64_t{1} << 22;
constexpr int kWarp = 32, kWarpsPerBlock = 8;

struct PieceProblem {
  const float* products;  // [groups, rows, pieces * width]: of pieces first_group on with b
  const float* a;         // [rows, pieces * width]
  int64_t a_stride;
  int64_t rows, pieces, first_group, groups;
  int width;
  float* out;  // [rows, pieces, 2, pieces]
};

// A warp sums a piece of a row: each lane every 32nd value, then lanes by halves, always in the
// same order.
__global__ void SumPieces(const PieceProblem p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
  if (warp >= p.groups * p.rows * p.pieces) return;
  const int64_t h = warp % p.pieces, i = warp / p.pieces % p.rows;
  const int64_t g = p.first_group + warp / p.pieces / p.rows;
  const float* product = p.products + warp * p.width;
  const float* a = p.a + i * p.a_stride + h * p.width;
  float sum = 0, dot = 0;
  for (int j = lane; j < p.width; j += kWarp) {
    sum += product[j];
    dot += product[j] * a[j];
  }
  for (int other = kWarp / 2; other > 0; other /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, other);
    dot += __shfl_xor_sync(0xffffffff, dot, other);
  }
  if (lane != 0) return;
  float* out = p.out + (i * p.pieces + g) * 2 * p.pieces + h;
  out[0] = sum;
  if (h <= g) out[p.pieces] = dot;
}

}  // namespace

bool DeviceProducts::PiecewiseProducts(const Operand& a, const Operand& b, int64_t width,
                                       float* out) {
  const int64_t rows = a.rows, k = a.cols, pieces = k / width, results = 2 * pieces * pieces;
  if (rows * k * k < kLeastWork) return false;
  // The host sends a large matrix that is not kept by the rows of a piece.
  if (k * k > DeviceLane::kRoomValues && !Find(b)) return false;
  std::unique_ptr<DeviceLane> lane = Take();
  const Placed at_a = Place(*lane, 0, a), at_b = Place(*lane, 1, b);
  const int64_t at_once = std::clamp<int64_t>(kProductsAtOnce / (rows * k), 1, pieces);
  float* products = lane->Room(2, at_once * rows * k);
  float* device_out = lane->Room(3, rows * results);
  const float one = 1, zero = 0;
  for (int64_t first = 0; first < pieces; first += at_once) {
    const int64_t groups = std::min(at_once, pieces - first);
    CheckDevice(cublasSgemmStridedBatched(
        lane->cublas(), CUBLAS_OP_N, CUBLAS_OP_N, static_cast<int>(k), static_cast<int>(rows),
        static_cast<int>(width), &one, at_b.data + first * width * at_b.stride,
        static_cast<int>(at_b.stride), width * at_b.stride, at_a.data + first * width,
        static_cast<int>(at_a.stride), width, &zero, products, static_cast<int>(k), rows * k,
        static_cast<int>(groups)));
    const int64_t warps = groups * rows * pieces;
    const auto blocks = static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock);
    SumPieces<<<blocks, kWarp * kWarpsPerBlock, 0, lane->stream()>>>(
        {products, at_a.data, at_a.stride, rows, pieces, first, groups, static_cast<int>(width),
         device_out});
    CheckDevice(cudaGetLastError());
  }
  lane->CopyDown(out, results, device_out, results, rows, results);
  GiveBack(std::move(lane));
  return true;
}

}  // namespace mobi
