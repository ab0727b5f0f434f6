// out[M, N] = act[M, K] @ weight[N, K].T (+ bias): INT4 weights, 2:4-sparse or dense, for compute capability 8.0 on.
//
// Axes:     the weight is operand A of the tensor core: its rows (N, features) are the instruction's m16, the tokens
//           (M) its n8, K its k32 (mma.sp, sparse) or k16 (mma, dense). Accumulators are fp32, [feature][token].
// Block:    BLOCK_N features x BLOCK_M tokens; WARPS_N x WARPS_M x WARPS_K warps. A warp owns kFragsN fragments of
//           16 features, kFragsM of 8 tokens, and every WARPS_K-th 64 columns of a chunk of BLOCK_K.
// Pipeline: STAGES buffers filled by cp.async, one commit group a chunk, one __syncthreads a chunk; the producer's
//           cursor runs STAGES - 1 chunks ahead, across tiles (schedule.cuh). Tiles of many tokens: pipelined.cuh.
// Stage:    act [BLOCK_M][BLOCK_K] 16-bit, 16-byte pieces swizzled by row % 8; then packed tiles as they lie in
//           memory (layout drawn in formats/layouts/fragment.py): codes, metadata, scales.
// Sums:     over WARPS_K by a reduce-scatter through shared memory, over blocks of a split tile through the
//           workspace, in fp32 and in a fixed order: the last block to arrive at a tile's ticket adds all parts.
//           It leaves the ticket 0, so no launch has to clear anything.
#pragma once
#include "dequant.cuh"
#include "pipelined.cuh"
#include "sums.cuh"
#include "tile.cuh"

namespace marlin {

template <class T>
__device__ __forceinline__ void load_activations(const Args& args, const Segment& at, u32 stage, int tid) {
    constexpr int kPieces = T::BLOCK_K / 8, kRowsPerPass = T::kThreads / kPieces;
    static_assert(T::kThreads % kPieces == 0);
    const int piece = tid % kPieces, first_row = tid / kPieces, column = at.chunk * T::BLOCK_K + piece * 8;
    // Why: tokens and columns beyond the end become zeros (cp.async reads nothing for them): no traffic, no products.
    const int rows = column < args.k ? args.m - at.tile_m * T::BLOCK_M - first_row : 0;
    const u64 stride = static_cast<u32>(args.act_stride);
    const u16* gmem = args.act + static_cast<u32>(at.tile_m * T::BLOCK_M + first_row) * stride + column;
    const u32 smem = stage + first_row * T::kActRowBytes;
#pragma unroll
    for (int row = 0; row < T::BLOCK_M; row += kRowsPerPass, gmem += kRowsPerPass * stride) {
        if (T::BLOCK_M % kRowsPerPass == 0 || row + first_row < T::BLOCK_M) {
            cp_async_16(smem + row * T::kActRowBytes + (piece ^ ((row + first_row) % 8)) * 16, gmem, row < rows ? 16 : 0);
        }
    }
}

// Copies one packed tensor's part of a chunk: kTilesN rows of kUnits units of kUnitBytes, units beyond the last one
// and rows beyond `last_row` repeated (their products meet zero activations or are never stored).
template <class T, int kUnits, int kUnitBytes>
__device__ __forceinline__ void load_packed(const void* gmem, u32 smem, int tid, int row, int last_row, int unit, int num_units) {
    constexpr int kPieces = kUnits * kUnitBytes / 16, kTotal = T::kTilesN * kPieces;
#pragma unroll
    for (int i0 = 0; i0 < kTotal; i0 += T::kThreads) {
        const int i = i0 + tid, r = i / kPieces, u = i % kPieces / (kUnitBytes / 16), piece = i % (kUnitBytes / 16);
        if (kTotal % T::kThreads == 0 || i < kTotal) {
            const u32 index = min(row + r, last_row) * num_units + min(unit + u, num_units - 1);
            cp_async_16(smem + i * 16, static_cast<const char*>(gmem) + piece * 16 + static_cast<u64>(index) * kUnitBytes);
        }
    }
}

template <class T>
__device__ __forceinline__ void load_stage(const Args& args, const Segment& at, u32 stage, int tid) {
    const int row = at.tile_n * T::kTilesN, last_row = ceil_div(args.n, 64) - 1;
    const int tile_k = at.chunk * T::kTilesK, tiles_k = ceil_div(args.k, 64);
    load_packed<T, T::kTilesK, T::kTileCodeBytes>(args.codes, stage + T::kCodeOffset, tid, row, last_row, tile_k, tiles_k);
    if constexpr (T::kSparse) {
        load_packed<T, T::kTilesK, T::kTileMetaBytes>(args.meta, stage + T::kMetaOffset, tid, row, last_row, tile_k, tiles_k);
    }
    const int group = at.chunk * T::BLOCK_K / T::kGroupSize, groups = max(args.k / T::kGroupSize, 1);
    load_packed<T, T::kChunkGroups, 128>(args.scales, stage + T::kScaleOffset, tid, row, last_row, group, groups);
    load_activations<T>(args, at, stage, tid);
}

// The weights of one 64 x 64 tile column of a warp: packed words as they lie in shared memory.
template <class T>
struct PackedTile {
    // Codes are fetched as they are needed where registers are few: two k-steps' words at a time.
    static constexpr int kFetch = T::kLarge ? 2 : T::kCodeWords;
    u32 codes[T::kFragsN][kFetch], meta[T::kFragsN][1], scales[T::kFragsN][1];

