#include "kernels/cpu/reference_ops.h"

#include <algorithm>
#include <cmath>

#include "kernels/numeric.h"

namespace mobi::reference {
namespace {

double Load(const Tensor& t, int64_t row, int64_t col) {
  switch (t.dtype) {
    case DType::kF32:
      return t.Row<float>(row)[col];
    case DType::kF16:
      return HalfToFloat(t.Row<uint16_t>(row)[col]);
    case DType::kBF16:
      return BFloat16ToFloat(t.Row<uint16_t>(row)[col]);
    case DType::kI32:
      return t.Row<int32_t>(row)[col];
    case DType::kU8:
      return t.Row<uint8_t>(row)[col];
  }
  return 0;
}

void Store(const Tensor& t, int64_t row, int64_t col, double value) {
  const auto rounded = static_cast<float>(value);
  switch (t.dtype) {
    case DType::kF32:
      t.Row<float>(row)[col] = rounded;
      break;
    case DType::kF16:
      t.Row<uint16_t>(row)[col] = FloatToHalf(rounded);
      break;
    case DType::kBF16:
      t.Row<uint16_t>(row)[col] = FloatToBFloat16(rounded);
      break;
    case DType::kI32:
      t.Row<int32_t>(row)[col] = static_cast<int32_t>(value);
      break;
    case DType::kU8:
      t.Row<uint8_t>(row)[col] = static_cast<uint8_t>(value);
      break;
  }
}

std::vector<double> LoadRow(const Tensor& t, int64_t row) {
  std::vector<double> values(t.cols);
  for (int64_t c = 0; c < t.cols; ++c) values[c] = Load(t, row, c);
  return values;
}

void StoreRow(const Tensor& t, int64_t row, const std::vector<double>& values) {
  for (int64_t c = 0; c < t.cols; ++c) Store(t, row, c, values[c]);
}

double Dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

double MeanSquare(const std::vector<double>& x) {
  return Dot(x.data(), x.data(), static_cast<int64_t>(x.size())) / static_cast<double>(x.size());
}

double Silu(double x) { return x / (1 + std::exp(-x)); }

}  // namespace

void Embed(Tensor table, const int32_t* ids, Tensor out) {
  for (int64_t i = 0; i < out.rows; ++i) StoreRow(out, i, LoadRow(table, ids[i]));
}

void RmsNorm(Tensor x, Tensor weight, float eps, Tensor out) {
  for (int64_t i = 0; i < out.rows; ++i) {
    std::vector<double> values = LoadRow(x, i);
    const double scale = 1 / std::sqrt(MeanSquare(values) + eps);
    for (int64_t c = 0; c < x.cols; ++c) values[c] *= scale * Load(weight, 0, c);
    StoreRow(out, i, values);
  }
}

void AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out) {
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t c = 0; c < residual.cols; ++c) {
      Store(residual, i, c, Load(residual, i, c) + Load(delta, i, c));
    }
  }
  RmsNorm(residual, weight, eps, out);
}

void DenseMatmul(Tensor x, Tensor weight, Tensor out) {
  std::vector<std::vector<double>> inputs;
  for (int64_t i = 0; i < out.rows; ++i) inputs.push_back(LoadRow(x, i));
  for (int64_t n = 0; n < weight.rows; ++n) {
    const std::vector<double> row = LoadRow(weight, n);
    for (int64_t i = 0; i < out.rows; ++i) {
      Store(out, i, n, Dot(row.data(), inputs[i].data(), x.cols));
    }
  }
}

void RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                    const int32_t* slots, const AttentionShape& shape, KvLayer kv) {
  const int half = shape.head_dim / 2;
  const int64_t k_begin = int64_t{shape.num_heads} * shape.head_dim;
  const int64_t kv_cols = int64_t{shape.num_kv_heads} * shape.head_dim;
  for (int64_t i = 0; i < qkv.rows; ++i) {
    for (int head = 0; head < shape.num_heads + shape.num_kv_heads; ++head) {
      for (int d = 0; d < half; ++d) {
        const int64_t low = int64_t{head} * shape.head_dim + d;
        const double a = Load(qkv, i, low), b = Load(qkv, i, low + half);
        const double cos = Load(rope.cos, positions[i], d), sin = Load(rope.sin, positions[i], d);
        Store(qkv, i, low, a * cos - b * sin);
        Store(qkv, i, low + half, b * cos + a * sin);
      }
    }
    if (slots[i] < 0) continue;
    for (int64_t c = 0; c < kv_cols; ++c) {
      Store(kv.k, slots[i], c, Load(qkv, i, k_begin + c));
      Store(kv.v, slots[i], c, Load(qkv, i, k_begin + kv_cols + c));
    }
  }
}

