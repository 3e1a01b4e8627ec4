#include "engine/step_runner.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "engine/base/status_macros.h"
#include "engine/sampling.h"

namespace mobi {
namespace {

// Decodes that share levels move their bytes once, so the one that is promised most decides for all
// of them: what is moved for it costs the others nothing.
float SharedBits(absl::Span<const ScheduledChunk> plan, const PrecisionTarget& target) {
  float bits = 0;
  for (const ScheduledChunk& chunk : plan) {
    const PrecisionBand& band = chunk.sequence->request->spec.precision;
    if (chunk.decode && !band.pinned()) bits = std::max(bits, PriceTable::BitsOf(band, target));
  }
  return bits;
}

bool IsShort(const ScheduledChunk& chunk) {
  return chunk.decode || chunk.sequence->request->prompt_length() < kLongPrompt;
}

// The level that all of these tokens read, whatever routers say; 0: there is none.
int OnlyLevel(absl::Span<const uint8_t> lowest, absl::Span<const uint8_t> highest) {
  const bool one = lowest == highest && std::all_of(highest.begin(), highest.end(),
                                                    [&](int level) { return level == highest[0]; });
  return one && !highest.empty() ? highest[0] : 0;
}

}  // namespace

absl::StatusOr<StepRunner> StepRunner::Create(const EngineOptions& options, int max_model_len,
                                              const Model& model, const Prices& prices, KvCache kv,
                                              Backend& backend) {
  StepRunner runner(model, prices, std::move(kv), backend);
  runner.options_ = options;
  const ModelConfig& config = model.config();
  // Padding of captured steps may exceed the number of sequences.
  const int max_seqs = backend.PaddedDecodes(options.max_num_seqs);
  const int max_tokens = std::max(options.max_num_batched_tokens, max_seqs);
  StepLimits limits;
  limits.max_tokens = max_tokens;
  limits.max_seqs = max_seqs;
  limits.max_blocks_per_seq = (max_model_len + options.block_size - 1) / options.block_size;
  limits.max_edits_per_seq = std::min(max_model_len + kMaxLogitBias, config.vocab_size);
  MOBI_ASSIGN_OR_RETURN(runner.buffers_, StepBuffers::Create(limits, backend));
  MOBI_ASSIGN_OR_RETURN(runner.act_, Activations::Create(config, max_tokens, backend));
  const DType dtype = backend.activation_dtype();
  MOBI_ASSIGN_OR_RETURN(
      Buffer gathered,
      backend.Allocate(size_t{1} * max_seqs * config.hidden_size * SizeOf(dtype), "hidden states"));
  MOBI_ASSIGN_OR_RETURN(
      Buffer logits, backend.Allocate(sizeof(float) * max_seqs * model.logits_stride(), "logits"));
  runner.gathered_ = Tensor::Of(gathered.data(), dtype, max_seqs, config.hidden_size);
  runner.logits_ = {logits.data(), DType::kF32, max_seqs, config.vocab_size, model.logits_stride()};
  runner.memory_.push_back(std::move(gathered));
  runner.memory_.push_back(std::move(logits));
  return runner;
}

absl::StatusOr<StepResult> StepRunner::Run(absl::Span<const ScheduledChunk> plan,
                                           const PrecisionTarget& target, int max_level) {
  StepResult result;
  Layout layout = LayOut(plan, target, max_level, result);
  Pad(layout);
  if (model_.sliced_lm_head().has_value()) LayOutLogitsLevels(layout, result);
  buffers_.Upload(layout.key.num_seqs, layout.num_edits, backend_);
  backend_.RunStep(layout.key, [&] { Enqueue(layout); });
  if (layout.top_logprobs > 0) {
    // Row i of the logits is sampled row i.
    backend_.MostLikely(logits_.FirstRows(layout.num_sampled), buffers_.row_ids.device,
                        layout.num_sampled, layout.top_logprobs, buffers_.top.device);
    backend_.Download(buffers_.top.device, sizeof(TopLogprobs) * layout.num_sampled,
                      buffers_.top.host);
  }
  backend_.Download(buffers_.sampled.device, sizeof(Sampled) * layout.num_sampled,
                    buffers_.sampled.host);
  CollectCounts(layout);
  MOBI_RETURN_IF_ERROR(backend_.Synchronize());
  MOBI_RETURN_IF_ERROR(Score(layout, result));
  Collect(layout, result);
  return result;
}

StepRunner::Layout StepRunner::LayOut(absl::Span<const ScheduledChunk> plan,
                                      const PrecisionTarget& target, int max_level,
                                      StepResult& result) {
  for (const ScheduledChunk& chunk : plan) result.chunks.emplace_back().chunk = chunk;
  result.coherent_target_bits = SharedBits(plan, target);
  // The decodes that may share a level come first, then those that are pinned or accept less, then
  // prompts, short ones first.
  const auto rank = [&](const ChunkResult& r) {
    if (!r.chunk.decode) return IsShort(r.chunk) ? 2 : 3;
    const PrecisionBand& band = r.chunk.sequence->request->spec.precision;
    return band.pinned() || band.max_bits < result.coherent_target_bits ? 1 : 0;
  };
  std::stable_sort(result.chunks.begin(), result.chunks.end(),
                   [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
  Layout layout;
  layout.max_level = max_level;
  layout.key.decode_only = true;
  buffers_.query_start.host[0] = 0;
  PrecisionTarget shared = target;
  shared.target_bits = result.coherent_target_bits;
  for (ChunkResult& chunk : result.chunks) {
    const bool coherent = options_.coherent_decode && rank(chunk) == 0;
    chunk.regime = coherent             ? Regime::kCoherent
                   : chunk.chunk.decode ? Regime::kDecode
                                        : Regime::kPrompt;
    layout.key.num_coherent += coherent;
  }
  for (size_t i = 0; i < result.chunks.size(); ++i) {
    const bool coherent = result.chunks[i].regime == Regime::kCoherent;
    AddChunk(static_cast<int>(i), coherent ? shared : target, result.chunks[i], layout);
  }
  layout.key.num_logits = layout.num_sampled;
  const int n = layout.key.num_tokens;
  const absl::Span<const uint8_t> lowest(buffers_.min_level.host, n);
  const absl::Span<const uint8_t> highest(buffers_.max_level.host, n);
  layout.key.pinned = lowest == highest;
  const int num_short = layout.key.num_short;
  layout.key.long_level = OnlyLevel(lowest.subspan(num_short), highest.subspan(num_short));
  return layout;
}

void StepRunner::AddChunk(int index, const PrecisionTarget& target, ChunkResult& result,
                          Layout& layout) {
  const ScheduledChunk& chunk = result.chunk;
  const Sequence& sequence = *chunk.sequence;
  const GenerationRequest& spec = sequence.request->spec;
  TokenPrecision precision = prices_.Resolve(spec.precision, target, result.regime,
                                             layout.key.num_coherent, layout.max_level);
  const bool at_whole_levels =
      chunk.decode ? options_.whole_level_decodes : options_.whole_level_prompts;
  const int whole = at_whole_levels ? WholeLevel(spec.precision, target, layout.max_level) : 0;
  if (whole > 0) precision.min_level = precision.max_level = static_cast<uint8_t>(whole);
  const int first = layout.key.num_tokens, seq = layout.key.num_seqs;
  layout.first_row.push_back(first);
  for (int i = 0; i < chunk.count; ++i) {
    const int position = chunk.begin + i, row = first + i;
    const int block = sequence.blocks[position / options_.block_size];
    buffers_.token_ids.host[row] = sequence.tokens[position];
    buffers_.positions.host[row] = position;
    buffers_.slots.host[row] = block * options_.block_size + position % options_.block_size;
    buffers_.price.host[row] = precision.price;
    buffers_.min_level.host[row] = precision.min_level;
    buffers_.max_level.host[row] = precision.max_level;
  }
  const int context = chunk.begin + chunk.count;
  buffers_.query_start.host[seq + 1] = first + chunk.count;
  buffers_.context_len.host[seq] = context;
  std::copy(sequence.blocks.begin(), sequence.blocks.end(),
            buffers_.block_table.host + int64_t{seq} * buffers_.block_table_stride);
  layout.key.num_tokens += chunk.count;
  layout.key.num_seqs += 1;
  layout.key.num_short += IsShort(chunk) ? chunk.count : 0;
  layout.key.decode_only &= chunk.decode;
  layout.max_query_len = std::max(layout.max_query_len, chunk.count);
  layout.key.max_context_len = std::max(layout.key.max_context_len, context);
  result.kv_bits = PriceTable::BitsOf(spec.precision, target);
  result.tracked = !spec.precision.pinned() && whole == 0 && result.kv_bits == target.target_bits;

  if (context == sequence.length() && spec.max_new_tokens > 0) {
    AddSampling(sequence, first + chunk.count - 1, index, layout);
    result.sampled = true;
  }
  if (spec.prompt_logprobs) {
    const int prompt = sequence.request->prompt_length();
    result.first_scored = chunk.begin + 1;
    layout.score_top = std::max(layout.score_top, spec.prompt_top_logprobs);
    for (int i = 0; i < chunk.count && chunk.begin + i + 1 < prompt; ++i) {
      layout.scored.push_back({first + i, sequence.tokens[chunk.begin + i + 1], index});
    }
  }
}

void StepRunner::AddSampling(const Sequence& sequence, int row, int index, Layout& layout) {
  const int n = layout.num_sampled++;
  layout.sampled_results.push_back(index);
  layout.top_logprobs = std::max(layout.top_logprobs, sequence.request->spec.top_logprobs);
  buffers_.logits_rows.host[n] = row;
  SamplingRow sampling = MakeSamplingRow(sequence);
  sampling.logits_row = n;
  sampling.edit_begin = layout.num_edits;
  for (const LogitEdit& edit : LogitEdits(sequence)) {
    buffers_.edits.host[layout.num_edits++] = edit;
  }
  sampling.edit_end = layout.num_edits;
  buffers_.sampling.host[n] = sampling;
}

// Pads a step of decodes to a size whose record exists: rows that write nothing and are ignored,
// and read no level that others do not.
void StepRunner::Pad(Layout& layout) {
  if (!layout.key.decode_only || !layout.scored.empty()) {
    layout.key.decode_only = false;
    return;
  }
  const int padded = backend_.PaddedDecodes(layout.key.num_seqs);
  const uint8_t* const levels = buffers_.max_level.host;
  const uint8_t lowest =
      layout.key.pinned ? *std::min_element(levels, levels + layout.key.num_tokens) : uint8_t{1};
  for (int i = layout.key.num_seqs; i < padded; ++i) {
    buffers_.token_ids.host[i] = 0;
    buffers_.positions.host[i] = 0;
    buffers_.slots.host[i] = -1;
    buffers_.price.host[i] = 1.0f;
    buffers_.min_level.host[i] = buffers_.max_level.host[i] = lowest;
    buffers_.query_start.host[i + 1] = i + 1;
    buffers_.context_len.host[i] = 0;
    buffers_.logits_rows.host[i] = 0;
    buffers_.sampling.host[i] = SamplingRow{};
  }
  if (layout.key.num_coherent == layout.key.num_seqs) layout.key.num_coherent = padded;
  layout.key.num_tokens = layout.key.num_short = padded;
  layout.key.num_seqs = layout.key.num_logits = padded;
  const auto context = static_cast<unsigned>(layout.key.max_context_len);
  layout.key.max_context_len = static_cast<int>(std::max(256u, std::bit_ceil(context)));
}

// Rows of padding are pinned to the lowest level, so that they raise nobody's.
void StepRunner::LayOutLogitsLevels(const Layout& layout, StepResult& result) {
  const int32_t* rows = buffers_.logits_rows.host;
  uint8_t* levels = buffers_.logits_levels.host;
  const int n = layout.num_sampled;
  // Tokens that share levels come first, so do their rows of logits.
  const auto num_coherent =
      std::count_if(rows, rows + n, [&](int32_t row) { return row < layout.key.num_coherent; });
  ChooseLogitsLevels(rows, n, static_cast<int>(num_coherent), levels);
  std::fill(levels + n, levels + layout.key.num_logits,
            static_cast<uint8_t>(model_.sliced_lm_head()->levels.min_level));
  if (n > 0) result.lm_head_level = *std::max_element(levels, levels + n);
}

void StepRunner::ChooseLogitsLevels(const int32_t* rows, int count, int num_coherent,
                                    uint8_t* levels) const {
  std::vector<TokenPrecision> precisions;
  precisions.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    precisions.push_back({buffers_.price.host[rows[i]], buffers_.min_level.host[rows[i]],
                          buffers_.max_level.host[rows[i]]});
  }
  ChooseLmHeadLevels(*model_.sliced_lm_head(), precisions, num_coherent, levels);
}

StepTensors StepRunner::Tensors(const Layout& layout) const {
  StepTensors step;
  step.num_tokens = layout.key.num_tokens;
  step.token_ids = buffers_.token_ids.device;
  step.positions = buffers_.positions.device;
  step.slots = buffers_.slots.device;
  step.routing = {step.num_tokens,
                  layout.key.num_coherent,
                  buffers_.price.device,
                  buffers_.min_level.device,
                  buffers_.max_level.device,
                  buffers_.level_tiles.device,
                  buffers_.loaded_bytes.device};
  step.pinned = layout.key.pinned;
  step.attention = {layout.key.num_seqs,         layout.max_query_len,
                    layout.key.max_context_len,  buffers_.query_start.device,
                    buffers_.context_len.device, buffers_.block_table.device,
                    buffers_.block_table_stride};
  return step;
}

void StepRunner::Enqueue(const Layout& layout) {
  const StepTensors step = Tensors(layout);
  if (!layout.key.pinned) {  // else no router counts: see CollectCounts
    backend_.Zero(buffers_.level_tiles.device, sizeof(uint32_t) * step.num_tokens);
    backend_.Zero(buffers_.loaded_bytes.device, sizeof(uint64_t));
  }
  model_.Forward(step, kv_, act_);
  const int n = layout.key.num_logits;
  if (n == 0) return;
  const Tensor hidden = gathered_.FirstRows(n), logits = logits_.FirstRows(n);
  backend_.GatherRows(act_.normed.FirstRows(step.num_tokens), buffers_.logits_rows.device, hidden);
  model_.Logits(hidden, buffers_.logits_levels.device, logits);
  backend_.Sample(logits, {n, buffers_.sampling.device, buffers_.edits.device},
                  buffers_.sampled.device);
}

void StepRunner::CollectCounts(const Layout& layout) {
  const int n = layout.key.num_tokens;
  // No router counts tokens that it need not be asked about.
  const int counted = layout.key.pinned ? 0 : layout.key.long_level > 0 ? layout.key.num_short : n;
  const uint8_t* const levels = buffers_.max_level.host;
  for (int i = counted; i < n; ++i) {
    buffers_.level_tiles.host[i] = static_cast<uint32_t>(levels[i] * model_.routed_tiles());
  }
  if (layout.key.pinned) {
    *buffers_.loaded_bytes.host = model_.routed_bytes(*std::max_element(levels, levels + n));
    return;
  }
  backend_.Download(buffers_.level_tiles.device, sizeof(uint32_t) * counted,
                    buffers_.level_tiles.host);
  backend_.Download(buffers_.loaded_bytes.device, sizeof(uint64_t), buffers_.loaded_bytes.host);
}

absl::Status StepRunner::Score(const Layout& layout, StepResult& result) {
  const int piece = options_.max_num_seqs;
  for (size_t begin = 0; begin < layout.scored.size(); begin += piece) {
    const int n = static_cast<int>(std::min<size_t>(piece, layout.scored.size() - begin));
    for (int i = 0; i < n; ++i) {
      buffers_.score_rows.host[i] = layout.scored[begin + i].row;
      buffers_.score_ids.host[i] = layout.scored[begin + i].target;
    }
    const size_t bytes = sizeof(int32_t) * n;
    backend_.Upload(buffers_.score_rows.host, bytes, buffers_.score_rows.device);
    backend_.Upload(buffers_.score_ids.host, bytes, buffers_.score_ids.device);
    if (model_.sliced_lm_head().has_value()) {
      ChooseLogitsLevels(buffers_.score_rows.host, n, 0, buffers_.score_levels.host);
      backend_.Upload(buffers_.score_levels.host, sizeof(uint8_t) * n,
                      buffers_.score_levels.device);
    }
    const Tensor hidden = gathered_.FirstRows(n), logits = logits_.FirstRows(n);
    backend_.GatherRows(act_.normed.FirstRows(layout.key.num_tokens), buffers_.score_rows.device,
                        hidden);
    model_.Logits(hidden, buffers_.score_levels.device, logits);
    backend_.TokenLogprobs(logits, buffers_.score_ids.device, buffers_.scores.device);
    backend_.Download(buffers_.scores.device, sizeof(float) * n, buffers_.scores.host);
    if (layout.score_top > 0) {
      backend_.MostLikely(logits, buffers_.row_ids.device, n, layout.score_top,
                          buffers_.score_top.device);
      backend_.Download(buffers_.score_top.device, sizeof(TopLogprobs) * n,
                        buffers_.score_top.host);
    }
    MOBI_RETURN_IF_ERROR(backend_.Synchronize());
    for (int i = 0; i < n; ++i) {
      ChunkResult& chunk = result.chunks[layout.scored[begin + i].result];
      chunk.prompt_logprobs.push_back(buffers_.scores.host[i]);
      if (chunk.chunk.sequence->request->spec.prompt_top_logprobs > 0) {
        chunk.prompt_top.push_back(buffers_.score_top.host[i]);
      }
    }
  }
  return absl::OkStatus();
}

void StepRunner::Collect(const Layout& layout, StepResult& result) {
  const auto tiles = static_cast<double>(model_.routed_tiles());
  const auto bits = [&](int row) {
    return tiles > 0 ? kSliceBits * buffers_.level_tiles.host[row] / tiles : kFloatBits;
  };
  for (size_t i = 0; i < result.chunks.size(); ++i) {
    ChunkResult& r = result.chunks[i];
    for (int t = 0; t < r.chunk.count; ++t) {
      const double used = bits(layout.first_row[i] + t);
      r.effective_bits_sum += used;
      const auto nearest = static_cast<int>(std::lround(used / kSliceBits));
      ++r.tokens_by_level[std::clamp(nearest, 1, kNumLevels) - 1];
    }
    r.last_effective_bits = static_cast<float>(bits(layout.first_row[i] + r.chunk.count - 1));
  }
  for (int n = 0; n < layout.num_sampled; ++n) {
    ChunkResult& r = result.chunks[layout.sampled_results[n]];
    r.token = buffers_.sampled.host[n];
    if (layout.top_logprobs > 0) r.top = &buffers_.top.host[n];
  }
  const double weights = tiles * kTileRows * kGroupSize;
  result.loaded_bits =
      tiles > 0 ? 8.0 * static_cast<double>(*buffers_.loaded_bytes.host) / weights : kFloatBits;
}

}  // namespace mobi