    // The A fragments of k-step `step`; the steps of a tile come in order.
    __device__ __forceinline__ void dequantize_step(u32 (&a)[T::kFragsN][4], u32 stage, const Thread<T>& th, int tile_k,
                                                    int step) {
        constexpr int kColumns = 64 / T::kCodeWords;
#pragma unroll
        for (int f = 0; f < T::kFragsN; ++f) {
            const int frag = th.warp_n * T::kFragsN + f, tile = frag / 4 * T::kTilesK + tile_k;
            const int thread = frag % 4 * 32 + th.lane;
            if (step % kFetch == 0) {
                load_smem(codes[f], stage + T::kCodeOffset + tile * T::kTileCodeBytes +
                                        (thread * T::kCodeWords + step) * 4);
            }
            if (T::kSparse && step == 0) {
                load_smem(meta[f], stage + T::kMetaOffset + tile * T::kTileMetaBytes + thread * 4);
            }
            if (step * kColumns % min(T::kGroupSize, 64) == 0) {
                const int group = (tile_k * 64 + step * kColumns) / T::kGroupSize % T::kChunkGroups;
                load_smem(scales[f], stage + T::kScaleOffset + (frag / 4 * T::kChunkGroups + group) * 128 +
                                         (frag % 4 * 8 + th.lane / 4) * 4);
            }
            dequantize<T::kBf16>(a[f], codes[f][step % kFetch], scales[f][0]);
        }
    }
};

// Adds the products of one k-step: k32 of a sparse, k16 of a dense weight, with all tokens of the warp.
template <class T>
__device__ __forceinline__ void multiply_step(Sums<T>& acc, const u32 (&a)[T::kFragsN][4], const u32 (&meta)[T::kFragsN][1],
                                              u32 act, int step, int lane) {
    if constexpr (T::kSparse) {
        const u32 column = ((lane / 8) ^ (lane % 8) ^ (step * 4)) * 16;
#pragma unroll
        for (int b = 0; b < T::kFragsM; ++b) {
            u32 tokens[4];
            ldmatrix_x4(tokens, act + (b * 8 + lane % 8) * T::kActRowBytes + column);
#pragma unroll
            for (int f = 0; f < T::kFragsN; ++f) {
                if (step == 0) {
                    mma_sp_m16n8k32<T::kBf16, 0>(acc[f][b], a[f], tokens, meta[f][0]);
                } else {
                    mma_sp_m16n8k32<T::kBf16, 1>(acc[f][b], a[f], tokens, meta[f][0]);
                }
            }
        }
    } else {
        // Why: two blocks of 8 tokens a load, k16 each; a lone block loads itself twice.
        const u32 column = ((lane / 8 % 2) ^ (lane % 8) ^ (step * 2)) * 16;
        const int row = lane % 8 + (T::kFragsM > 1 ? lane / 16 * 8 : 0);
#pragma unroll
        for (int b = 0; b < T::kFragsM; b += 2) {
            u32 tokens[4];
            ldmatrix_x4(tokens, act + (b * 8 + row) * T::kActRowBytes + column);
#pragma unroll
            for (int f = 0; f < T::kFragsN; ++f) {
                mma_m16n8k16<T::kBf16>(acc[f][b], a[f], tokens[0], tokens[1]);
                if (b + 1 < T::kFragsM) mma_m16n8k16<T::kBf16>(acc[f][b + 1], a[f], tokens[2], tokens[3]);
            }
        }
    }
}

// Adds the products of one chunk.
template <class T>
__device__ __forceinline__ void multiply_chunk(Sums<T>& acc, u32 stage, const Thread<T>& th) {
    const u32 act = stage + th.warp_m * T::kFragsM * 8 * T::kActRowBytes;
#pragma unroll
    for (int kt = 0; kt < T::kTilesK / T::WARPS_K; ++kt) {
        const int tile_k = kt * T::WARPS_K + th.warp_k;
        PackedTile<T> tile;
#pragma unroll
        for (int step = 0; step < T::kCodeWords; ++step) {
            u32 a[T::kFragsN][4];
            tile.dequantize_step(a, stage, th, tile_k, step);
            multiply_step<T>(acc, a, tile.meta, act + tile_k * 128, step, th.lane);
        }
    }
}

template <class T>
__device__ __forceinline__ void w4a16_chunked(const Args& args, char* smem_base) {
    const Thread<T> th(thread_index());
    const u32 smem = smem_address(smem_base);
    const Schedule& s = args.schedule;
    const int num_chunks = s.num_local_chunks();
    Segment load{};
    int loaded = 0;
    auto thread = [&] { return T::kLarge ? Thread<T>(opaque(th.tid)) : th; };
    auto load_next = [&](int buffer) {
        if (loaded < num_chunks) {
            if (load.chunk == load.chunk_end) load.seek(s, loaded);
            load_stage<T>(args, load, smem + buffer * T::kStageBytes, thread().tid);
            ++load.chunk;
            ++loaded;
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int buffer = 0; buffer < T::STAGES - 1; ++buffer) load_next(buffer);
    int buffer = 0, done = 0;
    while (done < num_chunks) {
        Segment at;
        at.seek(s, done);
        done += at.chunk_end - at.chunk;
        Sums<T> acc = {};
#pragma unroll 1
        for (int left = at.chunk_end - at.chunk; left > 0; --left) {
            cp_async_wait<T::STAGES - 2>();
            __syncthreads();
            load_next(buffer == 0 ? T::STAGES - 1 : buffer - 1);  // into the buffer that the last chunk freed
            multiply_chunk<T>(acc, smem + buffer * T::kStageBytes, thread());
            buffer = buffer + 1 == T::STAGES ? 0 : buffer + 1;
        }
        reduce_warps<T>(acc, reinterpret_cast<float4*>(smem_base + T::STAGES * T::kStageBytes), thread());
        if constexpr (T::kLarge) at.seek(s, done - 1);
        if (at.tile >= s.num_split_tiles || reduce_blocks<T>(acc, args, s, at.tile)) {
            if constexpr (T::WARPS_K > 1) __syncthreads();  // reduce_warps reads the scratch until here
            store_tile<T>(acc, args, at, smem + T::STAGES * T::kStageBytes, thread());
        }
    }
}

template <class T>
__device__ __forceinline__ void w4a16_kernel(const Args& args, char* smem) {
    if constexpr (T::kPipelined) {
        w4a16_pipelined<T>(args, smem);
    } else {
        w4a16_chunked<T>(args, smem);
    }
}

}  // namespace marlin
