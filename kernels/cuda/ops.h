// Launches of the CUDA ops, one per op of kernels/backend.h and with its meaning; CudaBackend
// checks shapes and types first and then calls these. Host code, one thread, asynchronous; the
// returned error is that of the launch. x has the activation type (fp16 or bf16) unless said
// otherwise.
#ifndef MOBI_KERNELS_CUDA_OPS_H_
#define MOBI_KERNELS_CUDA_OPS_H_

#include <cuda_runtime.h>

#include "kernels/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/prefill_image.h"

namespace mobi::cuda {

// Limits of the kernels, checked by CudaBackend.
inline constexpr int64_t kMaxNormColumns = 16384;
inline constexpr int kMaxRouterHidden = 64;
inline constexpr int kMaxFusedRouterHidden = 32;
// Up to how many tokens the router keeps prices and limits at hand, and may leave the choice of
// levels to the matmul; more are route_many.cu's.
inline constexpr int kFewRoutedTokens = 128;

// out[i] = table[ids[i]], any float types. Embed and GatherRows.
cudaError_t LaunchGather(const LaunchContext& context, Tensor table, const int32_t* ids,
                         Tensor out);
// images: where rows of out are left instead, if there are images; their columns are whole groups.
// delta.data null: RmsNorm of residual, which is then only read.
cudaError_t LaunchRmsNorm(const LaunchContext& context, Tensor residual, Tensor delta,
                          Tensor weight, float eps, Tensor out, const PrefillImages& images = {});
cudaError_t LaunchSwiGlu(const LaunchContext& context, Tensor gate_up, Tensor out,
                         const PrefillImages& images = {});
cudaError_t LaunchRope(const LaunchContext& context, Tensor qkv, const RopeTable& rope,
                       const int32_t* positions, const int32_t* slots, const AttentionShape& shape,
                       KvLayer kv);
// The rotation and the write of k and v of a decode step, done inside its attention. A token's k
// and v lie in its row of q, head_dim * heads and head_dim * (heads + kv heads) columns on.
struct DecodeRope {
  const float* cos = nullptr;  // null: the cache holds the step's tokens already
  const float* sin = nullptr;
  int64_t table_stride = 0;
  const int32_t* positions = nullptr;
  const int32_t* slots = nullptr;
};

// Rows of x, which are there, into the images; their columns are whole groups.
cudaError_t LaunchLeaveRows(const LaunchContext& context, Tensor x, const PrefillImages& images);
// rope: only where every sequence has one token, and its heads fit CanFuseRope. images: of all
// rows.
cudaError_t LaunchAttention(const LaunchContext& context, Tensor q, const KvLayer& kv,
                            const AttentionBatch& batch, const AttentionShape& shape,
                            const DecodeRope& rope, Tensor out, const PrefillImages& images = {});
bool CanFuseRope(const AttentionShape& shape);
// What the router's input x is made of: x itself, or the op before it, done in the same kernel.
enum class RouteInput : uint8_t {
  kPlain,
  kNorm,    // x = RmsNorm(source += delta); delta may be null
  kSwiGlu,  // x = silu(gate) * up of source
};
struct RouteSource {
  RouteInput input = RouteInput::kPlain;
  Tensor source;
  Tensor delta;
  Tensor norm_weight;
  float eps = 0;

  RouteSource Rows(int64_t begin, int64_t count) const {
    RouteSource some = *this;
    some.source = source.Rows(begin, count);
    if (delta.data != nullptr) some.delta = delta.Rows(begin, count);
    return some;
  }
};
// True if LaunchRoute can take this source other than kPlain, and LaunchRouteForMatmul any.
bool CanFuseRoute(const LaunchContext& context, const RouteSource& source, Tensor x,
                  const RoutedWeight& linear);
// others_level: that tokens of the step beyond the batch read in every segment, so that it is moved
// anyway; 0: there are none.
cudaError_t LaunchRoute(const LaunchContext& context, const RouteSource& source, Tensor x,
                        const RoutedWeight& linear, const RoutingBatch& batch, int others_level,
                        uint8_t* levels, int64_t levels_stride);
// Any float weight; out fp32 or the activation type. A result depends on its row of x alone.
cudaError_t LaunchDenseMatmul(const LaunchContext& context, Tensor x, Tensor weight, Tensor out);
cudaError_t LaunchSample(const LaunchContext& context, Tensor logits, const SamplingBatch& batch,
                         Sampled* out);
cudaError_t LaunchTokenLogprobs(const LaunchContext& context, Tensor logits, const int32_t* ids,
                                float* out);
cudaError_t LaunchMostLikely(const LaunchContext& context, Tensor logits, const int32_t* rows,
                             int num_rows, int count, TopLogprobs* out);

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_OPS_H_
