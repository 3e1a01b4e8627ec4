// Without CUDA there is no device to work on.
#include "kernels/device_products.h"

#ifndef MOBI_WITH_CUDA

#include <cstdlib>

namespace mobi {

class DeviceLane {};
struct DeviceSolver {};
DeviceProducts::DeviceProducts(int64_t most_kept) : most_kept_(most_kept) {}
DeviceProducts::~DeviceProducts() = default;

std::unique_ptr<DeviceProducts> DeviceProducts::Create(int64_t, std::string& error) {
  error = "this program was built without CUDA";
  return nullptr;
}

// Nobody has an instance.
bool DeviceProducts::Multiply(const Operand&, const Operand&, float, float, float*, int64_t) {
  std::abort();
}
bool DeviceProducts::MultiplyParts(const Operand&, const std::vector<Operand>&, float, float,
                                   float*, int64_t) {
  std::abort();
}
bool DeviceProducts::AddGram(const Operand&, float, float*, int64_t) { std::abort(); }
bool DeviceProducts::PiecewiseProducts(const Operand&, const Operand&, int64_t, float*) {
  std::abort();
}
bool DeviceProducts::CausalAttention(const Operand&, int64_t, int64_t, float, float*, int64_t) {
  std::abort();
}
bool DeviceProducts::SwiGlu(const Operand&, float*, int64_t) { std::abort(); }
std::optional<int> DeviceProducts::InverseFactor(const Operand&, float*, int64_t) { std::abort(); }
std::optional<int> DeviceProducts::SolveRows(const Operand&, const Operand&, float*, int64_t) {
  std::abort();
}
bool DeviceProducts::Keep(const float*, int64_t) { std::abort(); }
bool DeviceProducts::Hold(const float*, int64_t) { std::abort(); }
void DeviceProducts::Forget(const float*) { std::abort(); }
void DeviceProducts::Fetch(float*, int64_t, int64_t, int64_t) { std::abort(); }
void DeviceProducts::Send(const float*, int64_t, int64_t, int64_t) { std::abort(); }
void DeviceProducts::Clear(const float*, int64_t) { std::abort(); }
bool DeviceProducts::Add(float*, const float*, int64_t) { std::abort(); }

}  // namespace mobi

#endif  // MOBI_WITH_CUDA
