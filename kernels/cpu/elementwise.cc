#include "kernels/cpu/elementwise.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "kernels/numeric.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/dot-inl.h"
#include "kernels/cpu/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mobi::cpu {
namespace HWY_NAMESPACE {

using Floats = hn::Vec<FloatTag>;

void EmbedRow(Tensor table, int32_t id, float* HWY_RESTRICT out) {
  const FloatTag d;
  const auto cols = static_cast<size_t>(table.cols);
  const size_t whole = cols / kLanes * kLanes;
  if (table.dtype == DType::kF32) {
    std::copy_n(table.Row<float>(id), cols, out);
  } else if (table.dtype == DType::kF16) {
    const auto* row = table.Row<uint16_t>(id);
    for (size_t c = 0; c < whole; c += kLanes) {
      hn::StoreU(LoadWeights(reinterpret_cast<const hwy::float16_t*>(row + c)), d, out + c);
    }
    for (size_t c = whole; c < cols; ++c) out[c] = HalfToFloat(row[c]);
  } else {
    const auto* row = table.Row<uint16_t>(id);
    for (size_t c = 0; c < whole; c += kLanes) {
      hn::StoreU(LoadWeights(reinterpret_cast<const hwy::bfloat16_t*>(row + c)), d, out + c);
    }
    for (size_t c = whole; c < cols; ++c) out[c] = BFloat16ToFloat(row[c]);
  }
}

// Four chains of sums per lane, added pairwise.
float MeanSquareOf(const float* HWY_RESTRICT x, size_t cols) {
  const FloatTag d;
  Floats sum0 = hn::Zero(d), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  size_t c = 0;
  for (; c + 4 * kLanes <= cols; c += 4 * kLanes) {
    const Floats x0 = hn::LoadU(d, x + c), x1 = hn::LoadU(d, x + c + kLanes);
    const Floats x2 = hn::LoadU(d, x + c + 2 * kLanes), x3 = hn::LoadU(d, x + c + 3 * kLanes);
    sum0 = hn::MulAdd(x0, x0, sum0);
    sum1 = hn::MulAdd(x1, x1, sum1);
    sum2 = hn::MulAdd(x2, x2, sum2);
    sum3 = hn::MulAdd(x3, x3, sum3);
  }
  for (; c + kLanes <= cols; c += kLanes) {
    const Floats v = hn::LoadU(d, x + c);
    sum0 = hn::MulAdd(v, v, sum0);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3))));
  for (; c < cols; ++c) sum += x[c] * x[c];
  return sum / static_cast<float>(cols);
}

void NormRow(const float* HWY_RESTRICT x, const float* HWY_RESTRICT weight, size_t cols, float eps,
             float* HWY_RESTRICT out) {
  const FloatTag d;
  const float scale = 1.0f / std::sqrt(MeanSquareOf(x, cols) + eps);
  const Floats factor = hn::Set(d, scale);
  size_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    const Floats normed = hn::Mul(hn::LoadU(d, x + c), factor);
    hn::StoreU(hn::Mul(normed, hn::LoadU(d, weight + c)), d, out + c);
  }
  for (; c < cols; ++c) out[c] = x[c] * scale * weight[c];
}

void AddRow(const float* HWY_RESTRICT delta, size_t cols, float* HWY_RESTRICT residual) {
  const FloatTag d;
  size_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    hn::StoreU(hn::Add(hn::LoadU(d, residual + c), hn::LoadU(d, delta + c)), d, residual + c);
  }
  for (; c < cols; ++c) residual[c] += delta[c];
}

// Rotates the halves of one head by the angles of one position.
void RotateHead(const float* HWY_RESTRICT cos, const float* HWY_RESTRICT sin, size_t half,
                float* HWY_RESTRICT head) {
  const FloatTag d;
  size_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Floats a = hn::LoadU(d, head + i), b = hn::LoadU(d, head + half + i);
    const Floats c = hn::LoadU(d, cos + i), s = hn::LoadU(d, sin + i);
    hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, head + i);
    hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, head + half + i);
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = std::fma(-b, sin[i], a * cos[i]);
    head[half + i] = std::fma(a, sin[i], b * cos[i]);
  }
}

