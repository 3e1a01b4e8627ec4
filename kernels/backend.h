// The seam between the model and the machine: memory and the ops of one forward pass. One class per
// machine (kernels/cpu, kernels/cuda); the model is written once above it. A virtual call costs
// nanoseconds beside a kernel.
//
// Contract. One thread owns a Backend. Tensors and pointers given to ops lie in the backend's
// memory (Allocate) and must stay valid until Synchronize. Ops return at once and run in call
// order; a fault is sticky and is reported by Synchronize. Activations have activation_dtype();
// sums are fp32. Nothing is allocated by an op, so the first step costs what the thousandth does.
// Every op computes a token's result in an order that does not depend on the other tokens of the
// batch (batch invariance), on the CPU as on CUDA. One exception on CUDA: DenseMatmul of more than
// 64 tokens with 16-bit weights and results goes to cuBLAS (where there is one), whose order
// depends on their number. Inside a step, CUDA takes another kernel for the sliced matmuls of long
// prompts, which rounds their weights to 16 bits: see StepKey::num_short.
#ifndef MOBI_KERNELS_BACKEND_H_
#define MOBI_KERNELS_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/sliced_weight.h"
#include "kernels/tensor.h"

namespace mobi {

class Backend;

// A piece of a backend's memory, freed with the object. Aligned to 256 bytes, contents undefined.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Backend* backend, void* data, size_t size) : backend_(backend), data_(data), size_(size) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer() { Reset(); }

  void* data() const { return data_; }
  size_t size() const { return size_; }
  template <typename T>
  T* As() const {
    return static_cast<T*>(data_);
  }

 private:
  void Reset();

  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct MemoryInfo {
  size_t total = 0;
  size_t free = 0;
};

// How the tokens of a step are routed. Arrays have one entry per token of the step.
struct RoutingBatch {
  int num_tokens = 0;
  // The first `num_coherent` tokens (the decodes of a memory-bound step) share one level per
  // segment; the others choose for themselves. 0: token mode for all.
  int num_coherent = 0;
  const float* price = nullptr;        // loss per byte, > 0
  const uint8_t* min_level = nullptr;  // 1..4; equal to max_level: pinned
  const uint8_t* max_level = nullptr;
  // Added to by Route. Units: level x tiles of 16 x 128 weights, summed over linears.
  uint32_t* level_tiles = nullptr;
  uint64_t* loaded_bytes = nullptr;  // [1] bytes of weights that the step had to move
};

// The sequences of a step. Tokens of one sequence are consecutive rows.
struct AttentionBatch {
  int num_seqs = 0;
  int max_query_len = 0;  // upper bounds, for the choice of launch
  int max_context_len = 0;
  const int32_t* query_start = nullptr;  // [num_seqs + 1] first row of each sequence's tokens
  const int32_t* context_len = nullptr;  // [num_seqs] tokens in the cache, this step's included
  const int32_t* block_table = nullptr;  // [num_seqs, block_table_stride]
  int block_table_stride = 0;
};

struct AttentionShape {
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int block_size = 0;  // tokens in one KV block
};

// One layer of the paged KV cache; row = block * block_size + offset, columns as num_kv_heads x
// head_dim, in activation_dtype().
struct KvLayer {
  Tensor k;
  Tensor v;
};

// cos and sin of every position: [max_positions, head_dim / 2], fp32.
struct RopeTable {
  Tensor cos;
  Tensor sin;
};

// A change to one logit before sampling, computed by the engine from penalties and logit_bias:
// l' = (l > 0 ? l / repetition : l * repetition) + bias.
struct LogitEdit {
  int32_t token;
  float repetition;
  float bias;
};

// One row of logits to sample. Filters follow Hugging Face's processors: edits, temperature, top-k,
// top-p, min-p; then argmax over allowed tokens of log p + Gumbel(seed, counter, token), so that a
// draw depends on the request alone. temperature 0 is argmax (the lowest id of equals).
struct SamplingRow {
  int32_t logits_row;
  int32_t edit_begin;  // into the batch's edits
  int32_t edit_end;
  int32_t top_k;  // 0: off
  float temperature;
  float top_p;  // 1: off
  float min_p;  // 0: off
  float unused;
  uint64_t seed;
  uint64_t counter;  // position of the drawn token in its sequence
};

struct SamplingBatch {
  int num_rows = 0;
  const SamplingRow* rows = nullptr;
  const LogitEdit* edits = nullptr;
};

inline constexpr int32_t kNonFiniteLogits = -1;
inline constexpr int kMaxTopLogprobs = 20;

// token: the id drawn, or kNonFiniteLogits. logprob: of the unmodified logits' softmax.
struct Sampled {
  int32_t token;
  float logprob;
};

// The most likely tokens of one row, descending, ties by lower id.
struct TopLogprobs {
  int32_t tokens[kMaxTopLogprobs];
  float logprobs[kMaxTopLogprobs];
};

// Tokens from which a prompt counts as long (StepKey::num_short): where, on an H200, the kernel for
// long ones becomes the faster one for a prompt by itself.
inline constexpr int kLongPrompt = 65;

// What a captured step depends on; equal keys may replay (CUDA graphs).
struct StepKey {
  int num_tokens = 0;
  int num_seqs = 0;
  int num_logits = 0;
  int num_coherent = 0;
  // The first tokens, those of decodes and of prompts shorter than kLongPrompt; the others are of
  // long prompts. A backend may compute the two with kernels that round differently, for which side
  // a token is on depends on its request alone.
  int num_short = 0;
  // Not 0: the level of all tokens of long prompts in all sliced matmuls with 16-bit results. Route
  // may then leave out their levels and level_tiles, and RmsNorm, AddRmsNorm, SwiGlu and Attention
  // their rows of `out`, if the matmul that reads them follows at once.
  int long_level = 0;
  int max_context_len = 0;
  bool pinned = false;       // all tokens are: nothing is routed
  bool decode_only = false;  // one token per sequence: shapes repeat, so the step may be captured
  friend bool operator==(const StepKey&, const StepKey&) = default;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;    // "cpu", "cuda"
  virtual std::string description() const = 0;  // for a person: device, SIMD, threads
  virtual DType activation_dtype() const = 0;
  virtual MemoryInfo memory() const = 0;

