// out[M, N] = act[M, K] @ weight[N, K].T (+ bias): INT4 weights, 2:4-sparse or dense, for Hopper (sm_90a).
//
// Axes:     the weight is operand A of wgmma, from registers: its rows (N, features) are the instruction's m64, the
//           tokens (M) its n, K its k32 (wgmma.sp, sparse) or k16 (wgmma, dense). Sums are fp32, [feature][token].
// Block:    BLOCK_N = 64 * WGS_N features x BLOCK_M tokens. WGS_N * WGS_K warpgroups multiply, one more warp copies.
//           A warpgroup owns 64 features x all tokens, and every WGS_K-th 64 columns of a chunk of BLOCK_K.
// Pipeline: STAGES buffers in shared memory. One thread fills them by the copy engine (copy_sm90.cuh): packed tiles as
//           they lie in memory, activations in panels of 64 columns with 128-byte swizzle. Barriers of a stage: its weights
//           are there; its tokens are; all warps have read both. Its cursor runs ahead across tiles (schedule.cuh).
// Products: of a unit (64 columns of a 2:4 weight, 32 of a dense one) a thread fetches its packed words, makes A fragments
//           of them, and starts wgmma; meanwhile it does the same for the next unit. With few tokens (kAhead) it
//           does so for a piece of a chunk at once, and the first piece does not wait for tokens.
// Launch:   the ring is filled with weights before the wait for the kernel before (programmatic dependent launch);
//           activations, workspace and output are touched after it. So weights must not be written by a kernel that lets
//           its successor start early.
// Sums:     in fp32 and in a fixed order (sums_sm90.cuh): over WGS_K through shared memory; over the blocks of a tile
//           through the shared memory of a cluster (CLUSTER > 1), or through the workspace (CLUSTER 0, where the blocks
//           of the grid share tiles evenly): the last block to arrive at a tile's ticket adds all parts, and leaves the
//           ticket 0. With CLUSTER 1 every tile is one block's.
#pragma once
#include "copy_sm90.cuh"
#include "sums_sm90.cuh"

namespace marlin {

// Shared-memory descriptor of a panel's k-step: rows of 128 bytes, swizzled, eight rows to 1024 bytes.
__device__ __forceinline__ u64 panel_descriptor(u32 smem) {
    return static_cast<u64>(64u | 1u << 30) << 32 | (smem / 16 + (1u << 16));
}

// A warpgroup that multiplies.
template <class T>
struct Multiplier {
    const Args90& args;
    u32 smem;
    char* smem_base;
    int thread, group_n, group_k;  // thread of the warpgroup

    __device__ __forceinline__ int lane() const { return thread % 32; }

    // A unit: the columns whose A fragments take eight registers. First as packed words, then as fragments.
    // Metadata goes straight to its fragments, since products read it as it is.
    struct Packed {
        u32 codes[2], scales[T::kUnitScales][1];
    };
    struct Fragments {
        u32 a[2][4], meta[1];
    };

    // first: whether the unit is the first of a chunk that this warpgroup multiplies.
    __device__ __forceinline__ void fetch(Packed& packed, u32 stage, int unit, bool first) const {
        const int tile = group_n * T::kTilesK + unit / T::kTileUnits, half = unit % T::kTileUnits;
        load_smem(packed.codes, stage + T::kCodeOffset + tile * T::kTileCodeBytes + (thread * T::kTileUnits + half) * 8);
        if (T::kChunkGroups == 1 && !first) return;
#pragma unroll
        for (int i = 0; i < T::kUnitScales; ++i) {
            const int group = (unit * T::kUnitColumns + i * 32) / T::kGroupSize % T::kChunkGroups;
            load_smem(packed.scales[i], stage + T::kScaleOffset + (group_n * T::kChunkGroups + group) * 128 +
                                            (thread / 32 * 8 + lane() / 4) * 4);
        }
    }

    __device__ __forceinline__ void fetch_meta(Fragments& frag, u32 stage, int unit) const {
        if constexpr (T::kSparse) {
            const int tile = group_n * T::kTilesK + unit / T::kTileUnits;
            load_smem(frag.meta, stage + T::kMetaOffset + tile * T::kTileMetaBytes + thread * 4);
        }
    }

    // first: the first unit of the chunk, whose scales serve the chunk where groups are as long.
    __device__ __forceinline__ void unpack(Fragments& frag, const Packed& packed, const Packed& first) const {
        const Packed& scaled = T::kChunkGroups == 1 ? first : packed;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            dequantize<T::kBf16>(frag.a[i], packed.codes[i], scaled.scales[T::kUnitScales == 1 ? 0 : i][0]);
        }
    }

