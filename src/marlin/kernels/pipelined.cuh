// The kernel for large token tiles: registers are filled a step ahead of the products, so that the tensor cores find
// work at every moment. Extents, stage and sums are those of sm80_w4a16.cuh; a chunk is 64 columns.
//
// K-steps:  while a k-step is multiplied, the weights of the next one are dequantized, a register every other product;
//           the last step of a chunk does so for the first of the next chunk.
// Chunks:   one __syncthreads a chunk, at the start of its last step: the next chunk is ready, the one before is free.
// Copies:   each thread keeps the places that it reads from; they move by constants until the tile ends.
#pragma once
#include "dequant.cuh"
#include "sums.cuh"
#include "tile.cuh"

namespace marlin {

// What a thread copies of a chunk.
template <class T>
struct Source {
    static constexpr int kRowsPerPass = T::kThreads / 8;
    static constexpr int kCodePieces = T::kTileCodeBytes / 16, kCodeRows = T::kThreads / kCodePieces;
    static constexpr int kCodePasses = T::kTilesN / kCodeRows, kScalePieces = T::kChunkGroups * 8;
    static_assert(kRowsPerPass % 8 == 0 && T::BLOCK_M % kRowsPerPass == 0 && T::kTilesN % kCodeRows == 0);
    static_assert(T::kTilesN * 32 <= T::kThreads && T::kTilesN * kScalePieces <= T::kThreads);
    const char *act, *codes, *meta, *scales;
    u32 code_passes[kCodePasses];  // bytes from `codes`
    int rows, chunk;               // tokens from this thread's first one on

    __device__ __forceinline__ void seek(const Args& args, const Segment& at, int tid) {
        chunk = at.chunk;
        const int token = at.tile_m * T::BLOCK_M + tid / 8, column = chunk * 64 + tid % 8 * 8;
        rows = args.m - token;
        const u64 stride = static_cast<u32>(args.act_stride);
        act = reinterpret_cast<const char*>(args.act + static_cast<u32>(token) * stride + column);
        // Why min: what lies beyond the last row of tiles repeats it; its products are never stored.
        const int first = at.tile_n * T::kTilesN, last = ceil_div(args.n, 64) - 1, tiles_k = ceil_div(args.k, 64);
        const int row = min(first + tid / kCodePieces, last);
        codes = reinterpret_cast<const char*>(args.codes) + tid % kCodePieces * 16 +
                static_cast<u64>(row * tiles_k + chunk) * T::kTileCodeBytes;
#pragma unroll
        for (int pass = 0; pass < kCodePasses; ++pass) {
            const int rows_on = min(first + tid / kCodePieces + pass * kCodeRows, last) - row;
            code_passes[pass] = rows_on * tiles_k * T::kTileCodeBytes;
        }
        meta = reinterpret_cast<const char*>(args.meta) + tid % 32 * 16 +
               static_cast<u64>(min(first + tid / 32, last) * tiles_k + chunk) * T::kTileMetaBytes;
        const int groups = max(args.k / T::kGroupSize, 1);
        scales = reinterpret_cast<const char*>(args.scales) + tid % 8 * 16 +
                 static_cast<u64>(min(first + tid / kScalePieces, last) * groups) * 128;
    }

