// Matrix products of host memory on a CUDA device: operands go up, cuBLAS multiplies in fp32, the
// result comes back. Calls from several threads run side by side, each on a stream of its own.
// Beside the backend: for offline work whose matrices stay on the host
// (calibrator/linear_algebra.h); worth it where a product does much work for every byte it moves.
#ifndef MOBI_KERNELS_DEVICE_PRODUCTS_H_
#define MOBI_KERNELS_DEVICE_PRODUCTS_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace mobi {

class DeviceProducts {
 public:
  // A row-major operand in host memory, [rows, cols] as it is stored.
  struct Operand {
    const float* data;
    int64_t rows, cols, stride;
    bool transposed;
  };

  // nullptr and a reason when there is no usable device.
  static std::unique_ptr<DeviceProducts> Create(std::string& error);
  ~DeviceProducts();

  // out [m, n] = alpha op(a) op(b) + beta out. A device error aborts: nothing can go on without it.
  void Multiply(const Operand& a, const Operand& b, float alpha, float beta, float* out, int64_t m,
                int64_t n, int64_t k, int64_t out_stride);

  // True when a product of these sizes is better made on the device.
  static bool IsWorthIt(int64_t m, int64_t n, int64_t k) { return m * n * k >= int64_t{1} << 23; }

 private:
  struct Lane;  // a stream, a cuBLAS handle and device memory
  DeviceProducts();
  std::unique_ptr<Lane> Take();
  void GiveBack(std::unique_ptr<Lane> lane);

  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> idle_;
};

}  // namespace mobi

#endif  // MOBI_KERNELS_DEVICE_PRODUCTS_H_
