// out[M, N] = act[M, K] @ weight[N, K].T (+ bias): INT4 weights, 2:4-sparse or dense, for compute capability 8.0 on.
//
// Axes:     the weight is operand A of the tensor core: its rows (N, features) are the instruction's m16, the tokens
//           (M) its n8, K its k32 (mma.sp, sparse) or k16 (mma, dense). Accumulators are fp32, [feature][token].
// Block:    BLOCK_N features x BLOCK_M tokens; WARPS_N x WARPS_M x WARPS_K warps. A warp owns kFragsN fragments of
//           16 features, kFragsM of 8 tokens, and every WARPS_K-th 64 columns of a chunk of BLOCK_K.
// Pipeline: STAGES buffers filled by cp.async, one commit group a chunk, one __syncthreads a chunk; the producer's
//           cursor runs STAGES - 1 chunks ahead, across tiles (schedule.cuh).
// Stage:    act [BLOCK_M][BLOCK_K] 16-bit, 16-byte pieces swizzled by row % 8; then packed tiles as they lie in
//           memory (layout drawn in formats/layouts/fragment.py): codes, metadata, scales.
// Sums:     over WARPS_K by a reduce-scatter through shared memory, over blocks of a split tile through the
//           workspace, in fp32 and in a fixed order: the last block to arrive at a tile's ticket adds all parts.
//           It leaves the ticket 0, so no launch has to clear anything.
#pragma once
#include "dequant.cuh"
#include "schedule.cuh"

namespace marlin {

struct Args {
    const u16* act;
    const u32* codes;
    const u32* meta;
    const u16* scales;
    const u16* bias;  // null: none
    u16* out;
    float4* workspace;
    int* tickets;
    int m, n, k;
    int act_stride;  // elements from token to token
    Schedule schedule;
};

template <bool kSparse_, bool kBf16_, int kGroupSize_, int BLOCK_M_, int BLOCK_N_, int BLOCK_K_, int STAGES_,
          int WARPS_M_, int WARPS_N_, int WARPS_K_>
struct Tile {
    static constexpr bool kSparse = kSparse_, kBf16 = kBf16_;
    static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, BLOCK_K = BLOCK_K_, STAGES = STAGES_;
    static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, WARPS_K = WARPS_K_;
    static constexpr int kGroupSize = kGroupSize_;  // 0: one scale per row, applied to the sums
    static constexpr bool kGrouped = kGroupSize > 0;
    static constexpr int kThreads = 32 * WARPS_M * WARPS_N * WARPS_K;
    static constexpr int kFragsN = BLOCK_N / WARPS_N / 16, kFragsM = BLOCK_M / WARPS_M / 8;
    static constexpr int kOwnFragsN = kFragsN / WARPS_K;  // fragments that a warp finishes

    // Where sums take most registers, what is cheap to compute again is not kept through the main loop.
    static constexpr bool kLarge = kFragsN * kFragsM >= 16;

    static constexpr int kTilesN = BLOCK_N / 64, kTilesK = BLOCK_K / 64;
    static constexpr int kCodeWords = kSparse ? 2 : 4;  // per thread and tile of 64 x 64
    static constexpr int kChunkGroups = !kGrouped ? 0 : kGroupSize >= BLOCK_K ? 1 : BLOCK_K / kGroupSize;

    static constexpr int kActRowBytes = BLOCK_K * 2, kActBytes = BLOCK_M * kActRowBytes;
    static constexpr int kTileCodeBytes = 128 * kCodeWords * 4, kTileMetaBytes = kSparse ? 512 : 0;
    static constexpr int kCodeOffset = kActBytes;
    static constexpr int kMetaOffset = kCodeOffset + kTilesN * kTilesK * kTileCodeBytes;
    static constexpr int kScaleOffset = kMetaOffset + kTilesN * kTilesK * kTileMetaBytes;
    static constexpr int kStageBytes = kScaleOffset + kTilesN * kChunkGroups * 128;