    // Starts the copies of a chunk, and moves on to the next.
    __device__ __forceinline__ void copy(const Args& args, u32 stage, int tid) {
        const u32 to = stage + tid * 16;
#pragma unroll
        for (int pass = 0; pass < kCodePasses; ++pass) {
            const char* from = pass == 0 ? codes : codes + code_passes[pass];
            cp_async_16(to + T::kCodeOffset + pass * T::kThreads * 16, from);
        }
        if (T::kSparse && tid < T::kTilesN * 32) cp_async_16(to + T::kMetaOffset, meta);
        if (tid < T::kTilesN * kScalePieces) {
            int group = chunk * 64 / T::kGroupSize;
            if constexpr (T::kChunkGroups > 1) {
                group = min(group + tid / 8 % T::kChunkGroups, args.k / T::kGroupSize - 1);
            }
            cp_async_16(to + T::kScaleOffset, scales + static_cast<u32>(group * 128));
        }
        // Why: tokens and columns beyond the end become zeros (cp.async reads nothing for them).
        const int valid = chunk * 64 + tid % 8 * 8 < args.k ? rows : 0;
        const u64 pass_bytes = static_cast<u64>(static_cast<u32>(args.act_stride)) * (2 * kRowsPerPass);
        const u32 act_to = stage + ((tid * 16) ^ (tid / 8 % 8 * 16));
        const char* from = act;
#pragma unroll
        for (int row = 0; row < T::BLOCK_M; row += kRowsPerPass, from += pass_bytes) {
            cp_async_16(act_to + row * T::kActRowBytes, from, row < valid ? 16 : 0);
        }
        act += 128;
        codes += T::kTileCodeBytes;
        meta += T::kTileMetaBytes;
        ++chunk;
    }
};

// What a warp holds of its chunk: words of weights, fragments of this k-step and the next, tokens of this load and the
// next.
template <class T>
struct Pipeline {
    static constexpr int kSteps = T::kCodeWords, kColumns = 64 / kSteps;
    static constexpr int kLoads = T::kSparse ? T::kFragsM : T::kFragsM / 2;  // of tokens, a k-step
    static_assert(T::kTilesK == 1 && T::WARPS_K == 1 && kSteps % 2 == 0 && kLoads % 2 == 0);
    u32 a[2][T::kFragsN][4], codes[T::kFragsN][T::kCodeWords], meta[T::kFragsN][1], scales[T::kFragsN][1], tokens[2][4];

    __device__ __forceinline__ void fetch_codes(u32 stage, const Thread<T>& th) {
#pragma unroll
        for (int f = 0; f < T::kFragsN; ++f) {
            const int thread = (th.warp_n * T::kFragsN + f) * 32 + th.lane;
            load_smem(codes[f], stage + T::kCodeOffset + thread * (4 * T::kCodeWords));
        }
    }
    __device__ __forceinline__ static void fetch_meta(u32 (&words)[T::kFragsN][1], u32 stage, const Thread<T>& th) {
        if constexpr (T::kSparse) {
#pragma unroll
            for (int f = 0; f < T::kFragsN; ++f) {
                load_smem(words[f], stage + T::kMetaOffset + ((th.warp_n * T::kFragsN + f) * 32 + th.lane) * 4);
            }
        }
    }
    __device__ __forceinline__ void fetch_scales(u32 stage, const Thread<T>& th, int step) {
        const int group = step * kColumns / T::kGroupSize % T::kChunkGroups;
#pragma unroll
        for (int f = 0; f < T::kFragsN; ++f) {
            const int frag = th.warp_n * T::kFragsN + f;
            load_smem(scales[f], stage + T::kScaleOffset + (frag / 4 * T::kChunkGroups + group) * 128 +
                                     (frag % 4 * 8 + th.lane / 4) * 4);
        }
    }
    // Two blocks of 8 tokens of k16 each (dense), or one of k32 (sparse).
    __device__ __forceinline__ void fetch_tokens(u32 (&words)[4], u32 stage, const Thread<T>& th, int step, int load) {
        const int lane = th.lane, piece = T::kSparse ? lane / 8 : lane / 8 % 2;
        const u32 row = th.warp_m * (T::kFragsM * 8) + lane % 8 + (T::kSparse ? 0 : lane / 16 * 8);
        const u32 place = (row * T::kActRowBytes + (piece ^ (lane % 8)) * 16) ^ (step * kColumns * 2);
        ldmatrix_x4(words, stage + place + load * (T::kSparse ? 8 : 16) * T::kActRowBytes);
    }

    // Makes the first k-step of the chunk at `stage` ready.
    __device__ __forceinline__ void begin(u32 stage, const Thread<T>& th) {
        fetch_codes(stage, th);
        fetch_meta(meta, stage, th);
        fetch_scales(stage, th, 0);
        fetch_tokens(tokens[0], stage, th, 0, 0);
#pragma unroll
        for (int f = 0; f < T::kFragsN; ++f) dequantize<T::kBf16>(a[0][f], codes[f][0], scales[f][0]);
    }

