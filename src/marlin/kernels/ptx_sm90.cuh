// One wrapper per PTX instruction that Hopper (sm_90a) adds. Those of the products, wgmma() and wgmma_sp(), list every
// register of a token tile: runtime/wgmma.py writes them for the tile of a variant.
#pragma once
#include "ptx.cuh"

namespace marlin {

// The host's description of a tensor for the copy engine: what cuTensorMapEncodeTiled fills.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// "mbarrier.init": a phase ends after `arrivals` arrivals and all expected bytes.
__device__ __forceinline__ void mbarrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// "fence.mbarrier_init": barriers are visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// "mbarrier.arrive"
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// "mbarrier.arrive.expect_tx": arrives, and lets the phase wait for `bytes` more.
__device__ __forceinline__ void mbarrier_arrive_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// "mbarrier.try_wait": returns when the phase of this parity has ended.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// "cp.async.bulk.tensor": one box of a tensor of three dimensions, innermost first, by the copy engine; zeros beyond the
// tensor. Its bytes count on the barrier.
__device__ __forceinline__ void tensor_copy(u32 smem, const TensorMap* map, int x, int y, int z, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(smem),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

// "prefetch.tensormap"
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// "barrier.cluster": of all threads of a cluster of blocks that have not ended. Orders no memory but that of barriers
// that were fenced.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// "Special registers: %cluster_ctarank"
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// "mapa": where a place in this block's shared memory lies in that of another block of the cluster.
__device__ __forceinline__ u32 in_block(u32 smem, int rank) {
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem), "r"(rank));
    return remote;
}

// "st.async": 16 bytes into the shared memory of another block, which count on a barrier there.
__device__ __forceinline__ void store_remote(u32 remote, const float (&value)[4], u32 remote_barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
        "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3]), "r"(remote_barrier)
        : "memory");
}

// "griddepcontrol.wait": kernels before this one in the stream have ended and what they wrote is visible.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// "griddepcontrol.launch_dependents": the next kernel may start once every block has said so.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// "bar.sync": a barrier of `threads` threads.
template <int kThreads>
__device__ __forceinline__ void sync_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// "wgmma.fence": registers written before it may be read by the products after it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// "wgmma.commit_group"
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// "wgmma.wait_group": all but the last kPending groups have ended.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// "setmaxnreg": the registers of each thread of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// No instruction: values are in registers here. Else zeros may be written to sums while products that add to them run, and
// the assembler then makes all products wait.
__device__ __forceinline__ void pin(float (&value)[4]) {
    asm volatile("" : "+f"(value[0]), "+f"(value[1]), "+f"(value[2]), "+f"(value[3]));
}

// "stmatrix": two 8x8 matrices of 16-bit values, transposed; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void stmatrix_x2_trans(u32 smem, u32 first, u32 second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(smem), "r"(first), "r"(second)
                 : "memory");
}

}  // namespace marlin
