// From the sums of a warp to the output: add over warps and blocks, add the bias, round once, store.
#pragma once
#include "tile.cuh"

namespace marlin {

__device__ __forceinline__ void add(float (&sum)[4], float4 part, bool first) {
    sum[0] = (first ? 0.0f : sum[0]) + part.x;
    sum[1] = (first ? 0.0f : sum[1]) + part.y;
    sum[2] = (first ? 0.0f : sum[2]) + part.z;
    sum[3] = (first ? 0.0f : sum[3]) + part.w;
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
    static_assert(T::kFragsM <= 8 ? 8 % T::kFragsM == 0 : T::kFragsM % 8 == 0);
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
    // Why: parts are loaded in batches of eight before any is added, since each batch costs a round trip to L2; larger
    // batches would not fit beside the sums of a large tile.
    constexpr int kBlocks = T::kFragsM >= 8 ? 1 : 8 / T::kFragsM, kFrags = T::kFragsM >= 8 ? 8 : T::kFragsM;
#pragma unroll
    for (int f = 0; f < T::kOwnFragsN; ++f) {
#pragma unroll
        for (int b0 = 0; b0 < T::kFragsM; b0 += kFrags) {
#pragma unroll 1
            for (int block0 = first; block0 <= last; block0 += kBlocks) {
                float4 part[kBlocks][kFrags];
#pragma unroll
                for (int i = 0; i < kBlocks; ++i) {
                    const float4* from = args.workspace + s.slot(min(block0 + i, last), tile) * kSlot + threadIdx.x;
#pragma unroll
                    for (int b = 0; b < kFrags; ++b) {
                        part[i][b] = load_l2(from + (f * T::kFragsM + b0 + b) * T::kThreads);
                    }
                }
#pragma unroll
                for (int i = 0; i < kBlocks; ++i) {
                    if (block0 + i > last) break;
#pragma unroll
                    for (int b = 0; b < kFrags; ++b) add(acc[f][b0 + b], part[i][b], block0 + i == first);
                }
            }
        }
    }
    return true;
}

template <class T>
__device__ __forceinline__ void add_bias(Sums<T>& acc, const Args& args, int feature0, int lane) {
    if (args.bias == nullptr) return;
#pragma unroll
    for (int f = 0; f < T::kOwnFragsN; ++f) {
#pragma unroll
        for (int hi = 0; hi < 2; ++hi) {
            const int feature = feature0 + f * 16 + hi * 8 + lane / 4;
            const float bias = feature < args.n ? to_float<T::kBf16>(args.bias[feature]) : 0.0f;
#pragma unroll
            for (int b = 0; b < T::kFragsM; ++b) {
                acc[f][b][2 * hi] += bias;
                acc[f][b][2 * hi + 1] += bias;
            }
        }
    }
}

// Rounds once, and stores 32 bytes per token and fragment, gathered to 16-byte pieces through shared memory.
template <class T>
__device__ __forceinline__ void store_tile(Sums<T>& acc, const Args& args, const Segment& at, u32 smem,
                                           const Thread<T>& th) {
    const int lane = th.lane, first_frag = th.warp_n * T::kFragsN + th.warp_k * T::kOwnFragsN;
    add_bias<T>(acc, args, at.tile_n * T::BLOCK_N + first_frag * 16, lane);
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

}  // namespace marlin
