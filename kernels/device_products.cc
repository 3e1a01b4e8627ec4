// Without CUDA there is no device to work on.
#include "kernels/device_products.h"

#ifndef MOBI_WITH_CUDA

#include <cstdlib>

namespace mobi {

class DeviceLane {};
struct DeviceSolver {};
DeviceProducts::DeviceProducts() = default;
DeviceProducts::~DeviceProducts() = default;

std::unique_ptr<DeviceProducts> DeviceProducts::Create(std::string& error) {
  error = "this program was built without CUDA";
  return nullptr;
}

// Nobody has an instance.
bool DeviceProducts::Multiply(const Operand&, const Operand&, float, float, float*, int64_t) {
  std::abort();
}
std::optional<int> DeviceProducts::InverseFactor(const Operand&, float*, int64_t) { std::abort(); }
std::optional<int> DeviceProducts::SolveRows(const Operand&, const Operand&, float*, int64_t) {
  std::abort();
}
bool DeviceProducts::Keep(const float*, int64_t) { std::abort(); }
void DeviceProducts::Forget(const float*) { std::abort(); }

}  // namespace mobi

#endif  // MOBI_WITH_CUDA
