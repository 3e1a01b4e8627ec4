#include "server/loadgen/load_test.h"

#include <algorithm>
#include <atomic>
#include <random>
#include <thread>
#include <utility>

#include "grpcpp/client_context.h"
#include "grpcpp/support/client_callback.h"
#include "server/client.h"
#include "server/rpc_status.h"

namespace mobi {

struct LoadTest::Connection {
  explicit Connection(std::shared_ptr<grpc::Channel> its_channel)
      : channel(std::move(its_channel)), stub(v1::Inference::NewStub(channel)) {}

  const std::shared_ptr<grpc::Channel> channel;
  const std::unique_ptr<v1::Inference::Stub> stub;
  std::atomic<int> streams{0};
};

// One request. gRPC calls it from one thread at a time; OnDone is the last call.
class LoadTest::Call final : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  Call(LoadTest& test, Connection& connection, TimePoint intended, Outcome& outcome)
      : test_(test), connection_(connection), intended_(intended), outcome_(outcome) {
    ++connection_.streams;
  }

  void Start(v1::GenerateRequest request) {
    request_ = std::move(request);
    SetDeadline(test_.options_.deadline, context_);
    outcome_.lateness = std::max(Elapsed(), Duration::zero());
    connection_.stub->async()->Generate(&context_, &request_, this);
    StartRead(&message_);
    StartCall();
  }

  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    int tokens = 0;
    for (const v1::Chunk& chunk : message_.chunks()) {
      tokens += chunk.token_ids_size();
      outcome_.token_ids.insert(outcome_.token_ids.end(), chunk.token_ids().begin(),
                                chunk.token_ids().end());
    }
    if (tokens > 0) {
      const Duration now = Elapsed();
      if (outcome_.tokens == 0) {
        outcome_.ttft = now;
      } else {
        outcome_.gaps_ms.push_back(static_cast<float>(ToMillis(now - last_)));
      }
      outcome_.tokens += tokens;
      last_ = now;
    }
    if (message_.has_summary()) {
      const v1::Summary& summary = message_.summary();
      outcome_.prompt_tokens = summary.usage().prompt_tokens();
      outcome_.cached_tokens = summary.usage().cached_tokens();
      outcome_.effective_bits = summary.mean_effective_bits();
      outcome_.queue_ms = summary.timings().queue_ms();
    }
    StartRead(&message_);
  }

  void OnDone(const grpc::Status& status) override {
    outcome_.end = Elapsed();
    outcome_.status = FromGrpcStatus(status);
    --connection_.streams;
    test_.Finished(this);
  }

 private:
  Duration Elapsed() const { return test_.clock_.Now() - intended_; }

  LoadTest& test_;
  Connection& connection_;
  const TimePoint intended_;
  Outcome& outcome_;
  grpc::ClientContext context_;
  v1::GenerateRequest request_;
  v1::GenerateResponse message_;
  Duration last_{};
};

LoadTest::LoadTest(LoadTestOptions options, std::function<std::shared_ptr<grpc::Channel>()> connect,
                   const Prompts& prompts, const Clock& clock)
    : options_(std::move(options)), connect_(std::move(connect)), prompts_(prompts), clock_(clock) {
  for (int i = 0; i < options_.connections; ++i) OpenConnection();
  // A failure shows in the requests' statuses.
  for (const auto& connection : connections_) AwaitConnection(*connection->channel);
}

LoadTest::~LoadTest() = default;

std::vector<Outcome> LoadTest::Run(absl::Span<const Arrival> arrivals, TimePoint start) {
  std::vector<Outcome> outcomes(arrivals.size());
  for (size_t i = 0; i < arrivals.size(); ++i) {
    outcomes[i].arrival = arrivals[i];
    v1::GenerateRequest request = MakeRequest(i, outcomes[i]);
    const TimePoint intended = start + arrivals[i].at;
    std::this_thread::sleep_until(intended);
    auto owner = std::make_shared<Call>(*this, PickConnection(), intended, outcomes[i]);
    Call* const call = owner.get();
    {
      MutexLock lock(mutex_);
      ++calls_;
      running_.emplace(call, std::move(owner));
    }
    call->Start(std::move(request));
  }
  WaitForAll(clock_.Now() + options_.grace);
  return outcomes;
}

