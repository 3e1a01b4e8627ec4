// One wrapper per PTX instruction that the sliced matmuls use and CUDA C++ does not spell. Device
// code only. Instructions of compute capability 9.0 are empty below it; the kernels that need them
// are not launched there. Source: PTX ISA 8.x.
#ifndef MOBI_KERNELS_CUDA_PTX_CUH_
#define MOBI_KERNELS_CUDA_PTX_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MOBI_SM90 1
#else
#define MOBI_SM90 0
#endif
// wgmma exists in code built for sm_90a only.
#if MOBI_SM90 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOBI_WGMMA 1
#else
#define MOBI_WGMMA 0
#endif

namespace mobi::cuda::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Kept in a register, where threadIdx.x % 32 would be read again and again.
__device__ __forceinline__ int LaneId() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// ---- Dependent launch.

__device__ __forceinline__ void LaunchDependents() {
#if MOBI_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void WaitForPrevious() {
#if MOBI_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Registers per thread, of whole warpgroups of a kernel whose launch bounds name one block or
// more. Multiples of 8; what some take others must have given.

template <int count>
__device__ __forceinline__ void GiveRegisters() {
#if MOBI_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

template <int count>
__device__ __forceinline__ void TakeRegisters() {
#if MOBI_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

// ---- Shared memory.

__device__ __forceinline__ void StoreZeros16(uint32_t shared) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(shared), "r"(0) : "memory");
}

// ---- Asynchronous copies from global to shared memory.

// 16 bytes past L1; the hint lets DRAM stream ahead within one tile row.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(shared), "l"(global)
               : "memory");
}

__device__ __forceinline__ void CopyAsync4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void CopyAsync8(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Returns when at most `pending` of this thread's latest groups are still under way.
template <int pending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- Tensor cores, one warp. Fragments, lane = 4 g + t: a = {(g, 2t..), (g + 8, 2t..),
// (g, 2t + 8..), (g + 8, 2t + 8..)}, b = {(k 2t.., n g), (k 2t + 8.., n g)},
// d = {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.

__device__ __forceinline__ void Mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = a b, without the cost of clearing d first.
__device__ __forceinline__ void MmaFromZero(float (&d)[4], const uint32_t* a, uint32_t b0,
                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// The same of bytes, unsigned by signed, with the sums in whole numbers: d = a b + c, every element
// of c is `from`. Fragments: a = {(g, 4t..), (g + 8, 4t..), (g, 4t + 16..), (g + 8, 4t + 16..)},
// b = {(k 4t.., n g), (k 4t + 16.., n g)}, d as above.
__device__ __forceinline__ void MmaBytesFrom(uint32_t from, uint32_t (&d)[4], const uint32_t* a,
                                             uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%10,%10,%10,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(from));
}

// d += a b.
__device__ __forceinline__ void MmaBytes(uint32_t (&d)[4], const uint32_t* a, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What computes a and b is executed before what follows, by all lanes that come here.
__device__ __forceinline__ void KeepBefore(float& a, float& b) {
  asm volatile("" : "+f"(a), "+f"(b));
}

// a is in its register before what follows.
__device__ __forceinline__ void KeepBefore(uint32_t& a) { asm volatile("" : "+r"(a)); }

// ---- Clusters of blocks.

__device__ __forceinline__ void ClusterArrive() {
#if MOBI_SM90
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// The same where nothing that was written before must be seen by the others.
__device__ __forceinline__ void ClusterArriveRelaxed() {
#if MOBI_SM90
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void ClusterWait() {
#if MOBI_SM90
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address of block `rank`'s copy of a shared variable.
__device__ __forceinline__ uint32_t MapToRank(uint32_t shared, uint32_t rank) {
  uint32_t address = shared;
#if MOBI_SM90
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
#endif
  return address;
}

// Stores that a barrier in the same block's shared memory counts as bytes that have arrived.
__device__ __forceinline__ void StoreClusterAsync(uint32_t address, float2 value,
                                                  uint32_t barrier) {
#if MOBI_SM90
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          address),
      "f"(value.x), "f"(value.y), "r"(barrier)
      : "memory");
#endif
}

__device__ __forceinline__ void StoreClusterAsync(uint32_t address, float value, uint32_t barrier) {
#if MOBI_SM90
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address),
      "f"(value), "r"(barrier)
      : "memory");
#endif
}

__device__ __forceinline__ void StoreClusterAsync(uint32_t address, float4 value,
                                                  uint32_t barrier) {
#if MOBI_SM90
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
      : "memory");
#endif
}

__device__ __forceinline__ float LoadCluster(uint32_t address) {
  float value = 0;
#if MOBI_SM90
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}

// ---- Barriers in shared memory (mbarrier), for threads that hand buffers to one another.

__device__ __forceinline__ void BarrierInit(uint32_t barrier, int arrivals) {
#if MOBI_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
#if MOBI_SM90
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// Arrives when this thread's copies so far have landed.
__device__ __forceinline__ void BarrierArriveAfterCopies(uint32_t barrier) {
#if MOBI_SM90
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// Returns when the phase of this parity is complete.
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
#if MOBI_SM90
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Arrives, and lets the phase wait for that many bytes of bulk copies too.
__device__ __forceinline__ void BarrierArriveExpecting(uint32_t barrier, uint32_t bytes) {
#if MOBI_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

// Makes initialized barriers known to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
#if MOBI_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// ---- Bulk copies: addresses and sizes are multiples of 16 bytes; one thread asks.

__device__ __forceinline__ void BulkCopy(uint32_t shared, const void* global, uint32_t bytes,
                                         uint32_t barrier) {
#if MOBI_SM90
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// A box of a matrix, which `map` (a CUtensorMap) describes; the first column and row.
__device__ __forceinline__ void BoxCopy(uint32_t shared, const void* map, int col, int row,
                                        uint32_t barrier) {
#if MOBI_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
#endif
}

__device__ __forceinline__ void PrefetchMap(const void* map) {
#if MOBI_SM90
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

__device__ __forceinline__ void BulkPrefetch(const void* global, uint32_t bytes) {
#if MOBI_SM90
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

// Makes ordinary writes to shared memory visible to wgmma.
__device__ __forceinline__ void FenceAsyncProxy() {
#if MOBI_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A barrier among `threads` threads of the block; id 1..15.
__device__ __forceinline__ void NamedBarrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Two 8 x 8 matrices of 16-bit elements, each stored transposed: lane l gives the address of row
// l % 8 of matrix l / 8 (l < 16); its register holds row l / 4, columns 2 (l % 4) and one more.
__device__ __forceinline__ void StoreMatricesTransposed(uint32_t shared, uint32_t m0, uint32_t m1) {
#if MOBI_SM90
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared),
               "r"(m0), "r"(m1)
               : "memory");
#endif
}

}  // namespace mobi::cuda::ptx

#endif  // MOBI_KERNELS_CUDA_PTX_CUH_
