// Matrix products and factorizations of host memory on a CUDA device: operands go up, cuBLAS
// multiplies in fp32 or cuSOLVER factorizes in double, the result comes back. What many products
// read can be kept there, what they write can live there. Products from several threads run side by
// side, each on a stream of its own; factorizations one after the other. All is done when a call
// returns, in a fixed order: the same calls, with the same room, give the same bits. Beside the
// backend: for offline work whose matrices stay on the host (calibrator/linear_algebra.h).
#ifndef MOBI_KERNELS_DEVICE_PRODUCTS_H_
#define MOBI_KERNELS_DEVICE_PRODUCTS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace mobi {

class DeviceLane;
struct DeviceSolver;

class DeviceProducts {
 public:
  // A row-major operand in host memory, [rows, cols] as it is stored.
  struct Operand {
    const float* data;
    int64_t rows, cols, stride;
    bool transposed;
  };

  // nullptr and a reason when there is no usable device. At most `most_kept` bytes are kept and
  // held there.
  static std::unique_ptr<DeviceProducts> Create(int64_t most_kept, std::string& error);
  ~DeviceProducts();

  // out [m, n] = alpha op(a) op(b) + beta out. False, with nothing done, where the host is the
  // better place: too little work for the bytes to move. Never where an operand or the result is
  // held. A device error aborts: nothing can go on without it.
  bool Multiply(const Operand& a, const Operand& b, float alpha, float beta, float* out,
                int64_t out_stride);

  // The same for as many equal parts of the rows of `a` and `out` as there are matrices in `b`,
  // each with its own. False, with nothing done, unless out is held and all of `b` kept or held.
  bool MultiplyParts(const Operand& a, const std::vector<Operand>& b, float alpha, float beta,
                     float* out, int64_t out_stride);

  // The lower triangle of out [d, d] += alpha x^T x, x [n, d]. False, with nothing done, unless out
  // is held.
  bool AddGram(const Operand& x, float alpha, float* out, int64_t out_stride);

  // out [m, p, 2, p] of a [m, k], b [k, k] and their p pieces of `width` columns and rows: out[i,
  // g, 0, h] = the sum of the product of row i's piece g with block (g, h) of b, out[i, g, 1, h] =
  // that product times row i's piece h, for h <= g. False, with nothing done, where the host is the
  // better place.
  bool PiecewiseProducts(const Operand& a, const Operand& b, int64_t width, float* out);

  // out [n, heads dim] = causal attention of qkv [n, (heads + 2 kv_heads) dim], every row behind
  // those before it; out is not held. False, with nothing done, where the host is the better place.
  bool CausalAttention(const Operand& qkv, int64_t heads, int64_t kv_heads, float scale, float* out,
                       int64_t out_stride);
  // out [n, cols] = silu(gate) up of gate_up [n, 2 cols]. False, with nothing done, where neither
  // is held.
  bool SwiGlu(const Operand& gate_up, float* out, int64_t out_stride);

  // factor [n, n] = the upper triangular U with h^-1 = U^T U, h [n, n] symmetric positive definite;
  // x [m, n] with x h = b, b [m, n]. In double; `stride` is that of the result's rows. 0: done; i >
  // 0: the leading minor of order i (of h turned end for end, for the factor) is not positive, the
  // result is not written. Null, with nothing done, where the host is the better place: h is small,
  // or there is no room for it.
  std::optional<int> InverseFactor(const Operand& h, float* factor, int64_t stride);
  std::optional<int> SolveRows(const Operand& h, const Operand& b, float* x, int64_t stride);

  // Until Forget, products that read any part of [data, data + count) read a copy on the device.
  // The host's values must stay what they are meanwhile. False when there is no room for it.
  bool Keep(const float* data, int64_t count);
  // Until Forget, [data, data + count) lives on the device, not cleared: products read and write
  // any part of it there, and the host's memory is where Fetch leaves parts and Send takes them
  // from. One thread at a time for what one of them writes. False when there is no room for it.
  bool Hold(const float* data, int64_t count);
  void Forget(const float* data);
  // Copy a part of what is held to the host's memory, or from there, or set it to 0. Nothing is
  // done where it is not held.
  void Fetch(float* data, int64_t rows, int64_t cols, int64_t stride);
  void Send(const float* data, int64_t rows, int64_t cols, int64_t stride);
  void Clear(const float* data, int64_t count);
  // y += x. False, with nothing done, where either is not held.
  bool Add(float* y, const float* x, int64_t count);

 private:
  // An operand on the device.
  struct Placed {
    float* data;
    int64_t stride;
    bool held;
  };
  struct Kept {
    float* device;
    int64_t count;
    bool held;
  };
  explicit DeviceProducts(int64_t most_kept);
  // Device memory for what is kept; null where there is no room. What is not of the largest goes
  // back to free_ and is taken from there: giving memory back to a device makes every stream wait.
  // Free and FreeUnused: with mutex_ locked.
  float* Allocate(int64_t count);
  void Free(float* device, int64_t count);
  void FreeUnused();
  std::unique_ptr<DeviceLane> Take();
  void GiveBack(std::unique_ptr<DeviceLane> lane);
  std::optional<Placed> Find(const Operand& x);
  std::optional<Placed> FindHeld(const Operand& x);
  // Where it is on the device, or in the lane's room `which` once it went up.
  Placed Place(DeviceLane& lane, int which, const Operand& x);

  const int64_t most_kept_;
  std::mutex mutex_;
  int64_t kept_bytes_ = 0, free_bytes_ = 0;  // of at most most_kept_ together
  std::multimap<int64_t, float*> free_;      // by their count
  std::vector<std::unique_ptr<DeviceLane>> idle_;
  std::map<const float*, Kept> kept_;  // by where it begins on the host
  std::mutex solver_mutex_;
  std::unique_ptr<DeviceSolver> solver_;  // from the first factorization on
};

}  // namespace mobi

#endif  // MOBI_KERNELS_DEVICE_PRODUCTS_H_