    __device__ __forceinline__ void multiply(Sums90<T>& acc, const Fragments& frag, u32 stage, int unit, int panel_bytes) const {
        const u64 tokens = panel_descriptor(stage + unit / T::kTileUnits * panel_bytes + unit % T::kTileUnits * 64);
        if constexpr (T::kSparse) {
            wgmma_sp<0>(acc, frag.a[0], tokens, frag.meta[0]);
            wgmma_sp<1>(acc, frag.a[1], tokens + 4, frag.meta[0]);
        } else {
            wgmma(acc, frag.a[0], tokens);
            wgmma(acc, frag.a[1], tokens + 2);
        }
    }

    // Why opaque: places in memory that only this part needs are not kept through the main loop.
    __device__ __forceinline__ void finish(Sums90<T>& acc, int done) const {
        Segment at;
        at.seek(args.schedule, opaque(done));
        Finisher<T>{args, smem, smem_base, opaque(thread), opaque(group_n), opaque(group_k)}.finish(acc, at);
    }

    // This warpgroup's unit number i of a chunk.
    __device__ __forceinline__ int unit(int i) const {
        return (i / T::kTileUnits * T::WGS_K + group_k) * T::kTileUnits + i % T::kTileUnits;
    }

    __device__ __forceinline__ Copier<T> barriers() const { return {args, smem}; }

    // Where the ring stands, for what reads its stages in turn.
    struct Cursor {
        int stage = 0, parity = 0;
        __device__ __forceinline__ void step() {
            if (++stage == T::STAGES) stage = 0, parity ^= 1;
        }
        __device__ __forceinline__ int before() const { return stage == 0 ? T::STAGES - 1 : stage - 1; }
    };

    __device__ __forceinline__ void release(int stage) const {
        __syncwarp();
        if (lane() == 0) mbarrier_arrive(barriers().empty(stage));
    }

    // Fragments of a piece of a chunk.
    __device__ __forceinline__ void prepare(Fragments (&frag)[T::kPieceUnits], u32 stage, int piece) const {
        Packed packed[T::kPieceUnits];
#pragma unroll
        for (int i = 0; i < T::kPieceUnits; ++i) {
            fetch(packed[i], stage, unit(piece * T::kPieceUnits + i), i == 0);
            fetch_meta(frag[i], stage, unit(piece * T::kPieceUnits + i));
        }
#pragma unroll
        for (int i = 0; i < T::kPieceUnits; ++i) unpack(frag[i], packed[i], packed[0]);
    }

