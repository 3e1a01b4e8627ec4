#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "backend_suite.h"
#include "kernels/cpu/reference_ops.h"

namespace mobi {
namespace {

struct Sequence {
  int query_len;
  int context_len;
};

// A paged cache of random values and the sequences of one step; blocks are dealt in random order.
struct Step {
  AttentionShape shape;
  Matrix q, k, v;
  std::vector<int32_t> query_start, context_len, block_table;
  int stride = 0, max_query_len = 0, max_context_len = 0;

  AttentionBatch Batch(const int32_t* query_start_data, const int32_t* context_len_data,
                       const int32_t* block_table_data) const {
    return {.num_seqs = static_cast<int>(context_len.size()),
            .max_query_len = max_query_len,
            .max_context_len = max_context_len,
            .query_start = query_start_data,
            .context_len = context_len_data,
            .block_table = block_table_data,
            .block_table_stride = stride};
  }
};

class BackendAttention : public BackendTest {
 protected:
  Step RandomStep(const AttentionShape& shape, const std::vector<Sequence>& sequences) {
    Step step;
    step.shape = shape;
    int tokens = 0, blocks = 0;
    step.query_start = {0};
    for (const Sequence& sequence : sequences) {
      step.query_start.push_back(tokens += sequence.query_len);
      step.context_len.push_back(sequence.context_len);
      step.max_query_len = std::max(step.max_query_len, sequence.query_len);
      step.max_context_len = std::max(step.max_context_len, sequence.context_len);
      blocks += BlocksOf(sequence, shape);
    }
    step.stride = (step.max_context_len + shape.block_size - 1) / shape.block_size + 1;
    step.block_table.assign(sequences.size() * step.stride, -1);
    std::vector<int32_t> free(blocks + 3);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), random_);
    // Slots that belong to no token stay poisoned: a kernel that lets them in shows NaN.
    const int64_t kv_cols = int64_t{shape.num_kv_heads} * shape.head_dim;
    step.k = Matrix::Poisoned(activations(), int64_t(free.size()) * shape.block_size, kv_cols);
    step.v = Matrix::Poisoned(activations(), step.k.rows, kv_cols);
    for (size_t s = 0; s < sequences.size(); ++s) {
      for (int b = 0; b < BlocksOf(sequences[s], shape); ++b) {
        step.block_table[s * step.stride + b] = free.back();
        free.pop_back();
      }
      for (int p = 0; p < sequences[s].context_len; ++p) {
        const int64_t row =
            int64_t{step.block_table[s * step.stride + p / shape.block_size]} * shape.block_size +
            p % shape.block_size;
        FillRow(step.k, row, 2);
        FillRow(step.v, row, 1);
      }
    }
    const int64_t q_cols = int64_t{shape.num_heads} * shape.head_dim;
    step.q = Normal(activations(), tokens, q_cols, 1, q_cols + 2 * kv_cols);
    return step;
  }

  static int BlocksOf(const Sequence& sequence, const AttentionShape& shape) {
    return (sequence.context_len + shape.block_size - 1) / shape.block_size;
  }

  void FillRow(Matrix& matrix, int64_t row, float deviation) {
    std::normal_distribution<float> normal(0, deviation);
    for (int64_t c = 0; c < matrix.cols; ++c) matrix.set(row, c, normal(random_));
  }

  Matrix Run(const Step& step) {
    const Tensor out = OnDevice(Matrix::Poisoned(activations(), step.q.rows, step.q.cols));
    backend().Attention(OnDevice(step.q), {OnDevice(step.k), OnDevice(step.v)},
                        step.Batch(OnDevice(step.query_start), OnDevice(step.context_len),
                                   OnDevice(step.block_table)),
                        step.shape, out);
    return ToHost(out);
  }

  void ExpectReference(const Step& step, const std::string& what, Op op = Op::kAttention) {
    const Matrix expected = Matrix::Poisoned(DType::kF32, step.q.rows, step.q.cols);
    reference::Attention(
        step.q.view(), {step.k.view(), step.v.view()},
        step.Batch(step.query_start.data(), step.context_len.data(), step.block_table.data()),
        step.shape, expected.view());
    ExpectClose(Run(step), expected, ToleranceOf(op, activations()), what);
  }
};

constexpr AttentionShape kShapes[] = {
    {.num_heads = 4, .num_kv_heads = 2, .head_dim = 64, .block_size = 16},
    {.num_heads = 8, .num_kv_heads = 1, .head_dim = 64, .block_size = 32},
    {.num_heads = 3, .num_kv_heads = 3, .head_dim = 128, .block_size = 16},
    {.num_heads = 8, .num_kv_heads = 2, .head_dim = 128, .block_size = 8},
    {.num_heads = 2, .num_kv_heads = 1, .head_dim = 32, .block_size = 64},
    {.num_heads = 4, .num_kv_heads = 2, .head_dim = 64, .block_size = 12},
};

