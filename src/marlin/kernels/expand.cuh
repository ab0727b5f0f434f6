// out[rows, K] = the weight's rows in fp16 or bf16, zeros included: packed INT4 tiles, 2:4-sparse or dense, to row-major.
//
// Values:   what the kernels of this folder multiply with, bit for bit: code times scale, rounded once.
// Block:    64 rows (a tile of the packed layout) x kTilesK tiles of 64 columns; 4 warps, each with kUnits units.
// Unit:     16 bytes of codes a thread: 16 rows x 64 columns (dense) or 32 x 64 (sparse). All of a warp's loads come
//           first. Its rows then go through shared memory, 16 at a time, so that a store writes whole lines of 128
//           bytes, 16 bytes a thread.
// Stage:    a warp's own 16 rows of 128 bytes; 16-byte pieces swizzled by row, without bank conflicts either way.
#pragma once
#include "dequant.cuh"

namespace marlin {

struct ExpandArgs {
    const u32* codes;  // of the first row of tiles, like meta and scales
    const u32* meta;
    const u16* scales;
    u16* out;
    u32 rows, k;
};

template <bool kSparse_, bool kBf16_, int kGroupSize_>
struct Expand {
    static constexpr bool kSparse = kSparse_, kBf16 = kBf16_;
    static constexpr int kGroupSize = kGroupSize_;  // kWholeRow: one scale per row
    static constexpr int kThreads = 128, kStageBytes = 16 * 128, kSmemBytes = kThreads / 32 * kStageBytes;
    static constexpr u32 kUnits = kSparse ? 1 : 2;
    static constexpr u32 kWarpsN = kSparse ? 2 : 4;  // warps that share a tile, by rows
    static constexpr u32 kTilesK = kUnits * 4 / kWarpsN;
    static constexpr u32 kCodeWords = kSparse ? 256 : 512, kMetaWords = 128;  // of a tile
    static constexpr u32 kGroups = kGroupSize == 32 ? 2 : 1;                  // of a tile's columns
};

// The address of a row's 16-byte piece in a stage, which lies on 128 bytes.
__device__ __forceinline__ u32 piece_address(u32 stage, u32 row, u32 piece) {
    return (stage + row * 128) ^ ((piece ^ (row * 2 % 8 | row / 4 % 2)) * 16);
}

// What a thread holds of a unit.
template <class T>
struct PackedUnit {
    u32 codes[4], meta[T::kSparse ? 4 : 1], scales[T::kGroups][1];

    // frag: of 16 rows, which the thread holds rows `lane_row` and `lane_row + 8` of.
    __device__ __forceinline__ void load(const ExpandArgs& args, u32 tile_n, u32 tile_k, u32 thread, u32 frag,
                                         u32 lane_row) {
        // Why min: tiles and groups beyond the last one repeat it; they are never stored.
        const u32 tiles_k = (args.k + 63) / 64, groups = max(args.k / T::kGroupSize, 1u);
        const u32 tile = tile_n * tiles_k + min(tile_k, tiles_k - 1);
        load_gmem(codes, args.codes + tile * T::kCodeWords + thread * 4);
        if constexpr (T::kSparse) load_gmem(meta, args.meta + tile * T::kMetaWords + frag * 32 + lane_row * 4);
#pragma unroll
        for (int i = 0; i < T::kGroups; ++i) {
            const u32 group = tile_n * groups + min((tile_k * 64 + i * 32) / T::kGroupSize, groups - 1);
            load_gmem(scales[i], args.scales + group * 64 + frag * 16 + lane_row * 2);
        }
    }
};

// Where the pair of a group of four columns goes: bytes 0 to 3 of `pair` as prmt numbers them, 4 for zero, for each byte
// of the four columns. nibble: i0 | i1 << 2 in its low bits, anything above.
__device__ __forceinline__ u32 byte_places(u32 nibble) {
    return 0x44444444u ^ (0x54u << (nibble * 8 & 24)) ^ (0x76u << (nibble * 2 & 24));
}

// Writes a stage's 16 rows; row_of(i): the number of the i-th.
template <class T, class RowOf>
__device__ __forceinline__ void store_stage(const ExpandArgs& args, u32 stage, u32 tile_k, u32 lane, RowOf row_of) {
    const u32 piece = lane % 8, column = tile_k * 64 + piece * 8;
    __syncwarp();
#pragma unroll
    for (u32 pass = 0; pass < 4; ++pass) {
        const u32 i = pass * 4 + lane / 8, row = row_of(i);
        u32 word[4];
        load_smem(word, piece_address(stage, i, piece));
        if (row < args.rows && column < args.k) store_gmem(args.out + (row * args.k + column), word);
    }
    __syncwarp();
}

template <class T>
__device__ __forceinline__ void expand_dense(const PackedUnit<T>& unit, const ExpandArgs& args, u32 stage, u32 first_row,
                                             u32 tile_k, u32 lane) {
    const u32 g = lane / 4;
#pragma unroll
    for (u32 step = 0; step < 4; ++step) {
        u32 a[4];
        dequantize<T::kBf16>(a, unit.codes[step], unit.scales[step / 2 % T::kGroups][0]);
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            store_smem(piece_address(stage, g, step * 2 + r / 2) + r % 2 * 1024 + lane % 4 * 4, a[r]);
        }
    }
    store_stage<T>(args, stage, tile_k, lane, [&](u32 i) { return first_row + i; });
}