    __device__ __forceinline__ void start_products(Sums90<T>& acc, const Fragments (&frag)[T::kPieceUnits], u32 stage,
                                                   int piece, int panel_bytes) const {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < T::kPieceUnits; ++i) {
            multiply(acc, frag[i], stage, unit(piece * T::kPieceUnits + i), panel_bytes);
        }
        wgmma_commit();
        wgmma_wait<1>();  // products of the piece before
    }

    // The fragments of the next piece are made while products run, those of the first before there are tokens.
    __device__ __forceinline__ void multiply_ahead(Sums90<T>& acc, Cursor& at, int length, int panel_bytes) const {
        constexpr int kPieces = T::kChunkUnits / T::kPieceUnits;
        static_assert(kPieces % 2 == 0);
        Fragments frag[2][T::kPieceUnits];
        mbarrier_wait(barriers().weights(at.stage), at.parity);
        prepare(frag[0], smem + at.stage * T::kStageBytes, 0);
#pragma unroll 1
        for (int left = length; left > 0; --left) {
            const u32 buffer = smem + at.stage * T::kStageBytes;
            mbarrier_wait(barriers().tokens(at.stage), at.parity);
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                start_products(acc, frag[piece % 2], buffer, piece, panel_bytes);
                if (piece == 0 && left < length) release(at.before());
                if (piece + 1 < kPieces) prepare(frag[(piece + 1) % 2], buffer, piece + 1);
            }
            at.step();
            if (left > 1) {
                mbarrier_wait(barriers().weights(at.stage), at.parity);
                prepare(frag[0], smem + at.stage * T::kStageBytes, 0);
            }
        }
        wgmma_wait<0>();
        release(at.before());
    }

    // The fragments of the next unit are made while products run.
    __device__ __forceinline__ void multiply_in_turn(Sums90<T>& acc, Cursor& at, int length, int panel_bytes) const {
        constexpr int kUnits = T::kChunkUnits;
        static_assert(kUnits % 2 == 0);
        Packed packed;
        Fragments frag[2];
        mbarrier_wait(barriers().weights(at.stage), at.parity);
        fetch(packed, smem + at.stage * T::kStageBytes, unit(0), true);
#pragma unroll 1
        for (int left = length; left > 0; --left) {
            const u32 buffer = smem + at.stage * T::kStageBytes;
            const int current = at.stage, before = at.before();
            mbarrier_wait(barriers().tokens(at.stage), at.parity);
            at.step();
            fetch_meta(frag[0], buffer, unit(0));
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                unpack(frag[i % 2], packed, packed);
                wgmma_fence();
                multiply(acc, frag[i % 2], buffer, unit(i), panel_bytes);
                wgmma_commit();
                wgmma_wait<1>();  // products of the unit before, the last of the chunk before where i is 0
                if (!T::kDrain && i == 0 && left < length) release(before);
                if (i + 1 < kUnits) {
                    fetch(packed, buffer, unit(i + 1), false);
                    fetch_meta(frag[(i + 1) % 2], buffer, unit(i + 1));
                } else if (left > 1) {
                    mbarrier_wait(barriers().weights(at.stage), at.parity);
                    fetch(packed, smem + at.stage * T::kStageBytes, unit(0), true);
                }
            }
            if constexpr (T::kDrain) {
                wgmma_wait<0>();
                release(current);
            }
        }
        if constexpr (!T::kDrain) {
            wgmma_wait<0>();
            release(at.before());
        }
    }

    __device__ __forceinline__ void run() const {
        const Schedule& s = args.schedule;
        const int num_chunks = s.num_local_chunks();
        Cursor cursor;
        int done = 0;
        while (done < num_chunks) {
            Segment at;
            at.seek(s, done);
            const int length = at.chunk_end - at.chunk, panel_bytes = args.panel_rows(at.tile_m, T::BLOCK_M) * 128;
            Sums90<T> acc = {};
#pragma unroll
            for (int b = 0; b < T::kTokenBlocks; ++b) pin(acc[b]);
            if constexpr (T::kAhead) {
                multiply_ahead(acc, cursor, length, panel_bytes);
            } else {
                multiply_in_turn(acc, cursor, length, panel_bytes);
            }
            wait_for_previous_kernel();  // before the workspace and the output are written
            finish(acc, done);
            if (T::CLUSTER > 0) break;  // a block has one tile, or one part of a tile
            done += length;
        }
    }
};

template <class T>
__device__ __forceinline__ void w4a16_kernel_sm90(const Args90& args, char* smem_base) {
    const int tid = thread_index();
    const u32 smem = smem_address(smem_base);
    const Copier<T> copier{args, smem};
    if (tid == 0) {
        for (int stage = 0; stage < T::STAGES; ++stage) {
            mbarrier_init(copier.weights(stage), 1);
            mbarrier_init(copier.tokens(stage), 1);
            mbarrier_init(copier.empty(stage), T::kConsumers / 32);
        }
        if constexpr (T::kClusters) mbarrier_init(smem + T::kLastBarrierOffset, 1);
        fence_mbarrier_init();
        if constexpr (T::kClusters) {
            const int own = max(min(T::kTokenBlocks - cluster_rank() * T::kOwnBlocks, T::kOwnBlocks), 0);
            mbarrier_arrive_expect(smem + T::kLastBarrierOffset, (T::CLUSTER - 1) * own * T::WGS_N * 2048);
        }
    }
    if constexpr (T::kClusters) {
        sync_cluster();
    } else {
        __syncthreads();
    }
    let_next_kernel_start();
    if (tid >= T::kConsumers) {
        if constexpr (T::kLarge) give_registers<T::kCopyRegisters>();
        if (tid == T::kConsumers) copier.run();
    } else {
        if constexpr (T::kLarge) take_registers<T::kMultiplyRegisters>();
        // Why the exchange: the compiler then knows that all threads of a warp agree, and keeps what follows from it in
        // uniform registers, where wgmma takes its descriptors from.
        const int group = __shfl_sync(0xffffffffu, tid / 128, 0);
        Multiplier<T>{args, smem, smem_base, tid % 128, group % T::WGS_N, group / T::WGS_N}.run();
    }
}

}  // namespace marlin