    // After the stages: sums over WARPS_K, one n8 block at a time; then, warp by warp, output rows.
    static constexpr int kReduceBytes = WARPS_K > 1 ? BLOCK_N * WARPS_M * 8 * 4 * WARPS_K : 0;
    static constexpr int kOutRowBytes = kOwnFragsN * 32;
    static constexpr int kOutBytes = kThreads / 32 * 8 * kOutRowBytes;
    static constexpr int kSmemBytes = STAGES * kStageBytes + (kReduceBytes > kOutBytes ? kReduceBytes : kOutBytes);

    static_assert(BLOCK_N % (64) == 0 && BLOCK_K % (64 * WARPS_K) == 0 && BLOCK_M % (8 * WARPS_M) == 0);
    static_assert(kFragsN % WARPS_K == 0 && kOwnFragsN > 0 && STAGES >= 2 && kStageBytes % 128 == 0);
    static_assert(kGroupSize == 0 || kGroupSize == 32 || kGroupSize == 64 || kGroupSize == 128);
    static_assert(kGroupSize <= BLOCK_K || kGroupSize % BLOCK_K == 0);
};

// This thread's place in the block.
template <class T>
struct Thread {
    int tid, lane, warp_m, warp_n, warp_k;
    __device__ __forceinline__ explicit Thread(int index) {
        tid = index;
        lane = tid % 32;
        const int warp = tid / 32;
        warp_m = warp % T::WARPS_M;
        warp_n = warp / T::WARPS_M % T::WARPS_N;
        warp_k = warp / (T::WARPS_M * T::WARPS_N);
    }
};

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
    if constexpr (T::kGrouped) {
        const int group = at.chunk * T::BLOCK_K / T::kGroupSize, groups = args.k / T::kGroupSize;
        load_packed<T, T::kChunkGroups, 128>(args.scales, stage + T::kScaleOffset, tid, row, last_row, group, groups);
    }
    load_activations<T>(args, at, stage, tid);
}

template <class T>
using Sums = float[T::kFragsN][T::kFragsM][4];

__device__ __forceinline__ void add(float (&sum)[4], float4 part, bool first) {
    sum[0] = (first ? 0.0f : sum[0]) + part.x;
    sum[1] = (first ? 0.0f : sum[1]) + part.y;
    sum[2] = (first ? 0.0f : sum[2]) + part.z;
    sum[3] = (first ? 0.0f : sum[3]) + part.w;
}

// The weights of one 64 x 64 tile column of a warp: packed words as they lie in shared memory.
template <class T>
struct PackedTile {
    u32 codes[T::kFragsN][T::kCodeWords], meta[T::kFragsN][1], scales[T::kFragsN][1];

    __device__ __forceinline__ void load(u32 stage, const Thread<T>& th, int tile_k) {
#pragma unroll
        for (int f = 0; f < T::kFragsN; ++f) {
            const int frag = th.warp_n * T::kFragsN + f, tile = frag / 4 * T::kTilesK + tile_k;
            const int thread = frag % 4 * 32 + th.lane;
            load_smem(codes[f], stage + T::kCodeOffset + tile * T::kTileCodeBytes + thread * (4 * T::kCodeWords));
            if constexpr (T::kSparse) {
                load_smem(meta[f], stage + T::kMetaOffset + tile * T::kTileMetaBytes + thread * 4);
            }
        }
    }