  // RESOURCE_EXHAUSTED names `what`, the bytes asked and the bytes free.
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes, std::string_view what) = 0;

  // Addresses without memory behind them, aligned to page_bytes(), for what comes and goes while
  // others keep pointers to it, records of steps among them. UNIMPLEMENTED where the device or this
  // build cannot.
  virtual absl::StatusOr<Buffer> Reserve(size_t bytes, std::string_view what);
  // Puts zeroed memory behind [at, at + bytes) of a reservation, which has none: whole pages, for
  // ops that are enqueued from now on. RESOURCE_EXHAUSTED as Allocate says it changes nothing.
  virtual absl::Status Commit(void* at, size_t bytes, std::string_view what);
  // Takes back what one or several Commits gave, each of them whole. Waits for everything enqueued,
  // then the memory is free at once; until the next Commit nobody may read or write there.
  virtual void Decommit(void* at, size_t bytes);
  virtual size_t page_bytes() const { return 1; }

  // Host to device in call order with the ops; the host memory may be reused on return.
  virtual void Upload(const void* host, size_t bytes, void* device) = 0;
  // Upload may be called by several threads at once while no other method is.
  virtual bool concurrent_uploads() const { return false; }
  // Device to host; complete after Synchronize.
  virtual void Download(const void* device, size_t bytes, void* host) = 0;
  virtual void Zero(void* device, size_t bytes) = 0;
  // Waits for everything enqueued; INTERNAL once the device has failed.
  virtual absl::Status Synchronize() = 0;

  // How many rows a step of `num_decodes` one-token sequences is padded to, so that captured steps
  // are few. Padding rows have slot -1, context_len 0 and are pinned to a level that is read
  // anyway.
  virtual int PaddedDecodes(int num_decodes) const { return num_decodes; }
  // Runs `body`, a series of ops whose pointers are the same for equal keys. A backend may record
  // it and replay the record instead of calling it again.
  virtual void RunStep(const StepKey& key, absl::FunctionRef<void()> body) = 0;

