// Ops that the CUDA backend holds back until it sees what follows, which may take them along.
#ifndef MOBI_KERNELS_CUDA_PENDING_OPS_H_
#define MOBI_KERNELS_CUDA_PENDING_OPS_H_

#include "kernels/backend.h"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {

// A norm or SwiGLU, which makes x.
struct PendingInput {
  RouteSource source;
  Tensor x;

  cudaError_t Launch(const LaunchContext& context, const PrefillImages& images = {}) const {
    return source.input == RouteInput::kSwiGlu
               ? LaunchSwiGlu(context, source.source, x, images)
               : LaunchRmsNorm(context, source.source, source.delta, source.norm_weight, source.eps,
                               x, images);
  }
  PendingInput Rows(int64_t begin, int64_t count) const {
    return {source.Rows(begin, count), x.Rows(begin, count)};
  }
};

struct PendingRope {
  Tensor qkv;
  RopeTable rope;
  const int32_t* positions;
  const int32_t* slots;
  AttentionShape shape;
  KvLayer kv;

  cudaError_t Launch(const LaunchContext& context) const {
    return LaunchRope(context, qkv, rope, positions, slots, shape, kv);
  }
};

// Attention of prompts alone.
struct PendingAttention {
  Tensor q;
  KvLayer kv;
  AttentionBatch batch;
  AttentionShape shape;
  Tensor out;

  cudaError_t Launch(const LaunchContext& context, const PrefillImages& images = {}) const {
    return LaunchAttention(context, q, kv, batch, shape, {}, out, images);
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_PENDING_OPS_H_
