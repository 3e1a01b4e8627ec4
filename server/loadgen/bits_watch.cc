#include "server/loadgen/bits_watch.h"

#include <utility>

#include "server/rpc_status.h"

namespace mobi {
namespace {

constexpr int32_t kIntervalNanos = 250'000'000;

}  // namespace

absl::StatusOr<std::unique_ptr<BitsWatch>> BitsWatch::Start(
    const std::shared_ptr<grpc::Channel>& admin, TimePoint start, const Clock& clock) {
  std::unique_ptr<BitsWatch> watch(new BitsWatch(admin, start, clock));
  v1::PrecisionStatus first;
  if (!watch->reader_->Read(&first)) return FromGrpcStatus(watch->reader_->Finish());
  watch->thread_ = std::thread([follower = watch.get()] { follower->Follow(); });
  return watch;
}

BitsWatch::BitsWatch(const std::shared_ptr<grpc::Channel>& admin, TimePoint start,
                     const Clock& clock)
    : start_(start), clock_(clock), stub_(v1::Precision::NewStub(admin)) {
  v1::WatchStatusRequest request;
  request.mutable_interval()->set_nanos(kIntervalNanos);
  reader_ = stub_->WatchStatus(&context_, request);
}

BitsWatch::~BitsWatch() { Stop(); }

std::vector<BitsSample> BitsWatch::Stop() {
  if (thread_.joinable()) {
    context_.TryCancel();
    thread_.join();
  }
  return samples_;
}

void BitsWatch::Follow() {
  v1::PrecisionStatus status;
  while (reader_->Read(&status)) {
    samples_.push_back(
        {clock_.Now() - start_, status.loaded_bits(), status.load().running_requests() > 0});
  }
  reader_->Finish();
}

}  // namespace mobi