    // The A fragments of k-step `step`; fetches the scales where a group begins.
    __device__ __forceinline__ void dequantize_step(u32 (&a)[T::kFragsN][4], u32 stage, const Thread<T>& th, int tile_k,
                                                    int step) {
        constexpr int kColumns = 64 / T::kCodeWords;
#pragma unroll
        for (int f = 0; f < T::kFragsN; ++f) {
            if constexpr (T::kGrouped) {
                const int frag = th.warp_n * T::kFragsN + f;
                const int group = (tile_k * 64 + step * kColumns) / T::kGroupSize % T::kChunkGroups;
                if (step * kColumns % min(T::kGroupSize, 64) == 0) {
                    load_smem(scales[f], stage + T::kScaleOffset + (frag / 4 * T::kChunkGroups + group) * 128 +
                                             (frag % 4 * 8 + th.lane / 4) * 4);
                }
            }
            dequantize<T::kBf16, T::kGrouped>(a[f], codes[f][step], scales[f][0]);
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
        tile.load(stage, th, tile_k);
#pragma unroll
        for (int step = 0; step < T::kCodeWords; ++step) {
            u32 a[T::kFragsN][4];
            tile.dequantize_step(a, stage, th, tile_k, step);
            multiply_step<T>(acc, a, tile.meta, act + tile_k * 128, step, th.lane);
        }
    }
}

// Sums over the warps that share an output: warp_k keeps fragments warp_k * kOwnFragsN.. and gives the others away.
// On return acc[0 .. kOwnFragsN) are the kept ones.
template <class T>
__device__ __forceinline__ void reduce_warps(Sums<T>& acc, float4* smem, const Thread<T>& th) {
    if constexpr (T::WARPS_K > 1) {
        const int place = (th.warp_n * T::WARPS_M + th.warp_m) * T::kFragsN * T::WARPS_K * 32 + th.lane;
#pragma unroll
        for (int b = 0; b < T::kFragsM; ++b) {
            __syncthreads();
#pragma unroll
            for (int f = 0; f < T::kFragsN; ++f) {
                const float(&v)[4] = acc[f][b];
                smem[place + (f * T::WARPS_K + th.warp_k) * 32] = make_float4(v[0], v[1], v[2], v[3]);
            }
            __syncthreads();
#pragma unroll
            for (int f = 0; f < T::kOwnFragsN; ++f) {
#pragma unroll
                for (int w = 0; w < T::WARPS_K; ++w) {
                    add(acc[f][b], smem[place + ((th.warp_k * T::kOwnFragsN + f) * T::WARPS_K + w) * 32], w == 0);
                }
            }
        }
    }
}

// Adds the parts of a split tile. Returns whether this block is the one that holds the sum.
template <class T>
__device__ __forceinline__ bool reduce_blocks(Sums<T>& acc, const Args& args, const Schedule& s, int tile) {
    constexpr int kSlot = T::kOwnFragsN * T::kFragsM * T::kThreads;
    const int first = s.first_block(tile), last = s.last_block(tile);
    if (first == last) return true;
    float4* mine = args.workspace + s.slot(blockIdx.x, tile) * kSlot + threadIdx.x;
#pragma unroll
    for (int f = 0; f < T::kOwnFragsN; ++f) {
#pragma unroll
        for (int b = 0; b < T::kFragsM; ++b) {
            const float(&v)[4] = acc[f][b];
            mine[(f * T::kFragsM + b) * T::kThreads] = make_float4(v[0], v[1], v[2], v[3]);
        }
    }
    __shared__ int arrived;
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomic_add_acq_rel(args.tickets + tile, 1);
        if (arrived == last - first) args.tickets[tile] = 0;
    }
    __syncthreads();
    if (arrived != last - first) return false;
    // Why: a batch of parts is loaded before any is added, since each costs a round trip to L2; fragments go one by
    // one, since those of large tiles leave few registers.
    constexpr int kBatch = T::kFragsM >= 8 ? 1 : 8 / T::kFragsM;
#pragma unroll
    for (int f = 0; f < T::kOwnFragsN; ++f) {
#pragma unroll 1
        for (int block0 = first; block0 <= last; block0 += kBatch) {
            float4 part[kBatch][T::kFragsM];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const float4* from = args.workspace + s.slot(min(block0 + i, last), tile) * kSlot + threadIdx.x;
#pragma unroll
                for (int b = 0; b < T::kFragsM; ++b) part[i][b] = load_l2(from + (f * T::kFragsM + b) * T::kThreads);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (block0 + i > last) break;
#pragma unroll
                for (int b = 0; b < T::kFragsM; ++b) add(acc[f][b], part[i][b], block0 + i == first);
            }
        }
    }
    return true;
}