std::string Describe(const AttentionShape& shape) {
  return std::to_string(shape.num_heads) + "/" + std::to_string(shape.num_kv_heads) + " heads of " +
         std::to_string(shape.head_dim) + ", blocks of " + std::to_string(shape.block_size);
}

TEST_P(BackendAttention, DecodeEqualsReference) {
  for (const AttentionShape& shape : kShapes) {
    std::vector<Sequence> sequences = {{1, 1}, {1, shape.block_size}, {1, shape.block_size + 1}};
    for (int i = 0; i < 4; ++i) sequences.push_back({1, Uniform(1, 300)});
    sequences.push_back({1, 1100});
    ExpectReference(RandomStep(shape, sequences), Describe(shape));
  }
}

TEST_P(BackendAttention, PrefillEqualsReference) {
  for (const AttentionShape& shape : kShapes) {
    const int chunk = Uniform(2, 60);
    ExpectReference(RandomStep(shape, {{1, 1},
                                       {7, 7},
                                       {chunk, chunk},
                                       {129, 129},
                                       {chunk, chunk + Uniform(1, 200)},
                                       {chunk, 700},
                                       {1, 77}}),
                    Describe(shape));
  }
}

// Attention and the matmul of its output in a step whose prompts are known to read one level, and
// where it is not known: the same bits.
TEST_P(BackendAttention, ThenMatmulOfLongPromptsAtOneLevel) {
  std::vector<AttentionShape> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.push_back({.num_heads = 8, .num_kv_heads = 2, .head_dim = 32, .block_size = 16});
  for (const AttentionShape& shape : shapes) {
    const int64_t cols = int64_t{shape.num_heads} * shape.head_dim;
    if (cols % kGroupSize != 0) continue;
    const std::vector<std::vector<Sequence>> steps = {{{Uniform(2, 300), 300}},
                                                      {{7, 7}, {1, 77}, {129, 300}}};
    for (const std::vector<Sequence>& sequences : steps) {
      const Step step = RandomStep(shape, sequences);
      const auto tokens = static_cast<int>(step.q.rows);
      const SlicedWeight weight = OnDevice(RandomWeight({96}, cols));
      const int level = Uniform(1, kNumLevels);
      const uint8_t* levels = OnDevice(std::vector<uint8_t>(tokens, static_cast<uint8_t>(level)));
      const Tensor q = OnDevice(step.q);
      const KvLayer kv{OnDevice(step.k), OnDevice(step.v)};
      const AttentionBatch batch = step.Batch(
          OnDevice(step.query_start), OnDevice(step.context_len), OnDevice(step.block_table));
      std::vector<Matrix> results;
      for (const int known : {0, level}) {
        const Tensor x = OnDevice(Matrix::Poisoned(activations(), tokens, cols));
        const Tensor out = OnDevice(Matrix::Poisoned(activations(), tokens, weight.rows));
        const StepKey key{.num_tokens = tokens,
                          .num_seqs = static_cast<int>(sequences.size()),
                          .long_level = known};
        backend().RunStep(key, [&] {
          backend().Attention(q, kv, batch, shape, x);
          backend().SlicedMatmul(x, weight, levels, 0, out);
        });
        results.push_back(ToHost(out));
      }
      ExpectSame(results[1], results[0], Describe(shape));
    }
  }
}

TEST_P(BackendAttention, LargeScoresDoNotOverflow) {
  Step step = RandomStep(kShapes[0], {{5, 90}});
  for (int64_t r = 0; r < step.q.rows; ++r) {
    for (int64_t c = 0; c < step.q.cols; ++c) step.q.set(r, c, 20 * step.q.at(r, c));
  }
  ExpectReference(step, "scores in the hundreds", Op::kLargeScores);
}

// The same bits for a sequence alone and in company, and for a prompt in one piece or in chunks.
TEST_P(BackendAttention, IsBatchInvariant) {
  for (const AttentionShape& shape : {kShapes[0], kShapes[3]}) {
    const Step step =
        RandomStep(shape, {{1, 350}, {40, 40}, {1, 3}, {33, 170}, {20, 650}, {1, 65}});
    const Matrix together = Run(step);
    for (size_t s = 0; s < step.context_len.size(); ++s) {
      const int begin = step.query_start[s], count = step.query_start[s + 1] - begin;
      for (int piece = 1; piece <= count; piece = piece * 3 + 1) {
        for (int from = 0; from < count; from += piece) {
          const int len = std::min(piece, count - from);
          Step alone = step;
          alone.query_start = {0, len};
          alone.context_len = {step.context_len[s] - (count - from - len)};
          alone.block_table.assign(step.block_table.begin() + s * step.stride,
                                   step.block_table.begin() + (s + 1) * step.stride);
          alone.max_query_len = len;
          alone.max_context_len = alone.context_len[0];
          alone.q = Matrix::Poisoned(step.q.dtype, len, step.q.cols);
          Matrix expected = alone.q;
          for (int i = 0; i < len; ++i) {
            for (int64_t c = 0; c < step.q.cols; ++c) {
              alone.q.set(i, c, step.q.at(begin + from + i, c));
              expected.set(i, c, together.at(begin + from + i, c));
            }
          }
          ExpectSame(Run(alone), expected,
                     "sequence " + std::to_string(s) + ", tokens from " + std::to_string(from));
        }
      }
    }
  }
}