namespace {

// One query row of one head over the cache rows `rows`.
void AttendOne(Tensor q, int64_t token, int head, const KvLayer& kv,
               const std::vector<int64_t>& rows, const AttentionShape& shape, Tensor out) {
  const int64_t begin = int64_t{head} * shape.head_dim;
  const int kv_head = head / (shape.num_heads / shape.num_kv_heads);
  const int64_t kv_begin = int64_t{kv_head} * shape.head_dim;
  const double scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  std::vector<double> weights;
  for (const int64_t row : rows) {
    double score = 0;
    for (int d = 0; d < shape.head_dim; ++d) {
      score += Load(q, token, begin + d) * Load(kv.k, row, kv_begin + d);
    }
    weights.push_back(score * scale);
  }
  const double largest = *std::max_element(weights.begin(), weights.end());
  double sum = 0;
  for (double& weight : weights) sum += weight = std::exp(weight - largest);
  for (int d = 0; d < shape.head_dim; ++d) {
    double value = 0;
    for (size_t j = 0; j < rows.size(); ++j)
      value += weights[j] * Load(kv.v, rows[j], kv_begin + d);
    Store(out, token, begin + d, value / sum);
  }
}

}  // namespace

void Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
               const AttentionShape& shape, Tensor out) {
  for (int seq = 0; seq < batch.num_seqs; ++seq) {
    const int32_t* blocks = batch.block_table + int64_t{seq} * batch.block_table_stride;
    const int32_t begin = batch.query_start[seq], end = batch.query_start[seq + 1];
    std::vector<int64_t> rows;
    for (int32_t token = begin; token < end; ++token) {
      const int32_t visible = batch.context_len[seq] - (end - 1 - token);
      for (auto p = static_cast<int32_t>(rows.size()); p < visible; ++p) {
        rows.push_back(int64_t{blocks[p / shape.block_size]} * shape.block_size +
                       p % shape.block_size);
      }
      for (int head = 0; head < shape.num_heads; ++head) {
        AttendOne(q, token, head, kv, rows, shape, out);
      }
    }
  }
}

void SwiGlu(Tensor gate_up, Tensor out) {
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t c = 0; c < out.cols; ++c) {
      Store(out, i, c, Silu(Load(gate_up, i, c)) * Load(gate_up, i, out.cols + c));
    }
  }
}

void GatherRows(Tensor x, const int32_t* rows, Tensor out) {
  for (int64_t i = 0; i < out.rows; ++i) StoreRow(out, i, LoadRow(x, rows[i]));
}

void DequantizeRow(const SlicedWeight& weight, int64_t row, int level, double* values) {
  const int64_t groups = weight.cols / kGroupSize;
  const auto steps = static_cast<double>(1 << BitsOfLevel(level));
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t tile = (row / kTileRows) * groups + group;
    const uint16_t* pair = weight.scales[level - 1] + 2 * ScaleIndex(row, group, weight.cols);
    const double range = HalfToFloat(pair[0]), offset = HalfToFloat(pair[1]);
    for (int c = 0; c < kGroupSize; ++c) {
      const BitPosition at = PositionInTile(static_cast<int>(row % kTileRows), c);
      const int64_t byte = tile * kTileBytes + at.word * 4 + at.shift / 8;
      int code = 0;
      for (int s = 0; s < level; ++s) {
        code = code << kSliceBits | ((weight.slices[s][byte] >> (at.shift % 8)) & 3);
      }
      values[group * kGroupSize + c] = offset + range * (code + 0.5) / steps;
    }
  }
}

void SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                  int64_t levels_stride, Tensor out) {
  std::vector<std::vector<double>> inputs;
  for (int64_t i = 0; i < out.rows; ++i) inputs.push_back(LoadRow(x, i));
  std::vector<double> row_values(weight.cols);
  int segment = 0;
  for (int64_t row = 0; row < weight.rows; ++row) {
    if (row == weight.segment_end[segment]) ++segment;
    for (int level = 1; level <= kNumLevels; ++level) {
      bool dequantized = false;
      for (int64_t i = 0; i < out.rows; ++i) {
        if (levels[segment * levels_stride + i] != level) continue;
        if (!dequantized) DequantizeRow(weight, row, level, row_values.data());
        dequantized = true;
        Store(out, i, row, Dot(row_values.data(), inputs[i].data(), weight.cols));
      }
    }
  }
}