v1::GenerateRequest LoadTest::MakeRequest(size_t index, Outcome& outcome) const {
  std::seed_seq seed{options_.seed, uint64_t{index}};
  std::mt19937_64 random(seed);
  double total = 0;
  for (const ClassShare& share : options_.classes) total += share.share;
  double drawn = static_cast<double>(random() >> 11) * 0x1p-53 * total;
  outcome.priority_class = options_.classes.back().name;
  for (const ClassShare& share : options_.classes) {
    drawn -= share.share;
    if (drawn >= 0) continue;
    outcome.priority_class = share.name;
    break;
  }
  v1::GenerateRequest request;
  const auto prompt = prompts_.Make(index, outcome.arrival.prompt_tokens);
  request.mutable_token_ids()->mutable_ids()->Assign(prompt.begin(), prompt.end());
  request.set_max_new_tokens(outcome.arrival.new_tokens);
  request.set_ignore_eos(options_.ignore_eos);
  request.set_priority_class(outcome.priority_class);
  request.mutable_sampling()->set_temperature(options_.temperature);
  request.mutable_sampling()->set_seed(random());
  *request.mutable_precision() = options_.precision;
  return request;
}

LoadTest::Connection& LoadTest::OpenConnection() {
  connections_.push_back(std::make_unique<Connection>(connect_()));
  connections_.back()->channel->GetState(/*try_to_connect=*/true);
  return *connections_.back();
}

// A request that waits for its connection would measure that, so connections are opened ahead of
// need, and one that is not ready is taken only when the ready ones are full.
LoadTest::Connection& LoadTest::PickConnection() {
  Connection* best = nullptr;
  std::pair<bool, int> best_rank;
  int room = 0;
  bool all_ready = true;
  for (const auto& connection : connections_) {
    const bool ready = connection->channel->GetState(false) == GRPC_CHANNEL_READY;
    const int streams = connection->streams;
    const int left = std::max(options_.max_streams_per_connection - streams, 0);
    all_ready = all_ready && ready;
    if (ready) room += left;
    const std::pair<bool, int> rank(!ready, streams);
    if (left == 0 || (best != nullptr && best_rank <= rank)) continue;
    best = connection.get();
    best_rank = rank;
  }
  if (best == nullptr) return OpenConnection();
  if (all_ready && room <= options_.max_streams_per_connection / 2) OpenConnection();
  return *best;
}

void LoadTest::Finished(Call* call) {
  std::shared_ptr<Call> owner;
  {
    MutexLock lock(mutex_);
    const auto found = running_.find(call);
    owner = std::move(found->second);
    running_.erase(found);
  }
  owner.reset();  // not under the lock
  MutexLock lock(mutex_);
  if (--calls_ == 0) changed_.NotifyAll();
}

void LoadTest::WaitForAll(TimePoint patience) {
  const auto wait_until = [this](TimePoint until) {
    MutexLock lock(mutex_);
    while (calls_ > 0) {
      const Duration left = until - clock_.Now();
      if (left <= Duration::zero()) return false;
      changed_.WaitFor(mutex_, std::min<Duration>(left, std::chrono::seconds(1)));
    }
    return true;
  };
  if (wait_until(patience)) return;
  std::vector<std::shared_ptr<Call>> rest;
  {
    MutexLock lock(mutex_);
    for (const auto& [call, owner] : running_) rest.push_back(owner);
  }
  // Without the lock: a cancel may run the call's end on this thread.
  for (const auto& call : rest) call->Cancel();
  rest.clear();
  wait_until(TimePoint::max());
}

}  // namespace mobi
