// The scheduler without a model: random loads from seeds, invariants checked after every step.
#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

namespace mobi {
namespace {

// Plays the engine: runs plans by appending tokens, cancels at random, checks invariants.
class Simulation {
 public:
  explicit Simulation(uint64_t seed)
      : random_(seed),
        options_{.block_size = Draw(1, 8), .max_num_seqs = Draw(1, 6), .max_num_batched_tokens = 0},
        max_len_(Draw(8, 60)),
        num_blocks_((max_len_ + options_.block_size - 1) / options_.block_size + Draw(0, 12)),
        allocator_(num_blocks_, [this](int32_t block) { cache_.Evict(block); }),
        cache_(allocator_, options_.block_size),
        scheduler_(WithBudget(), allocator_, cache_) {}

  void Run() {
    const int num_requests = Draw(1, 12);
    int added = 0;
    for (int step = 0; added < num_requests || !live_.empty(); ++step) {
      ASSERT_LT(step, 20000) << "starvation: " << live_.size() << " requests never end";
      while (added < num_requests && Draw(0, 3) == 0) Add(++added);
      if (!live_.empty() && Draw(0, 40) == 0) Cancel();
      ChangeMemory();
      const auto plan = scheduler_.Schedule(TimePoint{} + step * std::chrono::milliseconds(50));
      CheckPlan(plan);
      for (const ScheduledChunk& chunk : plan) Compute(chunk);
      if (AnyMayRun() && plan.empty()) ++idle_steps_;
      ASSERT_LT(idle_steps_, 3) << "work waits but nothing is scheduled";
      if (!plan.empty()) idle_steps_ = 0;
      EndFinished();
      CheckBlocks();
      if (testing::Test::HasFatalFailure()) return;
    }
    EXPECT_TRUE(scheduler_.idle());
    EXPECT_EQ(allocator_.num_free(), allocator_.num_blocks()) << "blocks leaked";
    EXPECT_EQ(allocator_.num_leaving(), 0);
  }

  uint64_t preemptions() const { return scheduler_.preemptions(); }
  uint64_t prefix_hits() const { return scheduler_.prefix_hits(); }
  int shrinks() const { return shrinks_; }

 private:
  int Draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  SchedulerOptions WithBudget() {
    options_.max_num_batched_tokens = options_.max_num_seqs + Draw(0, 24);
    return options_;
  }

  // Plays slice residency: slices leave and their bytes become blocks, both come back; requests
  // that need what is away wait for it.
  void ChangeMemory() {
    if (Draw(0, 15) != 0) return;
    int needed = 1;
    for (const auto& [id, request] : live_) needed = std::max(needed, request->needed_levels);
    const bool leave = Draw(0, 1) == 0;
    resident_levels_ = leave ? std::max(needed, 2) : kNumLevels;
    scheduler_.SetResidentLevels(resident_levels_);
    const int blocks = num_blocks_ + (kNumLevels - resident_levels_) * extra_blocks_;
    shrinks_ += blocks < allocator_.num_blocks();
    allocator_.Resize(blocks);
    if (Draw(0, 1) == 0) {
      scheduler_.Vacate();
      ASSERT_EQ(allocator_.num_leaving(), 0) << "whoever held them was preempted";
    }
  }

  void Add(int id) {
    auto request = std::make_unique<Request>();
    request->id = id;
    request->needed_levels = Draw(0, 5) == 0 ? Draw(1, kNumLevels) : 1;
    request->spec.priority = Draw(0, 2);
    request->spec.tenant = std::string(1, static_cast<char>('a' + Draw(0, 2)));
    request->spec.n = Draw(1, 3);
    request->spec.max_new_tokens = Draw(1, std::min(20, max_len_ - 1));
    const int length = Draw(1, max_len_ - request->spec.max_new_tokens);
    // Few distinct tokens, so that prefixes are shared.
    const int alphabet = Draw(1, 3);
    for (int i = 0; i < length; ++i) request->spec.prompt.push_back(Draw(0, alphabet) / 2);
    for (int i = 0; i < request->spec.n; ++i) {
      Sequence& s = request->sequences.emplace_back();
      s.request = request.get();
      s.index = i;
      s.tokens = request->spec.prompt;
    }
    scheduler_.Add(*request);
    live_[id] = std::move(request);
  }