void SwiGluRow(const float* HWY_RESTRICT gate, const float* HWY_RESTRICT up, size_t cols,
               float* HWY_RESTRICT out) {
  const FloatTag d;
  size_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    hn::StoreU(hn::Mul(Silu(d, hn::LoadU(d, gate + c)), hn::LoadU(d, up + c)), d, out + c);
  }
  for (; c < cols; ++c) out[c] = gate[c] / (1.0f + std::exp(-gate[c])) * up[c];
}

}  // namespace HWY_NAMESPACE
}  // namespace mobi::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mobi::cpu {
namespace {

HWY_EXPORT(EmbedRow);
HWY_EXPORT(NormRow);
HWY_EXPORT(AddRow);
HWY_EXPORT(RotateHead);
HWY_EXPORT(SwiGluRow);
HWY_EXPORT(MeanSquareOf);

// Below so many elements a second thread costs more than it helps.
constexpr int64_t kGrain = 16384;

template <class Body>
void ForRows(ThreadPool& pool, int64_t rows, int64_t cols, const Body& body) {
  pool.RunRanges(rows, 1 + kGrain / cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

}  // namespace

void Embed(ThreadPool& pool, Tensor table, const int32_t* ids, Tensor out) {
  ForRows(pool, out.rows, out.cols, [&](int64_t i) {
    HWY_DYNAMIC_DISPATCH(EmbedRow)(table, ids[i], out.Row<float>(i));
  });
}

void RmsNorm(ThreadPool& pool, Tensor x, Tensor weight, float eps, Tensor out) {
  ForRows(pool, out.rows, out.cols, [&](int64_t i) {
    HWY_DYNAMIC_DISPATCH(NormRow)
    (x.Row<float>(i), weight.Row<float>(0), x.cols, eps, out.Row<float>(i));
  });
}

void AddRmsNorm(ThreadPool& pool, Tensor delta, Tensor weight, float eps, Tensor residual,
                Tensor out) {
  ForRows(pool, out.rows, out.cols, [&](int64_t i) {
    HWY_DYNAMIC_DISPATCH(AddRow)(delta.Row<float>(i), residual.cols, residual.Row<float>(i));
    HWY_DYNAMIC_DISPATCH(NormRow)
    (residual.Row<float>(i), weight.Row<float>(0), residual.cols, eps, out.Row<float>(i));
  });
}

void RopeAndWriteKv(ThreadPool& pool, Tensor qkv, const RopeTable& rope, const int32_t* positions,
                    const int32_t* slots, const AttentionShape& shape, KvLayer kv) {
  const int64_t q_cols = int64_t{shape.num_heads} * shape.head_dim;
  const int64_t kv_cols = int64_t{shape.num_kv_heads} * shape.head_dim;
  ForRows(pool, qkv.rows, qkv.cols, [&](int64_t i) {
    float* row = qkv.Row<float>(i);
    for (int head = 0; head < shape.num_heads + shape.num_kv_heads; ++head) {
      HWY_DYNAMIC_DISPATCH(RotateHead)
      (rope.cos.Row<float>(positions[i]), rope.sin.Row<float>(positions[i]), shape.head_dim / 2,
       row + int64_t{head} * shape.head_dim);
    }
    if (slots[i] < 0) return;
    std::copy_n(row + q_cols, kv_cols, kv.k.Row<float>(slots[i]));
    std::copy_n(row + q_cols + kv_cols, kv_cols, kv.v.Row<float>(slots[i]));
  });
}

void SwiGlu(ThreadPool& pool, Tensor gate_up, Tensor out) {
  ForRows(pool, out.rows, out.cols, [&](int64_t i) {
    const float* gate = gate_up.Row<float>(i);
    HWY_DYNAMIC_DISPATCH(SwiGluRow)(gate, gate + out.cols, out.cols, out.Row<float>(i));
  });
}

void GatherRows(ThreadPool& pool, Tensor x, const int32_t* rows, Tensor out) {
  ForRows(pool, out.rows, out.cols,
          [&](int64_t i) { std::copy_n(x.Row<float>(rows[i]), out.cols, out.Row<float>(i)); });
}

float MeanSquare(const float* x, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(MeanSquareOf)(x, count);
}

}  // namespace mobi::cpu
#endif  // HWY_ONCE
