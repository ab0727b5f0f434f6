// From the sums of a warpgroup to the output: add over warpgroups and blocks, add the bias, round once, store.
#pragma once
#include "tile_sm90.cuh"

namespace marlin {

template <class T>
struct Finisher {
    const Args90& args;
    u32 smem;
    char* smem_base;
    int thread, group_n, group_k;  // thread of the warpgroup

    __device__ __forceinline__ int lane() const { return thread % 32; }

    // From the sums of a tile, or of this block's part of one, to its output.
    __device__ __forceinline__ void finish(Sums90<T>& acc, const Segment& at) const {
        reduce_groups(acc);
        if (group_k > 0) return;
        if constexpr (T::kClusters) {
            reduce_cluster(acc);
        } else if constexpr (T::CLUSTER == 0) {
            if (at.tile < args.schedule.num_split_tiles && !reduce_blocks(acc, at.tile)) return;
        }
        store_tile(acc, at);
    }

    // Sums over the warpgroups that share features; those of group_k 0 hold them.
    __device__ __forceinline__ void reduce_groups(Sums90<T>& acc) const {
        if constexpr (T::WGS_K > 1) {
            float4* scratch = reinterpret_cast<float4*>(smem_base + T::STAGES * T::kStageBytes) + thread;
            sync_threads<T::kConsumers>(kBarrierMultipliers);  // the rows of the tile before are stored
            if (group_k > 0) {
#pragma unroll
                for (int b = 0; b < T::kTokenBlocks; ++b) {
                    scratch[(((group_k - 1) * T::WGS_N + group_n) * T::kTokenBlocks + b) * 128] =
                        make_float4(acc[b][0], acc[b][1], acc[b][2], acc[b][3]);
                }
            }
            sync_threads<T::kConsumers>(kBarrierMultipliers);
            if (group_k > 0) return;
#pragma unroll
            for (int g = 0; g < T::WGS_K - 1; ++g) {
#pragma unroll
                for (int b = 0; b < T::kTokenBlocks; ++b) {
                    const float4 part = scratch[((g * T::WGS_N + group_n) * T::kTokenBlocks + b) * 128];
                    acc[b][0] += part.x, acc[b][1] += part.y, acc[b][2] += part.z, acc[b][3] += part.w;
                }
            }
            sync_threads<128 * T::WGS_N>(kBarrierFinishers);  // before the scratch takes output rows
        }
    }

    // Whether this block of the cluster finishes a block of eight tokens.
    __device__ __forceinline__ bool owns(int token_block) const {
        return !T::kClusters || token_block / T::kOwnBlocks == cluster_rank();
    }

    // Sums over the blocks of a cluster: each sends what others finish, and adds what they send, in their order.
    __device__ __forceinline__ void reduce_cluster(Sums90<T>& acc) const {
        const int rank = cluster_rank();
        const u32 barrier = smem + T::kLastBarrierOffset;
        const u32 place = smem + T::kPartOffset + (group_n * 128 + thread) * 16;
        if constexpr (T::kPartsInRing) sync_cluster();  // all have read their rings
#pragma unroll
        for (int owner = 0; owner < T::CLUSTER; ++owner) {
            if (owner == rank) continue;
            const u32 to = in_block(place + (rank < owner ? rank : rank - 1) * T::kPartBytes, owner);
            const u32 to_barrier = in_block(barrier, owner);
#pragma unroll
            for (int b = owner * T::kOwnBlocks; b < min((owner + 1) * T::kOwnBlocks, T::kTokenBlocks); ++b) {
                store_remote(to + b % T::kOwnBlocks * T::WGS_N * 2048, acc[b], to_barrier);
            }
        }
        if (rank * T::kOwnBlocks >= T::kTokenBlocks) return;
        mbarrier_wait(barrier, 0);
#pragma unroll
        for (int b = 0; b < T::kTokenBlocks; ++b) {
            if (b / T::kOwnBlocks != rank) continue;
#pragma unroll
            for (int slot = 0; slot < T::CLUSTER - 1; ++slot) {
                u32 part[4];
                load_smem(part, place + slot * T::kPartBytes + b % T::kOwnBlocks * T::WGS_N * 2048);
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[b][i] += __uint_as_float(part[i]);
            }
        }
    }

