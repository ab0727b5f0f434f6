// Which output tiles, and which chunks of K, a block works on.
//
// Tiles are [BLOCK_M tokens] x [BLOCK_N features]; K is cut into chunks of BLOCK_K. With T tiles on G blocks, the
// first T % G tiles are split: their chunks, laid end to end, are cut into G even stripes, one a block, so that no
// block idles; the other tiles go round-robin, whole. Stripes come first, so that the sums of split tiles overlap
// with whole tiles. A block meets at most two split tiles, since a stripe is no longer than a tile.
#pragma once

namespace marlin {

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Computed by the host (runtime/plan.py) and passed as kernel arguments: read from constant memory, no registers.
struct Schedule {
    int num_m_tiles, num_n_tiles, num_chunks;
    int num_split_tiles;  // T % G
    int stripe_chunks;    // ceil(num_split_tiles * num_chunks / G), at least 1
    int num_whole_tiles;  // a block: T / G

    __device__ __forceinline__ int stripe_begin() const {
        return min(static_cast<int>(blockIdx.x) * stripe_chunks, num_split_tiles * num_chunks);
    }
    __device__ __forceinline__ int stripe_length() const {
        return min(stripe_chunks, num_split_tiles * num_chunks - stripe_begin());
    }
    __device__ __forceinline__ int num_local_chunks() const { return stripe_length() + num_whole_tiles * num_chunks; }

    // Blocks that share split tile `tile`, in the order in which their parts are added.
    __device__ __forceinline__ int first_block(int tile) const { return tile * num_chunks / stripe_chunks; }
    __device__ __forceinline__ int last_block(int tile) const {
        return (tile * num_chunks + num_chunks - 1) / stripe_chunks;
    }
    // A block's workspace slot for a tile: 0 when its stripe begins inside the tile, 1 when it began before.
    __device__ __forceinline__ int slot(int block, int tile) const {
        return 2 * block + (block * stripe_chunks < tile * num_chunks ? 1 : 0);
    }
};

// A run of chunks of one tile.
struct Segment {
    int tile, tile_m, tile_n, chunk, chunk_end;

    // The one that holds the block's chunk number `local`, from that chunk on.
    __device__ __forceinline__ void seek(const Schedule& s, int local) {
        const int stripe = s.stripe_length();
        if (local < stripe) {
            const int unit = s.stripe_begin() + local;
            tile = unit / s.num_chunks;
            chunk = unit - tile * s.num_chunks;
            chunk_end = min(s.num_chunks, chunk + stripe - local);
        } else {
            tile = s.num_split_tiles + (local - stripe) / s.num_chunks * gridDim.x + blockIdx.x;
            chunk = (local - stripe) % s.num_chunks;
            chunk_end = s.num_chunks;
        }
        // Why: bands of 16 token tiles, features next, keep the activations of a band in L2 while weights stream.
        constexpr int kBand = 16;
        const int band = tile / (kBand * s.num_n_tiles);
        const int band_tiles = min(kBand, s.num_m_tiles - band * kBand);
        const int within = tile - band * kBand * s.num_n_tiles;
        tile_n = within / band_tiles;
        tile_m = band * kBand + within - tile_n * band_tiles;
    }
};

}  // namespace marlin