  // out[i] = table[ids[i]]; table [vocab, hidden] in any float type.
  virtual void Embed(Tensor table, const int32_t* ids, Tensor out) = 0;
  // out = x / rms(x) * weight, rms over the columns, eps inside the root; weight [1, cols] fp32.
  virtual void RmsNorm(Tensor x, Tensor weight, float eps, Tensor out) = 0;
  // residual += delta; out = RmsNorm(residual).
  virtual void AddRmsNorm(Tensor delta, Tensor weight, float eps, Tensor residual, Tensor out) = 0;
  // Chooses levels[segment * levels_stride + token] in 1..4 for every token and segment:
  // the level that minimises exp(score) + price * bytes, within [min_level, max_level]. The first
  // num_coherent tokens choose together: over those not pinned, sum of exp(score) / price, plus
  // bytes, where levels that a pinned token of the batch reads anyway cost nothing.
  // x [num_tokens, cols] is the input that the linear sees.
  virtual void Route(Tensor x, const RoutedWeight& linear, const RoutingBatch& batch,
                     uint8_t* levels, int64_t levels_stride) = 0;
  // out[token, rows of segment] = W_level(token, segment) x[token]; out may be fp32: logits.
  // levels as Route leaves them; levels_stride 0: those of pinned tokens, which read the same in
  // all segments. They were there before the step.
  virtual void SlicedMatmul(Tensor x, const SlicedWeight& weight, const uint8_t* levels,
                            int64_t levels_stride, Tensor out) = 0;
  // out = x weight^T; weight [out_features, in_features] fp32, fp16 or bf16; out may be fp32.
  virtual void DenseMatmul(Tensor x, Tensor weight, Tensor out) = 0;
  // Rotates q and k of qkv [tokens, (heads + 2 kv_heads) head_dim] in place (halves convention of
  // Hugging Face's Llama) and writes k and v to rows slots[token] of the cache; -1 writes none.
  virtual void RopeAndWriteKv(Tensor qkv, const RopeTable& rope, const int32_t* positions,
                              const int32_t* slots, const AttentionShape& shape, KvLayer kv) = 0;
  // Causal attention of each sequence's last query_len tokens over its context.
  // q: the first heads * head_dim columns of qkv. out [tokens, heads * head_dim].
  virtual void Attention(Tensor q, const KvLayer& kv, const AttentionBatch& batch,
                         const AttentionShape& shape, Tensor out) = 0;
  // out = silu(gate) * up, gate_up [tokens, 2 intermediate] with gate first.
  virtual void SwiGlu(Tensor gate_up, Tensor out) = 0;
  // out[i] = x[rows[i]].
  virtual void GatherRows(Tensor x, const int32_t* rows, Tensor out) = 0;
  // logits are fp32 [n, vocab].
  virtual void Sample(Tensor logits, const SamplingBatch& batch, Sampled* out) = 0;
  // out[i] = log softmax(logits[i])[ids[i]]; ids[i] < 0 gives 0.
  virtual void TokenLogprobs(Tensor logits, const int32_t* ids, float* out) = 0;
  // out[i] = the most likely tokens of logits[rows[i]], `count` of them.
  virtual void MostLikely(Tensor logits, const int32_t* rows, int num_rows, int count,
                          TopLogprobs* out) = 0;

 private:
  friend class Buffer;
  virtual void Free(void* data) = 0;
};

struct CpuOptions {
  int num_threads = 0;     // 0: one per core that this process may use
  bool reference = false;  // plain scalar loops: the oracle of every other implementation
};
std::unique_ptr<Backend> CreateCpuBackend(const CpuOptions& options);

struct CudaOptions {
  int device = 0;
  DType activation_dtype = DType::kF16;
};
// UNAVAILABLE when this build has no CUDA or the machine no usable GPU, FAILED_PRECONDITION for a
// driver or architecture that this build cannot use.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaOptions& options);

}  // namespace mobi

#endif  // MOBI_KERNELS_BACKEND_H_