    // Adds the parts of a split tile. Returns whether this block is the one that holds the sum.
    __device__ __forceinline__ bool reduce_blocks(Sums90<T>& acc, int tile) const {
        const Schedule& s = args.schedule;
        const int first = s.first_block(tile), last = s.last_block(tile);
        if (first == last) return true;
        constexpr int kSlot = T::WGS_N * T::kTokenBlocks * 128;
        const int place = group_n * T::kTokenBlocks * 128 + thread;
        float4* mine = args.workspace + s.slot(blockIdx.x, tile) * kSlot + place;
#pragma unroll
        for (int b = 0; b < T::kTokenBlocks; ++b) mine[b * 128] = make_float4(acc[b][0], acc[b][1], acc[b][2], acc[b][3]);
        int& arrived = *reinterpret_cast<int*>(smem_base + T::kLastBarrierOffset);
        sync_threads<128 * T::WGS_N>(kBarrierFinishers);
        if (group_n == 0 && thread == 0) {
            arrived = atomic_add_acq_rel(args.tickets + tile, 1);
            if (arrived == last - first) args.tickets[tile] = 0;
        }
        sync_threads<128 * T::WGS_N>(kBarrierFinishers);
        if (arrived != last - first) return false;
        // Why: parts are loaded in batches before any is added, since each batch costs a round trip to L2.
        constexpr int kLoads = T::BLOCK_M <= 16 ? 4 : 8;
        constexpr int kBatch = T::kTokenBlocks >= kLoads ? kLoads : T::kTokenBlocks, kBlocks = kLoads / kBatch;
#pragma unroll
        for (int b0 = 0; b0 < T::kTokenBlocks; b0 += kBatch) {
#pragma unroll
            for (int b = 0; b < kBatch; ++b) acc[b0 + b][0] = acc[b0 + b][1] = acc[b0 + b][2] = acc[b0 + b][3] = 0.0f;
#pragma unroll 1
            for (int block0 = first; block0 <= last; block0 += kBlocks) {
                float4 part[kBlocks][kBatch];
#pragma unroll
                for (int i = 0; i < kBlocks; ++i) {
                    const float4* from = args.workspace + s.slot(min(block0 + i, last), tile) * kSlot + place + b0 * 128;
#pragma unroll
                    for (int b = 0; b < kBatch; ++b) part[i][b] = load_l2(from + b * 128);
                }
#pragma unroll
                for (int i = 0; i < kBlocks; ++i) {
                    if (block0 + i > last) break;
#pragma unroll
                    for (int b = 0; b < kBatch; ++b) {
                        float(&sum)[4] = acc[b0 + b];
                        sum[0] += part[i][b].x, sum[1] += part[i][b].y, sum[2] += part[i][b].z, sum[3] += part[i][b].w;
                    }
                }
            }
        }
        return true;
    }

    // Adds the bias, rounds once, and stores whole rows of 64 features, gathered through shared memory.
    __device__ __forceinline__ void store_tile(Sums90<T>& acc, const Segment& at) const {
        const int warp = thread / 32, feature0 = at.tile_n * T::BLOCK_N + group_n * 64;
        if (args.bias != nullptr) {
#pragma unroll
            for (int hi = 0; hi < 2; ++hi) {
                const int feature = feature0 + warp * 16 + hi * 8 + lane() / 4;
                const float bias = feature < args.n ? to_float<T::kBf16>(args.bias[feature]) : 0.0f;
#pragma unroll
                for (int b = 0; b < T::kTokenBlocks; ++b) acc[b][2 * hi] += bias, acc[b][2 * hi + 1] += bias;
            }
        }
        // Rows of 128 bytes, one a token; 16-byte pieces swizzled by token % 8.
        const u32 rows = smem + T::STAGES * T::kStageBytes + group_n * T::kOutTokens * 128;
        const int piece = thread % 8, feature = feature0 + piece * 8;
#pragma unroll
        for (int b0 = 0; b0 < T::kTokenBlocks; b0 += T::kOutTokens / 8) {
            if (T::kOwnBlocks % (T::kOutTokens / 8) == 0 && !owns(b0)) continue;
            sync_threads<128>(kBarrierWarpgroup + group_n);
#pragma unroll
            for (int b = 0; b < T::kOutTokens / 8; ++b) {
                const float(&v)[4] = acc[b0 + b];
                const int token = b * 8 + lane() % 8, to = warp * 2 + lane() / 8 % 2;
                stmatrix_x2_trans(rows + token * 128 + (to ^ (token % 8)) * 16, to_pair<T::kBf16>(v[0], v[1]),
                                  to_pair<T::kBf16>(v[2], v[3]));
            }
            sync_threads<128>(kBarrierWarpgroup + group_n);
#pragma unroll
            for (int row = thread / 8; row < T::kOutTokens; row += 16) {
                const int token = at.tile_m * T::BLOCK_M + b0 * 8 + row;
                u32 word[4];
                load_smem(word, rows + row * 128 + (piece ^ (row % 8)) * 16);
                if (token < args.m && feature < args.n && owns(b0 + row / 8)) {
                    store_gmem(args.out + static_cast<u64>(token) * args.n + feature, word);
                }
            }
        }
    }
};

}  // namespace marlin
