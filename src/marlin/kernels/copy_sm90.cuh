// The copying thread, which fills the ring, and the barriers of its stages.
#pragma once
#include "tile_sm90.cuh"

namespace marlin {

// What the copying thread does. Beyond the end of M, N or K the copy engine writes zeros, scales included.
template <class T>
struct Copier {
    const Args90& args;
    u32 smem;

    // Of a stage: its weights are there; its activations are; all warps have read both.
    __device__ __forceinline__ u32 weights(int stage) const { return smem + T::kBarrierOffset + stage * 24; }
    __device__ __forceinline__ u32 tokens(int stage) const { return weights(stage) + 8; }
    __device__ __forceinline__ u32 empty(int stage) const { return weights(stage) + 16; }

    __device__ __forceinline__ void copy_weights(const Segment& at, int stage) const {
        const u32 to = smem + stage * T::kStageBytes, barrier = weights(stage);
        const int tile_n = at.tile_n * T::WGS_N, tile_k = at.chunk * T::kTilesK;
        mbarrier_arrive_expect(barrier, T::kFilledBytes - T::kActBytes);
        tensor_copy(to + T::kCodeOffset, args.codes, 0, tile_k, tile_n, barrier);
        if constexpr (T::kSparse) tensor_copy(to + T::kMetaOffset, args.meta, 0, tile_k, tile_n, barrier);
        tensor_copy(to + T::kScaleOffset, args.scales, 0, at.chunk * T::BLOCK_K / T::kGroupSize, tile_n, barrier);
    }

    __device__ __forceinline__ void copy_activations(const Segment& at, int stage) const {
        const TensorMap* act = at.tile_m == args.schedule.num_m_tiles - 1 ? args.act_tail : args.act;
        const u32 to = smem + stage * T::kStageBytes, barrier = tokens(stage);
        mbarrier_arrive_expect(barrier, args.panel_rows(at.tile_m, T::BLOCK_M) * T::kTilesK * 128);
        tensor_copy(to, act, 0, at.tile_m * T::BLOCK_M, at.chunk * T::kTilesK, barrier);
    }

    __device__ __forceinline__ void run() const {
        const Schedule& s = args.schedule;
        const int num_chunks = s.num_local_chunks(), ahead = min(T::STAGES, num_chunks);
        prefetch_map(args.codes);
        if constexpr (T::kSparse) prefetch_map(args.meta);
        prefetch_map(args.scales);
        prefetch_map(args.act);
        prefetch_map(args.act_tail);
        Segment at{};
        auto next = [&](int i) {
            if (at.chunk == at.chunk_end) at.seek(s, i);
        };
        for (int i = 0; i < ahead; ++i, ++at.chunk) {
            next(i);
            copy_weights(at, i);
        }
        wait_for_previous_kernel();
        at = Segment{};
        for (int i = 0; i < ahead; ++i, ++at.chunk) {
            next(i);
            copy_activations(at, i);
        }
        int stage = 0, parity = 0;
        for (int i = ahead; i < num_chunks; ++i, ++at.chunk) {
            next(i);
            mbarrier_wait(empty(stage), parity);
            copy_weights(at, stage);
            copy_activations(at, stage);
            if (++stage == T::STAGES) stage = 0, parity ^= 1;
        }
    }
};

}  // namespace marlin