// A thread holds two neighbouring groups of four columns in either half of both k-steps, eight columns each.
template <class T>
__device__ __forceinline__ void expand_sparse(const PackedUnit<T>& unit, const ExpandArgs& args, u32 stage,
                                              u32 first_row, u32 tile_k, u32 lane) {
    const u32 pair = lane % 2, i = lane / 2;
    u32 a[4][4];
#pragma unroll
    for (u32 word = 0; word < 4; ++word) {
        dequantize<T::kBf16>(a[word], unit.codes[word], unit.scales[word % 2 % T::kGroups][0]);
    }
#pragma unroll
    for (u32 hi = 0; hi < 2; ++hi) {
#pragma unroll
        for (u32 half = 0; half < 4; ++half) {  // of 16 columns, two a k-step
            const u32 nibbles = unit.meta[half] >> (pair * 8 + hi * 16);
            u32 columns[4];
#pragma unroll
            for (u32 group = 0; group < 2; ++group) {
                const u32 places = byte_places(nibbles >> (group * 4));
                const u32 values = a[group * 2 + half / 2][half % 2 * 2 + hi];
                columns[group * 2] = place_bytes(values, places);
                columns[group * 2 + 1] = place_bytes(values, places >> 16);
            }
            store_smem(piece_address(stage, i, half * 2 + pair), columns);
        }
        store_stage<T>(args, stage, tile_k, lane, [&](u32 at) { return first_row + at / 8 * 16 + hi * 8 + at % 8; });
    }
}

template <class T>
__device__ __forceinline__ void expand_kernel(const ExpandArgs& args, char* smem) {
    const u32 tid = thread_index(), lane = tid % 32, warp = tid / 32, warp_n = warp % T::kWarpsN;
    const u32 blocks_k = (args.k + 64 * T::kTilesK - 1) / (64 * T::kTilesK);
    const u32 tile_n = blockIdx.x / blocks_k, block_k = blockIdx.x - tile_n * blocks_k;
    const u32 tile_k = block_k * T::kTilesK + warp / T::kWarpsN, next = 4 / T::kWarpsN;
    const u32 stage = smem_address(smem) + warp * T::kStageBytes;
    const u32 frag = T::kSparse ? warp_n * 2 + lane / 16 : warp_n, lane_row = T::kSparse ? lane % 16 / 2 : lane / 4;
    PackedUnit<T> units[T::kUnits];
#pragma unroll
    for (u32 u = 0; u < T::kUnits; ++u) {
        units[u].load(args, tile_n, tile_k + u * next, warp_n * 32 + lane, frag, lane_row);
    }
    const u32 first_row = tile_n * 64 + warp_n * (64 / T::kWarpsN);
#pragma unroll
    for (u32 u = 0; u < T::kUnits; ++u) {
        if constexpr (T::kSparse) {
            expand_sparse<T>(units[u], args, stage, first_row, tile_k + u * next, lane);
        } else {
            expand_dense<T>(units[u], args, stage, first_row, tile_k + u * next, lane);
        }
    }
}

}  // namespace marlin