  void Cancel() {
    auto it = std::next(live_.begin(), Draw(0, static_cast<int>(live_.size()) - 1));
    for (Sequence& s : it->second->sequences) {
      if (!s.finished) scheduler_.Remove(s);
    }
  }

  void CheckPlan(const std::vector<ScheduledChunk>& plan) {
    int tokens = 0;
    std::set<Sequence*> seen;
    for (const ScheduledChunk& chunk : plan) {
      const Sequence& s = *chunk.sequence;
      tokens += chunk.count;
      ASSERT_TRUE(seen.insert(chunk.sequence).second) << "a sequence runs twice in a step";
      ASSERT_FALSE(s.finished);
      ASSERT_GT(chunk.count, 0);
      ASSERT_LE(s.request->needed_levels, resident_levels_);
      ASSERT_EQ(chunk.begin, s.num_computed);
      ASSERT_LE(chunk.begin + chunk.count, s.length());
      ASSERT_GE(static_cast<int>(s.blocks.size()) * options_.block_size, chunk.begin + chunk.count);
    }
    ASSERT_LE(tokens, options_.max_num_batched_tokens);
    ASSERT_LE(scheduler_.num_running(), options_.max_num_seqs);
  }

  void Compute(const ScheduledChunk& chunk) {
    Sequence& s = *chunk.sequence;
    scheduler_.Computed(chunk, 8.0f);
    if (s.uncomputed() > 0) return;
    s.tokens.push_back(Draw(0, 1));
    const int generated = s.length() - s.request->prompt_length();
    if (generated >= s.request->spec.max_new_tokens) scheduler_.Remove(s);
  }

  void EndFinished() {
    std::erase_if(live_, [](const auto& entry) {
      const auto& sequences = entry.second->sequences;
      return std::all_of(sequences.begin(), sequences.end(),
                         [](const Sequence& s) { return s.finished; });
    });
  }

  // Every block's references are exactly the sequences that hold it, and shared blocks hold the
  // same tokens for all of them.
  void CheckBlocks() {
    std::map<int32_t, int> held;
    std::map<int32_t, std::vector<int32_t>> contents;
    const int bs = options_.block_size;
    for (const auto& [id, request] : live_) {
      for (const Sequence& s : request->sequences) {
        for (size_t i = 0; i < s.blocks.size(); ++i) {
          ++held[s.blocks[i]];
          if (static_cast<int>(i + 1) * bs > s.num_computed) continue;
          std::vector<int32_t> prefix(s.tokens.begin(), s.tokens.begin() + (i + 1) * bs);
          const auto [it, fresh] = contents.try_emplace(s.blocks[i], prefix);
          ASSERT_EQ(it->second, prefix) << "a block is shared by different prefixes";
        }
      }
    }
    int used = 0, leaving = 0;
    for (const auto& [block, count] : held) {
      ASSERT_EQ(allocator_.references(block), count);
      ++(allocator_.leaving(block) ? leaving : used);
    }
    ASSERT_EQ(allocator_.num_free(), allocator_.num_blocks() - used);
    ASSERT_EQ(allocator_.num_leaving(), leaving);
  }

  // Somebody waits or runs who needs no level that is away.
  bool AnyMayRun() const {
    return std::any_of(live_.begin(), live_.end(), [this](const auto& entry) {
      const auto& sequences = entry.second->sequences;
      return entry.second->needed_levels <= resident_levels_ &&
             std::any_of(sequences.begin(), sequences.end(),
                         [](const Sequence& s) { return !s.finished; });
    });
  }

