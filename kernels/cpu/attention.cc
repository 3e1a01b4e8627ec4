#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/dot-inl.h"
#include "kernels/cpu/math-inl.h"

#ifndef MOBI_KERNELS_CPU_ATTENTION_CC_ONCE_
#define MOBI_KERNELS_CPU_ATTENTION_CC_ONCE_
namespace mobi::cpu {

constexpr int kTilePositions = 64;
constexpr int kQueryBlock = 16;  // tokens of one task
constexpr int kMaxBlockRows = 4;

// One KV head for some consecutive tokens of one sequence.
struct AttentionTask {
  Tensor q;
  KvLayer kv;
  AttentionShape shape;
  Tensor out;
  const int32_t* blocks;
  int kv_head;
  int64_t first_row;       // in q and out
  int num_tokens;          // at most kQueryBlock
  int32_t first_position;  // of the first token

  int heads_per_kv() const { return shape.num_heads / shape.num_kv_heads; }
};

// The state of online softmax: a row is one token and query head.
struct AttentionScratch {
  float* value;    // [rows, head_dim] weighted sum of v so far
  float* largest;  // [rows]
  float* total;    // [rows] sum of weights, relative to exp(largest)

  AttentionScratch(float* memory, int rows, int head_dim)
      : value(memory),
        largest(memory + static_cast<ptrdiff_t>(rows) * head_dim),
        total(largest + rows) {}
  static size_t Floats(int rows, int head_dim) {
    return static_cast<size_t>(rows) * (head_dim + 2);
  }
};

}  // namespace mobi::cpu
#endif  // MOBI_KERNELS_CPU_ATTENTION_CC_ONCE_

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

using Floats = hn::Vec<FloatTag>;

// Where the keys and values of positions [first, end) lie, for one KV head.
struct Tile {
  const float* k[kTilePositions];
  const float* v[kTilePositions];
  int count;

  Tile(const AttentionTask& task, int32_t first, int32_t end) : count(std::max(end - first, 0)) {
    const int64_t column = int64_t{task.kv_head} * task.shape.head_dim;
    for (int32_t p = first; p < end; ++p) {
      const int64_t row = int64_t{task.blocks[p / task.shape.block_size]} * task.shape.block_size +
                          p % task.shape.block_size;
      k[p - first] = task.kv.k.Row<float>(row) + column;
      v[p - first] = task.kv.v.Row<float>(row) + column;
    }
  }
};

// Rows that see the same positions and are worked on together.
template <int Rows>
struct RowBlock {
  const float* q[Rows];
  float* value[Rows];
  HWY_ALIGN float weight[Rows][kTilePositions];
};

// Asks for columns soon to be read: the rows of a head lie too far apart for the processor to
// foresee them. They are asked for one by one beside other work, for few can be on their way.
HWY_INLINE void PrefetchColumns(const float* row, size_t count) {
  constexpr size_t kLineFloats = 64 / sizeof(float);
  for (size_t c = 0; c < count; c += kLineFloats) hwy::Prefetch(row + c);
}

// weight[r][p] = q[r] . k[p] for the first `count` positions; what follows in the last vector is
// undefined. Meanwhile the values of the first `fetch` positions are asked for.
template <int Rows>
HWY_INLINE void Scores(const Tile& tile, int count, int fetch, size_t head_dim,
                       RowBlock<Rows>& block) {
  const FloatTag d;
  HWY_ALIGN float products[Rows][kLanes * kLanes];
  const size_t whole = head_dim / kLanes * kLanes;
  for (int first = 0; first < count; first += kLanes) {
    const int end = std::min<int>(count - first, kLanes);
    for (int i = 0; i < end; ++i) {
      if (first + i < fetch) PrefetchColumns(tile.v[first + i], head_dim);
      const float* HWY_RESTRICT k = tile.k[first + i];
      Floats sum[Rows];
      for (int r = 0; r < Rows; ++r) sum[r] = hn::Zero(d);
      for (size_t c = 0; c < whole; c += kLanes) {
        const Floats key = hn::LoadU(d, k + c);
        for (int r = 0; r < Rows; ++r) {
          sum[r] = hn::MulAdd(hn::LoadU(d, block.q[r] + c), key, sum[r]);
        }
      }
      for (int r = 0; r < Rows; ++r) hn::Store(sum[r], d, products[r] + i * kLanes);
    }
    for (int r = 0; r < Rows; ++r) {
      hn::Store(SumLanes<kLanes>(d, products[r]), d, block.weight[r] + first);
    }
  }
  for (size_t c = whole; c < head_dim; ++c) {  // a head that is not whole vectors
    for (int i = 0; i < count; ++i) {
      for (int r = 0; r < Rows; ++r) block.weight[r][i] += block.q[r][c] * tile.k[i][c];
    }
  }
}

