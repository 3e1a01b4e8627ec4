#include <cmath>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {
namespace {

template <typename T, int kHeadDim>
cudaError_t LaunchBoth(const LaunchContext& context, const AttentionParams& params,
                       const AttentionBatch& batch, int64_t num_tokens) {
  if (params.separate_decode) {
    const cudaError_t error =
        LaunchDecodeAttention<T, kHeadDim>(context, params, batch.max_context_len);
    if (error != cudaSuccess || batch.max_query_len <= 1) return error;
  }
  return LaunchPrefillAttention<T, kHeadDim>(context, params, num_tokens);
}

}  // namespace

bool CanFuseRope(const AttentionShape& shape) {
  return shape.num_heads / shape.num_kv_heads <= kRowsPerWarp &&
         BoxRows(shape.block_size) >= kLeastBoxRows;
}

cudaError_t LaunchAttention(const LaunchContext& context, Tensor q, const KvLayer& kv,
                            const AttentionBatch& batch, const AttentionShape& shape,
                            const DecodeRope& rope, Tensor out, const PrefillImages& images) {
  AttentionParams params{};
  params.rope = rope;
  params.images = images;
  params.q = q.data, params.q_stride = q.stride;
  params.k = kv.k.data, params.k_stride = kv.k.stride;
  params.v = kv.v.data, params.v_stride = kv.v.stride;
  params.cache_rows = kv.k.rows;
  params.out = out.data, params.out_stride = out.stride;
  params.query_start = batch.query_start;
  params.context_len = batch.context_len;
  params.block_table = batch.block_table;
  params.block_table_stride = batch.block_table_stride;
  params.block_size = shape.block_size;
  params.box_rows = BoxRows(shape.block_size);
  params.num_seqs = batch.num_seqs;
  params.num_kv_heads = shape.num_kv_heads;
  params.group = shape.num_heads / shape.num_kv_heads;
  params.scale_log2 = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(shape.head_dim)));
  // A larger group does not fit the decode kernel's one mma tile, odd blocks have no boxes, and it
  // leaves no images; the prefill kernel takes any, so that it needs no other beside it for a step
  // of one prompt.
  const bool one_prompt = batch.num_seqs == 1 && batch.max_query_len > 1;
  params.separate_decode = CanFuseRope(shape) && !one_prompt && images.bytes == nullptr;
  return WithActivation(q.dtype, [&](auto element) {
    using T = decltype(element);
    switch (shape.head_dim) {
      case 32:
        return LaunchBoth<T, 32>(context, params, batch, q.rows);
      case 64:
        return LaunchBoth<T, 64>(context, params, batch, q.rows);
      case 128:
        return LaunchBoth<T, 128>(context, params, batch, q.rows);
      default:
        return cudaErrorInvalidValue;
    }
  });
}

}  // namespace mobi::cuda