// Multiplies by the row's scale where there is one per row, and adds the bias.
template <class T>
__device__ __forceinline__ void finish_sums(Sums<T>& acc, const Args& args, int tile_n, int first_frag, int lane) {
    if (T::kGrouped && args.bias == nullptr) return;
#pragma unroll
    for (int f = 0; f < T::kOwnFragsN; ++f) {
#pragma unroll
        for (int hi = 0; hi < 2; ++hi) {
            const int frag = first_frag + f, row = frag % 4 * 16 + hi * 8 + lane / 4;
            const int tile = tile_n * T::kTilesN + frag / 4, feature = tile * 64 + row;
            if (feature >= args.n) continue;
            float scale = 1.0f, bias = 0.0f;
            if (!T::kGrouped) scale = to_float<T::kBf16>(args.scales[tile * 64 + frag % 4 * 16 + lane / 4 * 2 + hi]);
            if (args.bias != nullptr) bias = to_float<T::kBf16>(args.bias[feature]);
#pragma unroll
            for (int b = 0; b < T::kFragsM; ++b) {
                acc[f][b][2 * hi] = acc[f][b][2 * hi] * scale + bias;
                acc[f][b][2 * hi + 1] = acc[f][b][2 * hi + 1] * scale + bias;
            }
        }
    }
}

// Rounds once, and stores 32 bytes per token and fragment, gathered to 16-byte pieces through shared memory.
template <class T>
__device__ __forceinline__ void store_tile(Sums<T>& acc, const Args& args, const Segment& at, u32 smem,
                                           const Thread<T>& th) {
    const int lane = th.lane, first_frag = th.warp_n * T::kFragsN + th.warp_k * T::kOwnFragsN;
    finish_sums<T>(acc, args, at.tile_n, first_frag, lane);
    constexpr int kPieces = T::kOutRowBytes / 16, kTokensPerPass = 32 / kPieces;
    static_assert(32 % kPieces == 0);
    const u32 rows = smem + th.tid / 32 * 8 * T::kOutRowBytes;
    const u32 store_row = rows + lane / 4 * T::kOutRowBytes + lane % 4 * 4;
    const int piece = lane % kPieces, feature = at.tile_n * T::BLOCK_N + first_frag * 16 + piece * 8;
    int token = at.tile_m * T::BLOCK_M + th.warp_m * T::kFragsM * 8 + lane / kPieces;
    u16* out = args.out + static_cast<long long>(token) * args.n + feature;
#pragma unroll
    for (int b = 0; b < T::kFragsM; ++b) {
        __syncwarp();
#pragma unroll
        for (int f = 0; f < T::kOwnFragsN; ++f) {
            const float(&v)[4] = acc[f][b];
            const int swizzle = lane / 4 % kPieces;
            store_smem(store_row + (((2 * f) ^ swizzle) % kPieces) * 16, movmatrix_trans(to_pair<T::kBf16>(v[0], v[1])));
            store_smem(store_row + (((2 * f + 1) ^ swizzle) % kPieces) * 16,
                       movmatrix_trans(to_pair<T::kBf16>(v[2], v[3])));
        }
        __syncwarp();
#pragma unroll
        for (int pass = 0; pass < 8; pass += kTokensPerPass) {
            const int row = pass + lane / kPieces;
            if (kTokensPerPass <= 8 || row < 8) {
                u32 word[4];
                load_smem(word, rows + row * T::kOutRowBytes + ((piece ^ (row % kPieces)) % kPieces) * 16);
                if (token < args.m && feature < args.n) store_gmem(out, word);
            }
            token += min(kTokensPerPass, 8);
            out += min(kTokensPerPass, 8) * args.n;
        }
    }
}

template <class T>
__device__ __forceinline__ void w4a16_kernel(const Args& args, char* smem_base) {
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
        reduce_warps<T>(acc, reinterpret_cast<float4*>(smem_base + T::STAGES * T::kStageBytes), th);
        if constexpr (T::kLarge) at.seek(s, done - 1);
        if (at.tile >= s.num_split_tiles || reduce_blocks<T>(acc, args, s, at.tile)) {
            if constexpr (T::WARPS_K > 1) __syncthreads();  // reduce_warps reads the scratch until here
            store_tile<T>(acc, args, at, smem + T::STAGES * T::kStageBytes, th);
        }
    }
}

}  // namespace marlin
