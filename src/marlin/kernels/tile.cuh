// What the parts of the kernel share: its arguments, a variant's extents, a thread's place, the sums.
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
    static constexpr int kGroupSize = kGroupSize_;  // kWholeRow: one scale per row
    static constexpr int kThreads = 32 * WARPS_M * WARPS_N * WARPS_K;
    static constexpr int kFragsN = BLOCK_N / WARPS_N / 16, kFragsM = BLOCK_M / WARPS_M / 8;
    static constexpr int kOwnFragsN = kFragsN / WARPS_K;  // fragments that a warp finishes

    // Where sums take most registers, what is cheap to compute again is not kept through the main loop.
    static constexpr bool kLarge = kFragsN * kFragsM >= 16;

    // Tiles of many tokens run in pipelined.cuh, the others in sm80_w4a16.cuh.
    static constexpr bool kPipelined = BLOCK_M >= 64;

    static constexpr int kTilesN = BLOCK_N / 64, kTilesK = BLOCK_K / 64;
    static constexpr int kCodeWords = kSparse ? 2 : 4;  // per thread and tile of 64 x 64
    static constexpr int kChunkGroups = kGroupSize >= BLOCK_K ? 1 : BLOCK_K / kGroupSize;

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
    static_assert(kGroupSize == 32 || kGroupSize == 64 || kGroupSize == 128 || kGroupSize == kWholeRow);
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
using Sums = float[T::kFragsN][T::kFragsM][4];

}  // namespace marlin
