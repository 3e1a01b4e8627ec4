// A backend whose memory for slices that come back can be refused for a while: another process has
// taken it.
#ifndef MOBI_TESTS_ENGINE_REFUSING_BACKEND_H_
#define MOBI_TESTS_ENGINE_REFUSING_BACKEND_H_

#include <atomic>
#include <limits>
#include <memory>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "tests/engine/forwarding_backend.h"

namespace mobi {

class RefusingBackend final : public ForwardingBackend {
 public:
  explicit RefusingBackend(std::unique_ptr<Backend> inner) : ForwardingBackend(std::move(inner)) {}

  // After so many more pieces, until it is called again.
  void RefuseAfter(int pieces) { left_ = pieces; }
  void RefuseNothing() { left_ = std::numeric_limits<int>::max(); }
  int refused() const { return refused_; }

  absl::Status Commit(void* at, size_t bytes, std::string_view what) override {
    if (what == "slices to restore" && left_-- <= 0) {
      left_ = 0;
      ++refused_;
      return absl::ResourceExhaustedError("slices to restore: somebody else has the memory");
    }
    return ForwardingBackend::Commit(at, bytes, what);
  }

 private:
  std::atomic<int> left_{std::numeric_limits<int>::max()};
  std::atomic<int> refused_{0};
};

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_REFUSING_BACKEND_H_