    // Adds the products of the chunk at `stage`, and makes the first k-step of the one at `next` ready once `turn` has
    // seen to the chunk itself.
    template <class Turn>
    __device__ __forceinline__ void multiply(Sums<T>& acc, u32 stage, u32 next, const Thread<T>& th, Turn turn) {
        u32 next_meta[T::kFragsN][1];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int next_step = (step + 1) % kSteps;
            const u32 next_stage = next_step == 0 ? next : stage;
            if (next_step == 0) {
                turn();
                fetch_codes(next, th);
                fetch_meta(next_meta, next, th);
            }
            if (next_step * kColumns % min(T::kGroupSize, 64) == 0) fetch_scales(next_stage, th, next_step);
#pragma unroll
            for (int b = 0; b < kLoads; ++b) {
                const bool last = b + 1 == kLoads;
                fetch_tokens(tokens[(b + 1) % 2], last ? next_stage : stage, th, last ? next_step : step,
                             last ? 0 : b + 1);
#pragma unroll
                for (int f = 0; f < T::kFragsN; ++f) {
                    multiply_fragment(acc, step, b, f);
                    dequantize_some(next_step, b * T::kFragsN + f);
                }
            }
        }
        if constexpr (T::kSparse) {
#pragma unroll
            for (int f = 0; f < T::kFragsN; ++f) meta[f][0] = next_meta[f][0];
        }
    }

    __device__ __forceinline__ void multiply_fragment(Sums<T>& acc, int step, int b, int f) {
        const u32(&words)[4] = tokens[b % 2];
        if constexpr (T::kSparse) {
            if (step == 0) {
                mma_sp_m16n8k32<T::kBf16, 0>(acc[f][b], a[step % 2][f], words, meta[f][0]);
            } else {
                mma_sp_m16n8k32<T::kBf16, 1>(acc[f][b], a[step % 2][f], words, meta[f][0]);
            }
        } else {
            mma_m16n8k16<T::kBf16>(acc[f][2 * b], a[step % 2][f], words[0], words[1]);
            mma_m16n8k16<T::kBf16>(acc[f][2 * b + 1], a[step % 2][f], words[2], words[3]);
        }
    }

    // The registers of k-step `step` whose turn comes after the product number `done` of the step before. None comes
    // in the first quarter, in which words arrive.
    __device__ __forceinline__ void dequantize_some(int step, int done) {
        constexpr int kProducts = kLoads * T::kFragsN, kFirst = kProducts / 4, kRegisters = 4 * T::kFragsN;
#pragma unroll
        for (int r = 0; r < kRegisters; ++r) {
            if (kFirst + r * (kProducts - kFirst) / kRegisters == done) {
                a[step % 2][r / 4][r % 4] = dequantize_register<T::kBf16>(codes[r / 4][step], scales[r / 4][0], r % 4);
            }
        }
    }
};

template <class T>
__device__ __forceinline__ void w4a16_pipelined(const Args& args, char* smem_base) {
    const Thread<T> th(thread_index());
    const u32 smem = smem_address(smem_base);
    const Schedule& s = args.schedule;
    const int num_chunks = s.num_local_chunks();
    Source<T> source;
    int loaded = 0, left = 0;  // chunks that are copied, and those to come until the tile ends
    auto copy_next = [&](int buffer) {
        if (loaded < num_chunks) {
            if (left == 0) {
                Segment at;
                at.seek(s, loaded);
                source.seek(args, at, th.tid);
                left = at.chunk_end - at.chunk;
            }
            source.copy(args, smem + buffer * T::kStageBytes, th.tid);
            --left;
            ++loaded;
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int buffer = 0; buffer < T::STAGES - 1; ++buffer) copy_next(buffer);
    cp_async_wait<T::STAGES - 2>();
    __syncthreads();
    int buffer = 0, done = 0;
    while (done < num_chunks) {
        Segment at;
        at.seek(s, done);
        done += at.chunk_end - at.chunk;
        Sums<T> acc = {};
        Pipeline<T> pipeline;
        pipeline.begin(smem + buffer * T::kStageBytes, th);
#pragma unroll 1
        for (int chunks = at.chunk_end - at.chunk; chunks > 0; --chunks) {
            const int next = buffer + 1 == T::STAGES ? 0 : buffer + 1;
            pipeline.multiply(acc, smem + buffer * T::kStageBytes, smem + next * T::kStageBytes, th, [&] {
                cp_async_wait<T::STAGES - 3>();
                __syncthreads();
                copy_next(buffer == 0 ? T::STAGES - 1 : buffer - 1);  // into the buffer that the last chunk freed
            });
            buffer = next;
        }
        at.seek(s, done - 1);
        if (at.tile >= s.num_split_tiles || reduce_blocks<T>(acc, args, s, at.tile)) {
            store_tile<T>(acc, args, at, smem + T::STAGES * T::kStageBytes, Thread<T>(opaque(th.tid)));
        }
    }
}

}  // namespace marlin