// Turns scores into weights relative to the row's largest score so far and folds them into its
// state; returns by how much what was summed before must shrink.
HWY_INLINE float Softmax(float* HWY_RESTRICT weight, int count, float scale, float& largest,
                         float& total) {
  const FloatTag d;
  const Floats factor = hn::Set(d, scale);
  for (size_t i = count; i % kLanes != 0; ++i) {
    weight[i] = -std::numeric_limits<float>::infinity();
  }
  Floats most = hn::Set(d, largest);
  for (int i = 0; i < count; i += kLanes) {
    const Floats score = hn::Mul(hn::Load(d, weight + i), factor);
    hn::Store(score, d, weight + i);
    most = hn::Max(most, score);
  }
  const float before = largest;
  largest = hn::GetLane(hn::MaxOfLanes(d, most));
  const Floats shift = hn::Set(d, largest);
  Floats sum = hn::Zero(d);
  for (int i = 0; i < count; i += kLanes) {
    const Floats w = hn::Exp(d, hn::Sub(hn::Load(d, weight + i), shift));
    hn::Store(w, d, weight + i);
    sum = hn::Add(sum, w);
  }
  const float shrink = largest == before ? 1.0f : std::exp(before - largest);
  total = total * shrink + hn::GetLane(hn::SumOfLanes(d, sum));
  return shrink;
}

