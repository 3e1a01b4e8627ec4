#include "engine/scheduler.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace mobi {
namespace {

constexpr size_t kMaxIdleTenants = 1024;

// Order of service among those that run: aged priority, then arrival; completions of one request
// one after another. The last is the first to be preempted.
bool Before(const Sequence* a, const Sequence* b) {
  if (a->aged_priority != b->aged_priority) return a->aged_priority > b->aged_priority;
  if (a->request->id != b->request->id) return a->request->id < b->request->id;
  return a->index < b->index;
}

// A sequence decodes once only its newest token is missing from the cache. A prompt's single
// uncomputed token counts as prefill until something has been generated.
bool Decodes(const Sequence& s) {
  return s.uncomputed() == 1 && s.length() > s.request->prompt_length();
}

bool ReadsAsDecodes(const Sequence& s) { return s.request->spec.prompt_as_decodes; }

// Of a prompt, in the next step.
int PromptTokens(const Sequence& s, int budget) {
  return ReadsAsDecodes(s) ? 1 : std::min(s.uncomputed(), budget);
}

}  // namespace

void Scheduler::Add(Request& request) {
  Tenant& tenant = tenants_[request.spec.tenant];
  if (tenant.sequences == 0) {
    uint64_t least = std::numeric_limits<uint64_t>::max();
    for (const auto& [name, other] : tenants_) {
      if (other.sequences > 0) least = std::min(least, other.served);
    }
    if (least != std::numeric_limits<uint64_t>::max()) {
      tenant.served = std::max(tenant.served, least);
    }
  }
  for (Sequence& sequence : request.sequences) {
    ++tenant.sequences;
    waiting_.push_back(&sequence);
  }
}

std::vector<ScheduledChunk> Scheduler::Schedule(TimePoint now, const StepPace* pace) {
  std::vector<ScheduledChunk> plan;
  int budget = options_.max_num_batched_tokens;
  const uint64_t preemptions = preemptions_;
  short_of_blocks_ = false;
  ScheduleDecodes(plan, budget);
  if (pace != nullptr) {
    budget = std::min(budget, pace->PromptTokensBeside(static_cast<int>(plan.size())));
  }
  SchedulePrefills(plan, budget);
  if (preemptions_ > preemptions) {
    // A prompt's growth may have preempted a decode planned before it. And where blocks are short
    // nothing new starts.
    std::erase_if(plan, [](const ScheduledChunk& chunk) { return chunk.sequence->blocks.empty(); });
    full_ = short_of_blocks_ = true;
  } else {
    Admit(plan, budget, now);
  }
  return plan;
}

void Scheduler::ScheduleDecodes(std::vector<ScheduledChunk>& plan, int& budget) {
  const std::vector<Sequence*> order = running_;
  for (Sequence* sequence : order) {
    if (budget == 0) break;
    if (!Decodes(*sequence) || sequence->blocks.empty()) continue;
    if (!Grow(*sequence, sequence->length())) continue;
    plan.push_back({sequence, sequence->num_computed, 1, /*decode=*/true});
    --budget;
  }
}

void Scheduler::SchedulePrefills(std::vector<ScheduledChunk>& plan, int& budget) {
  const std::vector<Sequence*> order = running_;
  for (Sequence* sequence : order) {
    if (budget == 0) break;
    if (Decodes(*sequence) || sequence->blocks.empty()) continue;
    const int count = PromptTokens(*sequence, budget);
    if (!Grow(*sequence, sequence->num_computed + count)) continue;
    plan.push_back({sequence, sequence->num_computed, count, ReadsAsDecodes(*sequence)});
    budget -= count;
  }
}

void Scheduler::Admit(std::vector<ScheduledChunk>& plan, int& budget, TimePoint now) {
  full_ = false;
  while (budget > 0 && num_running() < options_.max_num_seqs) {
    const auto next = NextWaiting(now);
    if (next == waiting_.end()) return;
    Sequence& sequence = **next;
    FindPrefix(sequence);
    const int count = PromptTokens(sequence, budget);
    // The whole prompt must fit beside one more block for every running sequence, so that what is
    // admitted is not preempted at once.
    const int blocks_needed = (sequence.length() + options_.block_size - 1) / options_.block_size -
                              static_cast<int>(sequence.blocks.size());
    const int reserve = running_.empty() ? 0 : num_running();
    if (blocks_needed + reserve > allocator_.num_free() ||
        !TryGrow(sequence, sequence.num_computed + count)) {
      ReleaseBlocks(sequence);
      full_ = short_of_blocks_ = true;
      return;  // the first in line waits rather than being overtaken for ever
    }
    prefix_queries_ += static_cast<uint64_t>(sequence.length());
    prefix_hits_ += static_cast<uint64_t>(sequence.num_computed);
    if (sequence.index == 0 && !sequence.request->first_scheduled) {
      sequence.request->usage.cached_tokens = sequence.num_computed;
    }
    waiting_.erase(next);
    InsertRunning(&sequence);
    plan.push_back({&sequence, sequence.num_computed, count, ReadsAsDecodes(sequence)});
    budget -= count;
  }
  full_ = num_running() >= options_.max_num_seqs && !waiting_.empty();
}

