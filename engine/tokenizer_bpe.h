// The BPE model of tokenizer.json: text to ids by merging neighbours, lowest rank first, leftmost
// of equals. No normalization, no splitting: that is done before (tokenizer_steps.h). The order of
// merges follows Hugging Face's heap exactly, stale entries included. O(n log n) in the text.
// Immutable, thread-safe; each caller brings its own scratch.
#ifndef MOBI_ENGINE_TOKENIZER_BPE_H_
#define MOBI_ENGINE_TOKENIZER_BPE_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"

namespace mobi {

using BpeVocab = absl::flat_hash_map<std::string, int32_t>;

// Its rank is its place in the list; of two for the same pair the later counts.
struct BpeMerge {
  int32_t left;
  int32_t right;
  int32_t merged;
};

struct BpeOptions {
  std::optional<int32_t> unk_id;  // without one, characters that nothing covers are dropped
  bool fuse_unk = false;          // neighbouring unknown characters become one token
  bool byte_fallback = false;     // unknown characters become "<0xNN>" tokens if all exist
  bool ignore_merges = false;     // a text that is a token as a whole is that token
};

// Memory reused from call to call.
struct BpeScratch {
  struct Symbol {
    int32_t id;
    int32_t prev;  // -1: none
    int32_t next;  // -1: none
    bool merged_away;
  };
  std::vector<Symbol> symbols;
  std::vector<uint64_t> heap;  // rank << 32 | position
};

class BpeModel {
 public:
  // Ids are not negative; merges name ids.
  BpeModel(BpeVocab vocab, absl::Span<const BpeMerge> merges, const BpeOptions& options);

  // Appends the ids of `text`, which is valid UTF-8 and shorter than 2^31 bytes.
  void Tokenize(std::string_view text, BpeScratch& scratch, std::vector<int32_t>& ids) const;
  std::optional<int32_t> Find(std::string_view token) const;

 private:
  struct Ranked {
    uint32_t rank;
    int32_t merged;
  };
  void AddSymbols(std::string_view text, std::vector<BpeScratch::Symbol>& symbols) const;
  // Appends the "<0xNN>" tokens of `character`, or nothing and false if one is missing.
  bool AddBytes(std::string_view character, std::vector<BpeScratch::Symbol>& symbols) const;
  int32_t CharacterId(std::string_view character, char32_t code_point) const;
  const Ranked* FindMerge(int32_t left, int32_t right) const;
  void PushMerge(int32_t position, BpeScratch& scratch) const;
  void MergeAll(BpeScratch& scratch) const;

  BpeVocab vocab_;
  absl::flat_hash_map<uint64_t, Ranked> merges_;  // by left << 32 | right
  std::vector<int32_t> merged_by_rank_;
  std::array<int32_t, 512> low_ids_;   // by code point: all that byte-level text is made of; -1
  std::array<int32_t, 256> byte_ids_;  // "<0xNN>", -1 where missing
  const BpeOptions options_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_TOKENIZER_BPE_H_
