#include "engine/scheduler.h"

#include <algorithm>

namespace mobi {
namespace {

// Order of service: priority, then arrival; completions of one request one after another.
bool Before(const Sequence* a, const Sequence* b) {
  const Request &ra = *a->request, &rb = *b->request;
  if (ra.spec.priority != rb.spec.priority) return ra.spec.priority > rb.spec.priority;
  if (ra.id != rb.id) return ra.id < rb.id;
  return a->index < b->index;
}

void InsertOrdered(auto& list, Sequence* sequence) {
  list.insert(std::upper_bound(list.begin(), list.end(), sequence, Before), sequence);
}

// A sequence decodes once only its newest token is missing from the cache. A prompt's single
// uncomputed token counts as prefill until something has been generated.
bool Decodes(const Sequence& s) {
  return s.uncomputed() == 1 && s.length() > s.request->prompt_length();
}

}  // namespace

void Scheduler::Add(Request& request) {
  for (Sequence& sequence : request.sequences) InsertOrdered(waiting_, &sequence);
}

std::vector<ScheduledChunk> Scheduler::Schedule() {
  std::vector<ScheduledChunk> plan;
  int budget = options_.max_num_batched_tokens;
  ScheduleDecodes(plan, budget);
  SchedulePrefills(plan, budget);
  Admit(plan, budget);
  // A later sequence may have preempted the blocks of one planned before it.
  std::erase_if(plan, [](const ScheduledChunk& chunk) {
    return chunk.sequence->num_computed != chunk.begin || chunk.sequence->blocks.empty();
  });
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
    const int count = std::min(sequence->uncomputed(), budget);
    if (!Grow(*sequence, sequence->num_computed + count)) continue;
    plan.push_back({sequence, sequence->num_computed, count, /*decode=*/false});
    budget -= count;
  }
}

void Scheduler::Admit(std::vector<ScheduledChunk>& plan, int& budget) {
  while (budget > 0 && num_running() < options_.max_num_seqs) {
    const auto next = std::find_if(waiting_.begin(), waiting_.end(),
                                   [this](const Sequence* s) { return MayStart(*s); });
    if (next == waiting_.end()) return;
    Sequence& sequence = **next;
    FindPrefix(sequence);
    const int count = std::min(sequence.uncomputed(), budget);
    // The whole prompt must fit beside one more block for every running sequence, so that what is
    // admitted is not preempted at once.
    const int blocks_needed = (sequence.length() + options_.block_size - 1) / options_.block_size -
                              static_cast<int>(sequence.blocks.size());
    const int reserve = running_.empty() ? 0 : num_running();
    if (blocks_needed + reserve > allocator_.num_free() ||
        !TryGrow(sequence, sequence.num_computed + count)) {
      ReleaseBlocks(sequence);
      return;  // the first in line waits rather than being overtaken for ever
    }
    prefix_queries_ += static_cast<uint64_t>(sequence.length());
    prefix_hits_ += static_cast<uint64_t>(sequence.num_computed);
    if (sequence.index == 0 && !sequence.request->first_scheduled) {
      sequence.request->usage.cached_tokens = sequence.num_computed;
    }
    waiting_.erase(next);
    InsertOrdered(running_, &sequence);
    plan.push_back({&sequence, sequence.num_computed, count, /*decode=*/false});
    budget -= count;
  }
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
  std::erase(running_, &sequence);
  InsertOrdered(waiting_, &sequence);
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
}

}  // namespace mobi
