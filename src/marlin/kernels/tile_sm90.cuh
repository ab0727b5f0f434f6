// What the parts of the Hopper kernel share: its arguments, a variant's extents, the sums of a thread.
#pragma once
#include "dequant.cuh"
#include "ptx_sm90.cuh"
#include "schedule.cuh"

namespace marlin {

struct Args90 {
    // act [K / 64][M][64], codes [N / 64][K / 64][words], meta (2:4 alone) likewise, scales [N / 64][groups][64].
    // act_tail is act in boxes of tail_rows, for the last tile of tokens.
    const TensorMap *act, *act_tail, *codes, *meta, *scales;
    const u16* bias;  // null: none
    u16* out;
    float4* workspace;
    int* tickets;
    int m, n, k;
    int tail_rows;  // tokens of the last tile, rounded up to 8
    Schedule schedule;

    // Rows that the panels of a tile have: nothing of the others is stored, so they are not filled, and may be anything.
    __device__ __forceinline__ int panel_rows(int tile_m, int block_m) const {
        return tile_m == schedule.num_m_tiles - 1 ? tail_rows : block_m;
    }
};

template <bool kSparse_, bool kBf16_, int kGroupSize_, int BLOCK_M_, int WGS_N_, int WGS_K_, int BLOCK_K_, int STAGES_,
          int CLUSTER_, int MIN_BLOCKS>
struct Tile90 {
    static constexpr bool kSparse = kSparse_, kBf16 = kBf16_;
    static constexpr int kGroupSize = kGroupSize_, BLOCK_M = BLOCK_M_, WGS_N = WGS_N_, WGS_K = WGS_K_;
    static constexpr int BLOCK_N = 64 * WGS_N, BLOCK_K = BLOCK_K_, STAGES = STAGES_, CLUSTER = CLUSTER_;
    static constexpr int kConsumers = 128 * WGS_N * WGS_K;
    // Where sums take most registers, those that the copying warp does not need go to the others, which takes a whole
    // warpgroup of copying threads.
    static constexpr bool kLarge = BLOCK_M >= 128;
    static constexpr int kThreads = kConsumers + (kLarge ? 128 : 32);
    static constexpr int kCopyRegisters = 32, kLaunchRegisters = 65536 / kThreads / 8 * 8;
    static constexpr int kMultiplyRegisters =
        (kLaunchRegisters * kThreads / 128 - kCopyRegisters) / (WGS_N * WGS_K) / 8 * 8;
    static constexpr int kTokenBlocks = BLOCK_M / 8, kTilesK = BLOCK_K / 64;
    // A unit: columns whose A fragments take eight registers of a thread, two k-steps.
    static constexpr int kTileUnits = kSparse ? 1 : 2, kUnitColumns = 64 / kTileUnits;
    // Whether the products of a chunk end with it: the assembler makes dense ones wait for each other otherwise.
    static constexpr bool kDrain = !kSparse;
    static constexpr int kUnitScales = kGroupSize < kUnitColumns ? kUnitColumns / kGroupSize : 1;
    static constexpr int kChunkUnits = kTilesK * kTileUnits / WGS_K;  // of a chunk, that a warpgroup multiplies
    // Whether there are registers for the fragments of two pieces of a chunk; and how large a piece is.
    static constexpr bool kAhead = !kLarge;
    static constexpr int kPieceUnits = kChunkUnits >= 4 && MIN_BLOCKS * kThreads <= 768 ? 2 : 1;
    static constexpr int kChunkGroups = kGroupSize >= BLOCK_K ? 1 : BLOCK_K / kGroupSize;

    static constexpr int kActBytes = kTilesK * BLOCK_M * 128;  // panels of 64 columns
    static constexpr int kTileCodeBytes = kSparse ? 1024 : 2048, kTileMetaBytes = kSparse ? 512 : 0;
    static constexpr int kCodeOffset = kActBytes;
    static constexpr int kMetaOffset = kCodeOffset + WGS_N * kTilesK * kTileCodeBytes;
    static constexpr int kScaleOffset = kMetaOffset + WGS_N * kTilesK * kTileMetaBytes;
    static constexpr int kFilledBytes = kScaleOffset + WGS_N * kChunkGroups * 128;
    static constexpr int kStageBytes = (kFilledBytes + 1023) / 1024 * 1024;

    // After the stages: sums over WGS_K, then output rows of each warpgroup.
    static constexpr int kReduceBytes = (WGS_K - 1) * WGS_N * BLOCK_M * 64 * 4;
    static constexpr int kOutTokens = BLOCK_M < 32 ? BLOCK_M : 32;  // that a warpgroup stores at a time
    static constexpr int kOutBytes = WGS_N * kOutTokens * 128;
    static constexpr int kScratchBytes = kReduceBytes > kOutBytes ? kReduceBytes : kOutBytes;
    // Blocks of a cluster share the tokens of their tile: each adds the parts of the others for its own blocks of eight.
    // Parts that are too large for a place of their own lie in the ring.
    static constexpr bool kClusters = CLUSTER > 1;
    static constexpr int kOwnBlocks = kClusters ? (kTokenBlocks + CLUSTER - 1) / CLUSTER : kTokenBlocks;
    static constexpr int kPartBytes = kOwnBlocks * WGS_N * 2048, kPartsBytes = kClusters ? (CLUSTER - 1) * kPartBytes : 0;
    static constexpr bool kPartsInRing = kPartsBytes > 16384;
    static constexpr int kPartOffset = kPartsInRing ? 0 : STAGES * kStageBytes + kScratchBytes;
    static constexpr int kBarrierOffset = STAGES * kStageBytes + kScratchBytes + (kPartsInRing ? 0 : kPartsBytes);
    static constexpr int kLastBarrierOffset = kBarrierOffset + STAGES * 24;  // of the cluster; or the ticket drawn
    static constexpr int kSmemBytes = kLastBarrierOffset + 16;
    static_assert(kPartsBytes <= STAGES * kStageBytes);

    static_assert(BLOCK_M % 8 == 0 && BLOCK_M <= 256 && BLOCK_K % (64 * WGS_K) == 0 && STAGES >= 2);
    static_assert(kGroupSize <= BLOCK_K || kGroupSize % BLOCK_K == 0);
};

// The sums of a thread: of features g and g + 8 of its warp's sixteen, for two tokens of each block of eight.
template <class T>
using Sums90 = float[T::kTokenBlocks][4];

// Named barriers of a block; 0 is that of __syncthreads.
enum { kBarrierMultipliers = 1, kBarrierFinishers = 2, kBarrierWarpgroup = 3 };

}  // namespace marlin
