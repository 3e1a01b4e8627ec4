#include "kernels/cpu/dense_matmul.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/cache_control.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/dense_matmul.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/dot-inl.h"

#ifndef MOBI_KERNELS_CPU_DENSE_MATMUL_CC_ONCE_
#define MOBI_KERNELS_CPU_DENSE_MATMUL_CC_ONCE_
namespace mobi::cpu {

constexpr int kMaxDenseTokens = 256;  // in one pass
constexpr int64_t kDenseBlockRows = 16;
constexpr size_t kDenseChunk = 512;  // columns of a block of rows that stay in the first cache
constexpr size_t kDenseChunkStride = kDenseChunk + 16;
constexpr size_t kStreamChunk = 128;  // columns of four rows, asked for ahead at a time
// From so many tokens on, converting weights once pays for writing them out.
constexpr int kMinBlockedTokens = 5;

struct DenseJob {
  Tensor weight;
  std::array<const float*, kMaxDenseTokens> x;  // rows, zeros up to a multiple of the lanes
  int num_tokens;
  Tensor out;
};

}  // namespace mobi::cpu
#endif  // MOBI_KERNELS_CPU_DENSE_MATMUL_CC_ONCE_

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

static_assert(kBlockRows == kDenseBlockRows);

size_t DenseLanes() { return kLanes; }

size_t DenseScratchFloats(int num_tokens) {
  return kBlockRows * kDenseChunkStride + num_tokens * kSumsPerToken;
}

// The last columns of a row, fewer than a vector, followed by zeros.
template <class Weight>
struct Tail {
  HWY_ALIGN Weight values[kLanes];

  Tail() = default;
  Tail(const Weight* w, size_t count) {
    std::memset(values, 0, sizeof(values));
    std::memcpy(values, w, count * sizeof(Weight));
  }
};

// Asks for what lies as far behind four rows as they are long together: the next four, when rows
// are contiguous. The processor's own foresight ends with a page, which rows often are.
template <class Weight>
HWY_INLINE void PrefetchRowsAhead(const Weight* const* rows, size_t begin, size_t end) {
  const size_t ahead = 4 * static_cast<size_t>(rows[1] - rows[0]);
  for (size_t i = begin; i < end; i += 64 / sizeof(Weight)) {
    for (int r = 0; r < 4; ++r) hwy::Prefetch(rows[r] + i + ahead);
  }
}

// Four rows against a few tokens, straight from the weights.
template <class Weight>
HWY_INLINE void StreamRows(const DenseJob& job, const Weight* const* rows, float* sums) {
  const size_t cols = job.weight.cols, whole = cols / kLanes * kLanes;
  for (size_t begin = 0; begin < whole; begin += kStreamChunk) {
    const size_t end = std::min(begin + kStreamChunk, whole);
    const Weight* at[4] = {rows[0] + begin, rows[1] + begin, rows[2] + begin, rows[3] + begin};
    PrefetchRowsAhead(rows, begin, end);
    Dot4RowsTokens(at, job.x.data(), begin, job.num_tokens, end - begin, sums);
  }
  if (whole == cols) return;
  Tail<Weight> tails[4];
  const Weight* tail_rows[4];
  for (int r = 0; r < 4; ++r) {
    tails[r] = Tail<Weight>(rows[r] + whole, cols - whole);
    tail_rows[r] = tails[r].values;
  }
  Dot4RowsTokens(tail_rows, job.x.data(), whole, job.num_tokens, kLanes, sums);
}

// Columns [begin, begin + count) of one row as floats, zeros up to a multiple of the lanes.
template <class Weight>
HWY_INLINE void ConvertRow(const Weight* HWY_RESTRICT row, size_t count, float* HWY_RESTRICT to) {
  const FloatTag d;
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) hn::Store(LoadWeights(row + i), d, to + i);
  if (i < count) hn::Store(LoadWeights(Tail<Weight>(row + i, count - i).values), d, to + i);
}

// A block of rows against many tokens.
template <class Weight>
void MultiplyBlock(const DenseJob& job, const Weight* const* rows, float* scratch, float* sums) {
  const size_t cols = job.weight.cols;
  for (size_t begin = 0; begin < cols; begin += kDenseChunk) {
    const size_t count = std::min(kDenseChunk, cols - begin);
    for (size_t r = 0; r < kBlockRows; ++r) {
      ConvertRow(rows[r] + begin, count, scratch + r * kDenseChunkStride);
    }
    DotBlock(scratch, kDenseChunkStride, job.x.data(), begin, job.num_tokens,
             (count + kLanes - 1) / kLanes * kLanes, sums);
  }
}

