#include "machine_peak.h"

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/cpu/thread_pool.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/bench/machine_peak.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace mobi {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = HWY_CAPPED(float, 16);

constexpr int kChains = 8;  // enough to cover a latency of four at two a cycle

float FmaChains(int64_t steps) {
  const FloatTag d;
  const auto a = hn::Set(d, 0.999f), b = hn::Set(d, 0.001f);
  auto x0 = hn::Set(d, 0.0f), x1 = hn::Set(d, 1.0f), x2 = hn::Set(d, 2.0f), x3 = hn::Set(d, 3.0f);
  auto x4 = hn::Set(d, 4.0f), x5 = hn::Set(d, 5.0f), x6 = hn::Set(d, 6.0f), x7 = hn::Set(d, 7.0f);
  for (int64_t i = 0; i < steps; ++i) {
    x0 = hn::MulAdd(x0, a, b);
    x1 = hn::MulAdd(x1, a, b);
    x2 = hn::MulAdd(x2, a, b);
    x3 = hn::MulAdd(x3, a, b);
    x4 = hn::MulAdd(x4, a, b);
    x5 = hn::MulAdd(x5, a, b);
    x6 = hn::MulAdd(x6, a, b);
    x7 = hn::MulAdd(x7, a, b);
  }
  const auto sum =
      hn::Add(hn::Add(hn::Add(x0, x1), hn::Add(x2, x3)), hn::Add(hn::Add(x4, x5), hn::Add(x6, x7)));
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

double FlopOfStep() { return 2.0 * kChains * static_cast<double>(hn::Lanes(FloatTag())); }

float ReadAll(const float* HWY_RESTRICT data, int64_t count) {
  const FloatTag d;
  const auto step = static_cast<int64_t>(hn::Lanes(d));
  auto v0 = hn::Zero(d), v1 = hn::Zero(d), v2 = hn::Zero(d), v3 = hn::Zero(d);
  for (int64_t i = 0; i + 4 * step <= count; i += 4 * step) {
    v0 = hn::Or(v0, hn::LoadU(d, data + i));
    v1 = hn::Or(v1, hn::LoadU(d, data + i + step));
    v2 = hn::Or(v2, hn::LoadU(d, data + i + 2 * step));
    v3 = hn::Or(v3, hn::LoadU(d, data + i + 3 * step));
  }
  return hn::GetLane(hn::Or(hn::Or(v0, v1), hn::Or(v2, v3)));
}

}  // namespace HWY_NAMESPACE
}  // namespace mobi
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mobi {
namespace {

HWY_EXPORT(FmaChains);
HWY_EXPORT(FlopOfStep);
HWY_EXPORT(ReadAll);

constexpr int64_t kFmaSteps = 20000;
constexpr int64_t kReadFloats = int64_t{64} << 20;

}  // namespace

struct MachinePeak::State {
  explicit State(int num_threads) : pool(num_threads), data(kReadFloats, 1.0f) {}

  cpu::ThreadPool pool;
  std::vector<float> data;
  std::atomic<float> sink{0};  // keeps the work from being optimised away
};

MachinePeak::MachinePeak(int num_threads) : state_(new State(num_threads)) {}
MachinePeak::~MachinePeak() = default;

double MachinePeak::fma_flop() const {
  return HWY_DYNAMIC_DISPATCH(FlopOfStep)() * kFmaSteps * state_->pool.num_threads();
}
double MachinePeak::read_bytes() const { return 4.0 * kReadFloats; }

void MachinePeak::RunFma() {
  state_->pool.Run(state_->pool.num_threads(),
                   [&](int, int) { state_->sink = HWY_DYNAMIC_DISPATCH(FmaChains)(kFmaSteps); });
}

void MachinePeak::RunRead() {
  state_->pool.RunRanges(kReadFloats, 1 << 18, [&](int64_t begin, int64_t end, int) {
    state_->sink = HWY_DYNAMIC_DISPATCH(ReadAll)(state_->data.data() + begin, end - begin);
  });
}

}  // namespace mobi
#endif  // HWY_ONCE
