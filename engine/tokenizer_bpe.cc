#include "engine/tokenizer_bpe.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/strings/str_format.h"
#include "engine/tokenizer_utf8.h"

namespace mobi {
namespace {

uint64_t PairKey(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

void Append(int32_t id, std::vector<BpeScratch::Symbol>& symbols) {
  const int32_t position = static_cast<int32_t>(symbols.size());
  if (position > 0) symbols.back().next = position;
  symbols.push_back({id, position - 1, -1, false});
}

}  // namespace

BpeModel::BpeModel(BpeVocab vocab, absl::Span<const BpeMerge> merges, const BpeOptions& options)
    : vocab_(std::move(vocab)), options_(options) {
  merges_.reserve(merges.size());
  merged_by_rank_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const BpeMerge& merge = merges[rank];
    merges_[PairKey(merge.left, merge.right)] = {static_cast<uint32_t>(rank), merge.merged};
    merged_by_rank_.push_back(merge.merged);
  }
  for (size_t i = 0; i < low_ids_.size(); ++i) {
    std::string character;
    AppendUtf8(static_cast<char32_t>(i), character);
    low_ids_[i] = Find(character).value_or(-1);
  }
  for (size_t i = 0; i < byte_ids_.size(); ++i) {
    byte_ids_[i] = Find(absl::StrFormat("<0x%02X>", i)).value_or(-1);
  }
}

std::optional<int32_t> BpeModel::Find(std::string_view token) const {
  const auto found = vocab_.find(absl::string_view(token.data(), token.size()));
  if (found == vocab_.end()) return std::nullopt;
  return found->second;
}

void BpeModel::Tokenize(std::string_view text, BpeScratch& scratch,
                        std::vector<int32_t>& ids) const {
  if (text.empty()) return;
  if (options_.ignore_merges) {
    if (const std::optional<int32_t> whole = Find(text)) {
      ids.push_back(*whole);
      return;
    }
  }
  scratch.symbols.clear();
  AddSymbols(text, scratch.symbols);
  MergeAll(scratch);
  for (const BpeScratch::Symbol& symbol : scratch.symbols) {
    if (!symbol.merged_away) ids.push_back(symbol.id);
  }
}

void BpeModel::AddSymbols(std::string_view text, std::vector<BpeScratch::Symbol>& symbols) const {
  bool unk_waits = false;  // an unknown character whose token is not added yet
  while (!text.empty()) {
    const Utf8Step step = NextUtf8(text);
    const std::string_view character = text.substr(0, step.length);
    text.remove_prefix(step.length);
    const int32_t id = CharacterId(character, step.code_point);
    if (id >= 0) {
      if (unk_waits) Append(*options_.unk_id, symbols);
      unk_waits = false;
      Append(id, symbols);
      continue;
    }
    // Bytes overtake a waiting unknown character, as they do in the original.
    if (options_.byte_fallback && AddBytes(character, symbols)) continue;
    if (!options_.unk_id.has_value()) continue;
    if (unk_waits && !options_.fuse_unk) Append(*options_.unk_id, symbols);
    unk_waits = true;
  }
  if (unk_waits) Append(*options_.unk_id, symbols);
}

bool BpeModel::AddBytes(std::string_view character,
                        std::vector<BpeScratch::Symbol>& symbols) const {
  for (const char c : character) {
    if (byte_ids_[static_cast<uint8_t>(c)] < 0) return false;
  }
  for (const char c : character) Append(byte_ids_[static_cast<uint8_t>(c)], symbols);
  return true;
}

int32_t BpeModel::CharacterId(std::string_view character, char32_t code_point) const {
  if (code_point < low_ids_.size()) return low_ids_[code_point];
  return Find(character).value_or(-1);
}

const BpeModel::Ranked* BpeModel::FindMerge(int32_t left, int32_t right) const {
  const auto found = merges_.find(PairKey(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void BpeModel::PushMerge(int32_t position, BpeScratch& scratch) const {
  const BpeScratch::Symbol& left = scratch.symbols[position];
  const Ranked* merge = FindMerge(left.id, scratch.symbols[left.next].id);
  if (merge == nullptr) return;
  scratch.heap.push_back(static_cast<uint64_t>(merge->rank) << 32 |
                         static_cast<uint32_t>(position));
}

void BpeModel::MergeAll(BpeScratch& scratch) const {
  std::vector<BpeScratch::Symbol>& symbols = scratch.symbols;
  std::vector<uint64_t>& heap = scratch.heap;
  heap.clear();
  for (size_t i = 0; i + 1 < symbols.size(); ++i) PushMerge(static_cast<int32_t>(i), scratch);
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const uint64_t top = heap.back();
    heap.pop_back();
    const int32_t position = static_cast<int32_t>(top & 0xFFFFFFFF);
    const int32_t merged = merged_by_rank_[top >> 32];
    BpeScratch::Symbol& left = symbols[position];
    if (left.merged_away || left.next < 0) continue;
    BpeScratch::Symbol& right = symbols[left.next];
    // An entry is stale when its pair is gone, unless the pair that is there now merges to the
    // same token.
    const Ranked* merge = FindMerge(left.id, right.id);
    if (merge == nullptr || merge->merged != merged) continue;
    left.id = merged;
    left.next = right.next;
    right.merged_away = true;
    if (right.next >= 0) symbols[right.next].prev = position;
    const int32_t neighbours[] = {left.prev, left.next >= 0 ? position : -1};
    for (const int32_t at : neighbours) {
      if (at < 0) continue;
      const size_t before = heap.size();
      PushMerge(at, scratch);
      if (heap.size() > before) std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
  }
}

}  // namespace mobi