// Blocks [begin, end) of kBlockRows rows; past the last row the last one stands in.
template <class Weight>
void MultiplyBlocks(const DenseJob& job, int64_t begin, int64_t end, float* scratch) {
  float* sums = scratch + kBlockRows * kDenseChunkStride;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * static_cast<int64_t>(kBlockRows);
    const Weight* rows[kBlockRows];
    for (size_t r = 0; r < kBlockRows; ++r) {
      rows[r] = reinterpret_cast<const Weight*>(job.weight.Row<std::byte>(0)) +
                std::min<int64_t>(first + r, job.weight.rows - 1) * job.weight.stride;
    }
    ZeroSums(sums, job.num_tokens);
    if (job.num_tokens < kMinBlockedTokens) {
      for (size_t r = 0; r < kBlockRows; r += 4) StreamRows(job, rows + r, sums + r * kLanes);
    } else {
      MultiplyBlock(job, rows, scratch, sums);
    }
    const auto count = std::min<int64_t>(kBlockRows, job.weight.rows - first);
    for (int t = 0; t < job.num_tokens; ++t) {
      HWY_ALIGN float out[kBlockRows];
      ReduceBlock(sums + t * kSumsPerToken, out);
      std::copy_n(out, count, job.out.Row<float>(t) + first);
    }
  }
}

void DenseBlocks(const DenseJob& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.weight.dtype) {
    case DType::kF16:
      return MultiplyBlocks<hwy::float16_t>(job, begin, end, scratch);
    case DType::kBF16:
      return MultiplyBlocks<hwy::bfloat16_t>(job, begin, end, scratch);
    default:
      return MultiplyBlocks<float>(job, begin, end, scratch);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mobi::cpu {
namespace {

HWY_EXPORT(DenseLanes);
HWY_EXPORT(DenseScratchFloats);
HWY_EXPORT(DenseBlocks);

}  // namespace

void DenseMatmul(ThreadPool& pool, Workspace& workspace, Tensor x, Tensor weight, Tensor out) {
  const auto lanes = static_cast<int64_t>(HWY_DYNAMIC_DISPATCH(DenseLanes)());
  const auto most = std::min<int64_t>(x.rows, kMaxDenseTokens);
  workspace.ReservePerThread(HWY_DYNAMIC_DISPATCH(DenseScratchFloats)(static_cast<int>(most)));
  // Inputs are copied where their rows do not end with a whole vector, or lie a power of two apart
  // and would fight for the same lines of the cache.
  const bool copied = x.cols % lanes != 0 || (x.rows >= kMinBlockedTokens && x.stride % 512 == 0);
  const int64_t stride = (x.cols + lanes - 1) / lanes * lanes + 16;
  float* inputs = copied ? workspace.inputs(most * stride) : nullptr;
  DenseJob job{.weight = weight, .x = {}, .num_tokens = 0, .out = {}};
  for (int64_t first = 0; first < x.rows; first += kMaxDenseTokens) {
    job.num_tokens = static_cast<int>(std::min<int64_t>(kMaxDenseTokens, x.rows - first));
    job.out = out.Rows(first, job.num_tokens);
    for (int t = 0; t < job.num_tokens; ++t) {
      job.x[t] = x.Row<float>(first + t);
      if (!copied) continue;
      float* to = inputs + t * stride;
      std::copy_n(job.x[t], x.cols, to);
      std::fill_n(to + x.cols, lanes, 0.0f);
      job.x[t] = to;
    }
    const int64_t blocks = (weight.rows + kDenseBlockRows - 1) / kDenseBlockRows;
    pool.RunRanges(blocks, 1 + 16384 / (kDenseBlockRows * x.cols * job.num_tokens),
                   [&](int64_t begin, int64_t end, int thread) {
                     HWY_DYNAMIC_DISPATCH(DenseBlocks)
                     (job, begin, end, workspace.of_thread(thread));
                   });
  }
}

}  // namespace mobi::cpu
#endif  // HWY_ONCE
