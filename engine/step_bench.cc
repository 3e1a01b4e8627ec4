#include "engine/step_bench.h"

#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/kv_cache.h"
#include "engine/precision.h"

namespace mobi {
namespace {

// log(price) is searched this far to both sides of the table's.
constexpr float kTrimRange = 64;
constexpr int kSearchSteps = 16;
constexpr double kBitsTolerance = 0.02;

}  // namespace

absl::StatusOr<std::unique_ptr<StepBench>> StepBench::Create(const StepBenchOptions& options,
                                                             const Model& model,
                                                             const WeightSource& source) {
  if (options.context < 1 || options.context > model.max_positions()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "context ", options.context, " is not within 1 and the model's ", model.max_positions()));
  }
  if (options.decodes < 0) {
    return absl::InvalidArgumentError(absl::StrCat(options.decodes, " decodes are less than none"));
  }
  if (options.chunk < 1 || options.chunk > options.context) {
    return absl::InvalidArgumentError(absl::StrCat(
        "chunk ", options.chunk, " is not within 1 and the context's ", options.context));
  }
  Backend& backend = model.backend();
  const int max_seqs = options.max_seqs + options.decodes;
  EngineOptions engine;
  engine.block_size = options.block_size;
  engine.max_num_seqs = max_seqs;
  engine.max_num_batched_tokens = options.max_seqs * options.chunk + options.decodes;
  engine.coherent_decode = options.coherent;
  engine.whole_level_prompts = options.whole_level_prompts;
  engine.whole_level_decodes = options.whole_level_decodes;
  const int blocks = (options.context + options.block_size - 1) / options.block_size;
  MOBI_ASSIGN_OR_RETURN(
      KvCache kv, KvCache::Create(model.config(), max_seqs * blocks, options.block_size, backend));
  const auto token = source.price_table();
  const auto coherent =
      source.coherent_price_table().empty() ? token : source.coherent_price_table();
  const Prices prices{PriceTable({token.begin(), token.end()}),
                      PriceTable({coherent.begin(), coherent.end()})};
  MOBI_ASSIGN_OR_RETURN(StepRunner runner, StepRunner::Create(engine, options.context, model,
                                                              prices, std::move(kv), backend));
  std::unique_ptr<StepBench> bench(new StepBench(options, model, std::move(runner)));
  bench->MakeSequences();
  return bench;
}

void StepBench::MakeSequences() {
  const int blocks = (options_.context + options_.block_size - 1) / options_.block_size;
  request_.spec.prompt.resize(options_.context);
  request_.spec.max_new_tokens = 1;
  request_.spec.sampling.temperature = 0;
  request_.sequences.resize(options_.max_seqs + options_.decodes);
  for (int i = 0; i < options_.max_seqs + options_.decodes; ++i) {
    Sequence& sequence = request_.sequences[i];
    sequence.request = &request_;
    sequence.index = i;
    sequence.num_computed = options_.context - ChunkOf(i);
    for (int t = 0; t < options_.context; ++t) {
      sequence.tokens.push_back((i * 7919 + t * 104729) % model_.config().vocab_size);
    }
    for (int b = 0; b < blocks; ++b) sequence.blocks.push_back(i * blocks + b);
  }
}

bool StepBench::Chooses(float bits) const {
  if (!model_.routed() || bits <= kMinBits || bits >= kMaxBits) return false;
  const bool prompts = options_.chunk > 1, decodes = options_.chunk == 1 || options_.decodes > 0;
  return (prompts && !options_.whole_level_prompts) || (decodes && !options_.whole_level_decodes);
}

absl::Status StepBench::Set(int num_seqs, float bits) {
  num_seqs_ = num_seqs;
  target_.target_bits = bits;
  target_.log_price_trim = {};
  if (!Chooses(bits)) return Run();
  const auto set_trim = [&](float trim) {
    for (const Regime regime : kRegimes) target_.log_price_trim[regime] = trim;
    return Run();
  };
  const auto [found, is_new] = trims_.try_emplace({num_seqs, bits}, 0.0f);
  if (!is_new) return set_trim(found->second);
  // A higher price never reads more.
  float low = -kTrimRange, high = kTrimRange;
  for (int i = 0; i < kSearchSteps; ++i) {
    MOBI_RETURN_IF_ERROR(set_trim(found->second));
    if (std::abs(effective_bits_ - bits) < kBitsTolerance) break;
    (effective_bits_ > bits ? low : high) = found->second;
    found->second = (low + high) / 2;
  }
  return set_trim(found->second);
}

absl::Status StepBench::Run() {
  std::vector<ScheduledChunk> plan;
  plan.reserve(static_cast<size_t>(num_seqs_ + options_.decodes));
  for (int i = 0; i < num_seqs_ + options_.decodes; ++i) {
    const int of_all = i < options_.decodes ? options_.max_seqs + i : i - options_.decodes;
    const int chunk = ChunkOf(of_all);
    plan.push_back(
        {&request_.sequences[of_all], options_.context - chunk, chunk, /*decode=*/chunk == 1});
  }
  MOBI_ASSIGN_OR_RETURN(const StepResult result, runner_.Run(plan, target_));
  const bool whole_levels = options_.whole_level_prompts && options_.decodes > 0;
  double bits = 0, count = 0;
  for (const ChunkResult& chunk : result.chunks) {
    if (whole_levels && !chunk.chunk.decode) continue;
    bits += chunk.last_effective_bits;
    ++count;
  }
  effective_bits_ = bits / count;
  loaded_bits_ = result.loaded_bits;
  lm_head_level_ = result.lm_head_level;
  return absl::OkStatus();
}

double StepBench::StepBytes() const {
  const ModelConfig& config = model_.config();
  double linears = 0;
  for (const DecoderLayer& layer : model_.layers()) {
    for (const Linear& linear : layer.linears) {
      if (linear.routed.has_value()) {
        const SlicedWeight& weight = linear.routed->weight;
        linears += static_cast<double>(weight.rows * weight.cols) * loaded_bits_ / 8;
      } else {
        linears += static_cast<double>(linear.dense.rows * linear.dense.cols) *
                   static_cast<double>(SizeOf(linear.dense.dtype));
      }
    }
  }
  const DType dtype = model_.backend().activation_dtype();
  const int64_t vocab = config.vocab_size, hidden = config.hidden_size;
  const double head = lm_head_level_ > 0 ? BytesAtLevel(vocab, hidden, lm_head_level_)
                                         : 2.0 * static_cast<double>(vocab * hidden);
  const double kv = static_cast<double>(KvCache::BlockBytes(config, 1, dtype)) * options_.context;
  return linears + head + kv * (num_seqs_ + options_.decodes);
}

}  // namespace mobi