// The same bits wherever a backend lets the parts of a context meet, which may depend on how long
// contexts can become and on how many sequences there are.
TEST_P(BackendAttention, DecodeDoesNotDependOnLimits) {
  for (const AttentionShape& shape : {kShapes[0], kShapes[2], kShapes[4]}) {
    Step step = RandomStep(shape, {{1, 700}});
    const Matrix expected = Run(step);
    for (const int max_context_len : {701, 5000, 1 << 18}) {
      step.max_context_len = max_context_len;
      ExpectSame(Run(step), expected,
                 Describe(shape) + ", up to " + std::to_string(max_context_len));
    }
    constexpr int kMany = 500;
    Step many = step;
    many.max_context_len = 700;
    many.q = Matrix::Poisoned(step.q.dtype, kMany, step.q.cols);
    Matrix same = many.q;
    many.query_start.resize(kMany + 1);
    std::iota(many.query_start.begin(), many.query_start.end(), 0);
    many.context_len.assign(kMany, 700);
    many.block_table.clear();
    for (int i = 0; i < kMany; ++i) {
      many.block_table.insert(many.block_table.end(), step.block_table.begin(),
                              step.block_table.end());
      for (int64_t c = 0; c < step.q.cols; ++c) {
        many.q.set(i, c, step.q.at(0, c));
        same.set(i, c, expected.at(0, c));
      }
    }
    ExpectSame(Run(many), same, Describe(shape) + ", many sequences");
  }
}

TEST_P(BackendAttention, RopeAndWriteKvEqualsReference) {
  for (const AttentionShape& shape : kShapes) {
    const int tokens = Uniform(1, 40), max_positions = 500;
    const int64_t q_cols = int64_t{shape.num_heads} * shape.head_dim;
    const int64_t kv_cols = int64_t{shape.num_kv_heads} * shape.head_dim;
    const int64_t slots = 64;
    Matrix cos = Matrix::Poisoned(DType::kF32, max_positions, shape.head_dim / 2), sin = cos;
    for (int64_t p = 0; p < max_positions; ++p) {
      for (int64_t d = 0; d < cos.cols; ++d) {
        const double angle =
            static_cast<double>(p) *
            std::pow(10000.0, -static_cast<double>(d) / static_cast<double>(cos.cols));
        cos.set(p, d, static_cast<float>(std::cos(angle)));
        sin.set(p, d, static_cast<float>(std::sin(angle)));
      }
    }
    std::vector<int32_t> positions(tokens), slot_of(slots);
    for (int32_t& position : positions) position = Uniform(0, max_positions - 1);
    std::iota(slot_of.begin(), slot_of.end(), 0);
    std::shuffle(slot_of.begin(), slot_of.end(), random_);
    slot_of.resize(tokens);
    slot_of[tokens / 2] = -1;

    const Matrix qkv = Normal(activations(), tokens, q_cols + 2 * kv_cols);
    Matrix k = Normal(activations(), slots, kv_cols), v = Normal(activations(), slots, kv_cols);
    const Tensor qkv_device = OnDevice(qkv), k_device = OnDevice(k), v_device = OnDevice(v);
    backend().RopeAndWriteKv(qkv_device, {OnDevice(cos), OnDevice(sin)}, OnDevice(positions),
                             OnDevice(slot_of), shape, {k_device, v_device});

    const Matrix expected = qkv.As(DType::kF32), k_expected = k.As(DType::kF32),
                 v_expected = v.As(DType::kF32);
    reference::RopeAndWriteKv(expected.view(), {cos.view(), sin.view()}, positions.data(),
                              slot_of.data(), shape, {k_expected.view(), v_expected.view()});
    const Tolerance tolerance = ToleranceOf(Op::kElementwise, activations());
    ExpectClose(ToHost(qkv_device), expected, tolerance, Describe(shape) + " qkv");
    ExpectClose(ToHost(k_device), k_expected, tolerance, Describe(shape) + " k");
    ExpectSame(ToHost(v_device), v_expected.As(activations()), Describe(shape) + " v");
  }
}

MOBI_BACKEND_SUITE(BackendAttention);

}  // namespace
}  // namespace mobi