std::vector<Sequence*>::iterator Scheduler::NextWaiting(TimePoint now) {
  auto best = waiting_.end();
  std::tuple<int, bool, uint64_t, RequestId, int> best_rank;
  for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
    Sequence& s = **it;
    const Request& request = *s.request;
    if (!MayStart(s) || request.needed_levels > resident_levels_) continue;
    s.aged_priority =
        request.spec.priority + static_cast<int>((now - request.arrival) / options_.aging_interval);
    // What was preempted comes first among equals: work has gone into it.
    const std::tuple rank(-s.aged_priority, !s.preempted, tenants_[request.spec.tenant].served,
                          request.id, s.index);
    if (best == waiting_.end() || rank < best_rank) {
      best = it;
      best_rank = rank;
    }
  }
  return best;
}

// Completions after the first wait until the shared prompt has been computed once.
bool Scheduler::MayStart(const Sequence& sequence) const {
  const Sequence& first = sequence.request->sequences.front();
  return sequence.index == 0 || first.finished ||
         first.num_computed >= sequence.request->prompt_length();
}

void Scheduler::FindPrefix(Sequence& sequence) {
  const GenerationRequest& spec = sequence.request->spec;
  const PrecisionBand& band = spec.precision;
  const float pinned_bits = band.pinned() && band.level == 0 ? band.min_bits : 0.0f;
  const uint64_t seed = PrefixCache::Seed(spec.cache_salt, pinned_bits, band.level);
  sequence.chain = seed;
  sequence.chained_blocks = 0;
  if (spec.prompt_logprobs) return;  // every prompt token's logits are wanted
  // The last token is computed in any case: its logits are the next step's.
  const auto reusable = absl::MakeConstSpan(sequence.tokens).subspan(0, sequence.length() - 1);
  PrefixCache::Hit hit = cache_.Acquire(seed, reusable, band.min_bits);
  sequence.blocks = std::move(hit.blocks);
  sequence.chain = hit.chain;
  sequence.chained_blocks = static_cast<int>(sequence.blocks.size());
  sequence.num_computed = sequence.chained_blocks * options_.block_size;
}

bool Scheduler::TryGrow(Sequence& sequence, int length) {
  const int needed = (length + options_.block_size - 1) / options_.block_size -
                     static_cast<int>(sequence.blocks.size());
  if (needed > allocator_.num_free()) return false;
  for (int i = 0; i < needed; ++i) sequence.blocks.push_back(*allocator_.Allocate());
  return true;
}

bool Scheduler::Grow(Sequence& sequence, int length) {
  while (!TryGrow(sequence, length)) {
    Sequence* last = running_.back();
    Preempt(*last);
    if (last == &sequence) return false;
  }
  return true;
}

void Scheduler::Preempt(Sequence& sequence) {
  ++preemptions_;
  ReleaseBlocks(sequence);
  sequence.preempted = true;
  std::erase(running_, &sequence);
  waiting_.push_back(&sequence);
}

void Scheduler::Vacate() {
  const std::vector<Sequence*> order = running_;
  for (Sequence* sequence : order) {
    const std::vector<int32_t>& blocks = sequence->blocks;
    const bool holds = std::any_of(blocks.begin(), blocks.end(),
                                   [this](int32_t block) { return allocator_.leaving(block); });
    if (holds) Preempt(*sequence);
  }
}

void Scheduler::InsertRunning(Sequence* sequence) {
  running_.insert(std::upper_bound(running_.begin(), running_.end(), sequence, Before), sequence);
}

void Scheduler::ReleaseBlocks(Sequence& sequence) {
  // In reverse, so that the end of a prefix is evicted before its beginning.
  for (auto block = sequence.blocks.rbegin(); block != sequence.blocks.rend(); ++block) {
    allocator_.Release(*block);
  }
  sequence.blocks.clear();
  sequence.num_computed = 0;
}

void Scheduler::Computed(const ScheduledChunk& chunk, float kv_bits) {
  Sequence& s = *chunk.sequence;
  s.num_computed = chunk.begin + chunk.count;
  s.kv_bits = std::min(s.kv_bits, kv_bits);
  tenants_[s.request->spec.tenant].served += static_cast<uint64_t>(chunk.count);
  const int bs = options_.block_size;
  for (; (s.chained_blocks + 1) * bs <= s.num_computed; ++s.chained_blocks) {
    const auto tokens = absl::MakeConstSpan(s.tokens).subspan(s.chained_blocks * bs, bs);
    s.chain = cache_.Insert(s.chain, tokens, s.blocks[s.chained_blocks], s.kv_bits);
  }
}

void Scheduler::Remove(Sequence& sequence) {
  ReleaseBlocks(sequence);
  sequence.finished = true;
  std::erase(running_, &sequence);
  std::erase(waiting_, &sequence);
  // Tenants come from requests' metadata: those gone are forgotten, or the table would only grow.
  const auto tenant = tenants_.find(sequence.request->spec.tenant);
  if (--tenant->second.sequences == 0 && tenants_.size() > kMaxIdleTenants) tenants_.erase(tenant);
}

}  // namespace mobi