// value[r][columns] += sum over positions of weight[r][p] * v[p][columns], for Vectors vectors.
// Meanwhile these columns of the first `fetch` keys of the next tile are asked for.
template <int Rows, int Vectors>
HWY_INLINE void WeighColumns(const Tile& tile, int count, const Tile& next, int fetch,
                             size_t column, RowBlock<Rows>& block) {
  const FloatTag d;
  Floats sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Vectors; ++c) {
      sum[r][c] = hn::LoadU(d, block.value[r] + column + c * kLanes);
    }
  }
  for (int i = 0; i < count; ++i) {
    if (i < fetch) PrefetchColumns(next.k[i] + column, Vectors * kLanes);
    const float* HWY_RESTRICT v = tile.v[i] + column;
    Floats value[Vectors];
    for (int c = 0; c < Vectors; ++c) value[c] = hn::LoadU(d, v + c * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Floats w = hn::Set(d, block.weight[r][i]);
      for (int c = 0; c < Vectors; ++c) sum[r][c] = hn::MulAdd(w, value[c], sum[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Vectors; ++c) {
      hn::StoreU(sum[r][c], d, block.value[r] + column + c * kLanes);
    }
  }
}

template <int Rows>
HWY_INLINE void WeighValues(const Tile& tile, int count, const Tile& next, int fetch,
                            size_t head_dim, RowBlock<Rows>& block) {
  size_t c = 0;
  for (; c + 4 * kLanes <= head_dim; c += 4 * kLanes) {
    WeighColumns<Rows, 4>(tile, count, next, fetch, c, block);
  }
  for (; c + kLanes <= head_dim; c += kLanes) {
    WeighColumns<Rows, 1>(tile, count, next, fetch, c, block);
  }
  for (; c < head_dim; ++c) {
    for (int r = 0; r < Rows; ++r) {
      float sum = block.value[r][c];
      for (int i = 0; i < count; ++i) sum = std::fma(block.weight[r][i], tile.v[i][c], sum);
      block.value[r][c] = sum;
    }
  }
}

// Rows [first, first + Rows) of the task see the tile's first `count` positions. The task's first
// rows fetch for all.
template <int Rows>
HWY_NOINLINE void AttendBlock(const AttentionTask& task, const Tile& tile, int count,
                              const Tile& next, int first, const AttentionScratch& state) {
  const int head_dim = task.shape.head_dim, heads = task.heads_per_kv();
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  RowBlock<Rows> block;
  for (int r = 0; r < Rows; ++r) {
    const int row = first + r;
    block.q[r] = task.q.Row<float>(task.first_row + row / heads) +
                 int64_t{task.kv_head * heads + row % heads} * head_dim;
    block.value[r] = state.value + int64_t{row} * head_dim;
  }
  Scores(tile, count, first == 0 ? count : 0, head_dim, block);
  for (int r = 0; r < Rows; ++r) {
    const float shrink =
        Softmax(block.weight[r], count, scale, state.largest[first + r], state.total[first + r]);
    if (shrink == 1.0f) continue;
    for (int c = 0; c < head_dim; ++c) block.value[r][c] *= shrink;
  }
  WeighValues(tile, count, next, first == 0 ? next.count : 0, head_dim, block);
}

void RunAttention(const AttentionTask& task, float* memory) {
  const int heads = task.heads_per_kv(), rows = task.num_tokens * heads;
  const int head_dim = task.shape.head_dim;
  const AttentionScratch state(memory, rows, head_dim);
  std::fill_n(state.value, int64_t{rows} * head_dim, 0.0f);
  std::fill_n(state.largest, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.total, rows, 0.0f);
  const int32_t end = task.first_position + task.num_tokens;  // positions that the last token sees
  const auto tile_at = [&](int32_t start) {
    return Tile(task, start, std::min(start + kTilePositions, end));
  };
  Tile tile = tile_at(0), next = tile;
  for (int32_t start = 0; start < end; start += kTilePositions, tile = next) {
    next = tile_at(start + kTilePositions);
    const auto visible = [&](int row) {
      return std::min(kTilePositions, task.first_position + row / heads + 1 - start);
    };
    for (int row = 0; row < rows;) {
      const int count = visible(row);
      int block = 1;
      while (block < kMaxBlockRows && row + block < rows && visible(row + block) == count) ++block;
      if (count > 0) {
        if (block == 4) AttendBlock<4>(task, tile, count, next, row, state);
        if (block == 3) AttendBlock<3>(task, tile, count, next, row, state);
        if (block == 2) AttendBlock<2>(task, tile, count, next, row, state);
        if (block == 1) AttendBlock<1>(task, tile, count, next, row, state);
      }
      row += block;
    }
  }
  for (int row = 0; row < rows; ++row) {
    float* out = task.out.Row<float>(task.first_row + row / heads) +
                 int64_t{task.kv_head * heads + row % heads} * head_dim;
    const float inverse = 1.0f / state.total[row];
    for (int c = 0; c < head_dim; ++c) out[c] = state.value[row * head_dim + c] * inverse;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mobi::cpu {
namespace {

HWY_EXPORT(RunAttention);

int NumQueryBlocks(const AttentionBatch& batch, int seq) {
  const int tokens = batch.query_start[seq + 1] - batch.query_start[seq];
  return (tokens + kQueryBlock - 1) / kQueryBlock;
}

}  // namespace

void Attention(ThreadPool& pool, Workspace& workspace, Tensor q, const KvLayer& kv,
               const AttentionBatch& batch, const AttentionShape& shape, Tensor out) {
  const int rows =
      std::min(kQueryBlock, batch.max_query_len) * shape.num_heads / shape.num_kv_heads;
  workspace.ReservePerThread(AttentionScratch::Floats(rows, shape.head_dim));
  // first_block[s]: query blocks of the sequences before s.
  int32_t* first_block = workspace.indices(batch.num_seqs + 1);
  first_block[0] = 0;
  for (int s = 0; s < batch.num_seqs; ++s) {
    first_block[s + 1] = first_block[s] + NumQueryBlocks(batch, s);
  }
  const int num_blocks = first_block[batch.num_seqs];
  pool.Run(num_blocks * shape.num_kv_heads, [&](int task, int thread) {
    // The last blocks of a prompt see the most; they are handed out first.
    const int block = num_blocks - 1 - task / shape.num_kv_heads;
    const auto seq = static_cast<int>(
        std::upper_bound(first_block, first_block + batch.num_seqs + 1, block) - first_block - 1);
    const int begin = batch.query_start[seq] + (block - first_block[seq]) * kQueryBlock;
    const int end = batch.query_start[seq + 1];
    HWY_DYNAMIC_DISPATCH(RunAttention)
    ({.q = q,
      .kv = kv,
      .shape = shape,
      .out = out,
      .blocks = batch.block_table + int64_t{seq} * batch.block_table_stride,
      .kv_head = task % shape.num_kv_heads,
      .first_row = begin,
      .num_tokens = std::min(kQueryBlock, end - begin),
      .first_position = batch.context_len[seq] - (end - begin)},
     workspace.of_thread(thread));
  });
}

}  // namespace mobi::cpu
#endif  // HWY_ONCE