  std::mt19937_64 random_;
  SchedulerOptions options_;
  int max_len_;
  int num_blocks_;
  BlockAllocator allocator_;
  PrefixCache cache_;
  Scheduler scheduler_;
  std::map<int, std::unique_ptr<Request>> live_;
  int idle_steps_ = 0;
  const int extra_blocks_ = Draw(0, 8);
  int resident_levels_ = kNumLevels;
  int shrinks_ = 0;
};

TEST(SchedulerSimulation, KeepsItsInvariantsOver20000Seeds) {
  uint64_t preemptions = 0, hits = 0;
  int shrinks = 0;
  for (uint64_t seed = 0; seed < 20000; ++seed) {
    Simulation simulation(seed);
    simulation.Run();
    ASSERT_FALSE(HasFatalFailure()) << "seed " << seed;
    preemptions += simulation.preemptions();
    hits += simulation.prefix_hits();
    shrinks += simulation.shrinks();
  }
  // The loads reach what they are meant to test.
  EXPECT_GT(preemptions, 1000u);
  EXPECT_GT(hits, 1000u);
  EXPECT_GT(shrinks, 1000);
}

// Served by hand: one sequence at a time, each a prompt alone.
class SchedulerOrder : public testing::Test {
 protected:
  void Add(RequestId id, const std::string& tenant, int priority, int arrival_s = 0) {
    auto& request = requests_.emplace_back(std::make_unique<Request>());
    request->id = id;
    request->spec.tenant = tenant;
    request->spec.priority = priority;
    request->spec.prompt.assign(10, static_cast<int32_t>(id));
    request->arrival = TimePoint{} + std::chrono::seconds(arrival_s);
    Sequence& s = request->sequences.emplace_back();
    s.request = request.get();
    s.tokens = request->spec.prompt;
    scheduler_.Add(*request);
  }

  std::vector<RequestId> Serve(int count, int now_s = 0) {
    std::vector<RequestId> order;
    for (int i = 0; i < count; ++i) {
      const auto plan = scheduler_.Schedule(TimePoint{} + std::chrono::seconds(now_s));
      EXPECT_EQ(plan.size(), 1u);
      if (plan.empty()) break;
      scheduler_.Computed(plan[0], 8.0f);
      scheduler_.Remove(*plan[0].sequence);
      order.push_back(plan[0].sequence->request->id);
    }
    return order;
  }

  using Order = std::vector<RequestId>;
  BlockAllocator allocator_{64, [this](int32_t block) { cache_.Evict(block); }};
  PrefixCache cache_{allocator_, 16};
  Scheduler scheduler_{
      {.block_size = 16, .max_num_seqs = 1, .max_num_batched_tokens = 64}, allocator_, cache_};
  std::vector<std::unique_ptr<Request>> requests_;
};

TEST_F(SchedulerOrder, HigherPriorityFirstThenArrival) {
  Add(1, "", 0);
  Add(2, "", 1);
  Add(3, "", 1);
  EXPECT_EQ(Serve(3), (Order{2, 3, 1}));
}

TEST_F(SchedulerOrder, WaitingRaisesPriority) {
  Add(1, "", 0, /*arrival_s=*/0);
  Add(2, "", 1, /*arrival_s=*/5);
  EXPECT_EQ(Serve(2, /*now_s=*/5), (Order{1, 2})) << "five seconds are two aging intervals";
}

TEST_F(SchedulerOrder, TenantsTakeTurnsWhateverTheyQueue) {
  for (RequestId id = 1; id <= 6; ++id) Add(id, "greedy", 0);
  for (RequestId id = 7; id <= 8; ++id) Add(id, "modest", 0);
  EXPECT_EQ(Serve(8), (Order{1, 7, 2, 8, 3, 4, 5, 6}));
}

TEST_F(SchedulerOrder, IdlingEarnsATenantNoCredit) {
  for (RequestId id = 1; id <= 6; ++id) Add(id, "busy", 0);
  EXPECT_EQ(Serve(3), (Order{1, 2, 3}));
  for (RequestId id = 7; id <= 9; ++id) Add(id, "late", 0);
  EXPECT_EQ(Serve(4), (Order{4, 7, 5, 8}));
}

}  // namespace
}  // namespace mobi
