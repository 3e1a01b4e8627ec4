// Without CUDA there is no device to multiply on.
#include "kernels/device_products.h"

#ifndef MOBI_WITH_CUDA

#include <cstdlib>

namespace mobi {

struct DeviceProducts::Lane {};
DeviceProducts::DeviceProducts() = default;
DeviceProducts::~DeviceProducts() = default;

std::unique_ptr<DeviceProducts> DeviceProducts::Create(std::string& error) {
  error = "this program was built without CUDA";
  return nullptr;
}

void DeviceProducts::Multiply(const Operand&, const Operand&, float, float, float*, int64_t,
                              int64_t, int64_t, int64_t) {
  std::abort();  // nobody has an instance
}

}  // namespace mobi

#endif  // MOBI_WITH_CUDA