std::vector<std::vector<double>> RouterScores(Tensor x, const RoutedWeight& linear) {
  const Router& router = linear.router;
  const int num_scores = linear.weight.num_segments * kNumLevels;
  std::vector<std::vector<double>> scores;
  for (int64_t i = 0; i < x.rows; ++i) {
    const std::vector<double> input = LoadRow(x, i);
    const double log_rms = 0.5 * std::log(MeanSquare(input));
    std::vector<double> hidden(router.num_hidden);
    for (int h = 0; h < router.num_hidden; ++h) {
      const std::vector<double> w1 = LoadRow(router.w1, h);
      hidden[h] = Silu(Dot(w1.data(), input.data(), x.cols) + Load(router.b1, 0, h) +
                       Load(router.u, 0, h) * log_rms);
    }
    std::vector<double>& token = scores.emplace_back();
    for (int s = 0; s < num_scores; ++s) {
      double score = Load(router.b2, 0, s);
      for (int h = 0; h < router.num_hidden; ++h) score += Load(router.w2, s, h) * hidden[h];
      token.push_back(score);
    }
  }
  return scores;
}

namespace {

// The first of the levels in [lowest, highest] whose cost[level - 1] is least.
int Cheapest(const double* cost, int lowest, int highest) {
  int best = lowest;
  for (int level = lowest + 1; level <= highest; ++level) {
    if (cost[level - 1] < cost[best - 1]) best = level;
  }
  return best;
}

bool AllFinite(const double* losses) {
  return std::all_of(losses, losses + kNumLevels, [](double loss) { return std::isfinite(loss); });
}

// One segment of Route. losses[token] holds exp(score) of the segment's levels.
void RouteSegment(const std::vector<const double*>& losses, const float* bytes,
                  const RoutingBatch& batch, uint8_t* levels) {
  int pinned = 0;  // the highest level that is read whatever the others choose
  for (int i = 0; i < batch.num_tokens; ++i) {
    if (batch.min_level[i] == batch.max_level[i])
      pinned = std::max<int>(pinned, batch.max_level[i]);
  }
  double shared[kNumLevels];
  for (int k = 0; k < kNumLevels; ++k) {
    shared[k] = k < pinned ? 0.0 : bytes[k] - (pinned > 0 ? double{bytes[pinned - 1]} : 0.0);
  }
  for (int i = 0; i < batch.num_coherent; ++i) {
    if (batch.min_level[i] == batch.max_level[i] || !AllFinite(losses[i])) continue;
    for (int k = 0; k < kNumLevels; ++k) shared[k] += losses[i][k] / batch.price[i];
  }
  const int together = Cheapest(shared, 1, kNumLevels);
  for (int i = 0; i < batch.num_tokens; ++i) {
    const int lowest = batch.min_level[i], highest = batch.max_level[i];
    if (!AllFinite(losses[i])) {
      levels[i] = static_cast<uint8_t>(highest);
    } else if (i < batch.num_coherent) {
      levels[i] = static_cast<uint8_t>(std::clamp(together, lowest, highest));
    } else {
      double cost[kNumLevels];
      for (int k = 0; k < kNumLevels; ++k) {
        cost[k] = losses[i][k] + double{batch.price[i]} * bytes[k];
      }
      levels[i] = static_cast<uint8_t>(Cheapest(cost, lowest, highest));
    }
  }
}

}  // namespace

void Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch, uint8_t* levels,
           int64_t levels_stride) {
  const SlicedWeight& weight = linear.weight;
  std::vector<std::vector<double>> losses = RouterScores(x.FirstRows(batch.num_tokens), linear);
  for (std::vector<double>& token : losses) {
    for (double& value : token) value = std::exp(value);
  }
  for (int s = 0; s < weight.num_segments; ++s) {
    const int64_t rows = weight.segment_end[s] - (s > 0 ? weight.segment_end[s - 1] : 0);
    const int64_t tiles = rows / kTileRows * (weight.cols / kGroupSize);
    const float* bytes = linear.router.bytes[s].data();
    uint8_t* chosen = levels + s * levels_stride;
    std::vector<const double*> of_segment;
    of_segment.reserve(losses.size());
    for (const auto& token : losses) of_segment.push_back(&token[s * kNumLevels]);
    RouteSegment(of_segment, bytes, batch, chosen);
    int highest = 0;
    for (int i = 0; i < batch.num_tokens; ++i) {
      batch.level_tiles[i] += static_cast<uint32_t>(chosen[i] * tiles);
      highest = std::max<int>(highest, chosen[i]);
    }
    if (highest > 0) *batch.loaded_bytes += static_cast<uint64_t>(bytes[highest - 1]);
  }
}

}  // namespace mobi::reference
