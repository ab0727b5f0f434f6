// Kernels between products, row by row: RMS norm, plain or after adding a residual, and SiLU-and-multiply.
//
//   norm:  out = round(z * rsqrt(mean(z^2) + eps)) * weight, with z = x, or z = round(x + residual), which is stored too
//   silu:  out = round(silu(gate)) * up, where a row of x is gate and up, one after the other
//
// Numbers:  a value is fp16 or bf16; each round() above and each product is rounded once; all else is fp32. A row's bits
//           depend on that row alone: sums are added in an order that follows from the extents of a row.
// Thread:   kPieces pieces of 16 bytes (8 values), in registers from their load to the store.
// Block:    norm: a row. Sums of threads go through the warp, then through shared memory, one float a warp.
//           silu: kPieces * kThreads neighbouring pieces of a row's output.
// Launch:   with kEarly a kernel lets the next one start at once, and waits for the one before it when it needs its
//           results (programmatic dependent launch). Who does what is below.
//
// Early starts, in a chain product - norm - product, all launched with the attribute:
//
//   1. A block says launch_dependents first of all. The next kernel may start when every block of this one has: then all
//      of them are on a multiprocessor or done. So no kernel takes the place of a block that it waits for.
//   2. Before its griddepcontrol.wait a kernel touches only what no kernel of the chain writes: this one the norm's
//      weight, a product its packed weight. It fills shared memory with that while the kernels before it run.
//   3. The wait ends when the kernel before has ended, all its blocks, and what it wrote is visible. In every kernel some
//      thread waits before it ends (here all do), so that a kernel that has ended had waited for the one before it, and
//      that one for the one before it: after a wait, all kernels earlier in the stream are done. So a kernel may read what
//      any of them wrote, and write where any of them read or wrote, also in memory that was handed out again.
//   4. A kernel of others in between is launched without the attribute: it starts when all before it have ended,
//      whatever they said, and reads without a wait. If it never says launch_dependents, the one after it starts when
//      it has ended; if it does, rule 3 holds for the one after it, as it waits all the same.
//
// What must not be: a kernel launched with the attribute that reads without a wait, or a weight that is written by a
// kernel which lets its successor start early.
#pragma once
#include "ptx_sm90.cuh"

namespace marlin {

constexpr u32 kPieceValues = 8, kMaxWarps = 32;

template <bool kEarly>
__device__ __forceinline__ void start_early() {
    if constexpr (kEarly) let_next_kernel_start();
}
template <bool kEarly>
__device__ __forceinline__ void wait_if_early() {
    if constexpr (kEarly) wait_for_previous_kernel();
}

// Products and sums of pairs, rounded once. Adding -0 changes no product, not even a zero's sign.
template <bool kBf16>
__device__ __forceinline__ u32 mul_pair(u32 a, u32 b) {
    return fma_pair<kBf16>(a, b, 0x80008000u);
}
template <bool kBf16>
__device__ __forceinline__ u32 add_pair(u32 a, u32 b) {
    return fma_pair<kBf16>(a, kBf16 ? 0x3f803f80u : 0x3c003c00u, b);
}

struct NormArgs {
    const u16 *x, *residual, *weight;  // residual: where kAdd
    u16 *out, *sum;                    // sum: z, where kAdd
    u32 hidden;                        // values of a row, a multiple of 8
    u32 x_stride, residual_stride;     // in values, multiples of 8
    float eps;
};

template <bool kAdd_, bool kBf16_, int kPieces_, bool kEarly_>
struct Norm {
    static constexpr bool kAdd = kAdd_, kBf16 = kBf16_, kEarly = kEarly_;
    static constexpr int kPieces = kPieces_, kSmemBytes = kMaxWarps * 4;
};

// The sum over a block, the same bits in every thread; `sums` has room for a float of each warp.
__device__ __forceinline__ float sum_of_block(float value, float* sums, u32 tid) {
    const u32 warp = tid / 32, lane = tid % 32;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    if (blockDim.x == 32) return value;
    if (lane == 0) sums[warp] = value;
    __syncthreads();
    value = lane < blockDim.x / 32 ? sums[lane] : 0.0f;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

template <class T>
__device__ __forceinline__ void norm_kernel(const NormArgs& args, float* sums) {
    start_early<T::kEarly>();
    const u32 tid = thread_index(), pieces = args.hidden / kPieceValues;
    const u64 row = blockIdx.x;
    u32 weight[T::kPieces][4], z[T::kPieces][4], residual[T::kPieces][4];
#pragma unroll
    for (int i = 0; i < T::kPieces; ++i) {
        const u32 piece = tid + i * blockDim.x;
        if (piece < pieces) load_gmem(weight[i], args.weight + piece * kPieceValues);
    }
    wait_if_early<T::kEarly>();
#pragma unroll
    for (int i = 0; i < T::kPieces; ++i) {
        const u32 piece = tid + i * blockDim.x;
        if (piece >= pieces) continue;
        load_l2(z[i], args.x + row * args.x_stride + piece * kPieceValues);
        if constexpr (T::kAdd) {
            load_l2(residual[i], args.residual + row * args.residual_stride + piece * kPieceValues);
        }
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < T::kPieces; ++i) {
        const u32 piece = tid + i * blockDim.x;
        if (piece >= pieces) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if constexpr (T::kAdd) z[i][j] = add_pair<T::kBf16>(z[i][j], residual[i][j]);
            const float low = to_float<T::kBf16>(z[i][j]), high = to_float<T::kBf16>(z[i][j] >> 16);
            squares += low * low;
            squares += high * high;
        }
        if constexpr (T::kAdd) store_gmem(args.sum + row * args.hidden + piece * kPieceValues, z[i]);
    }
    const float mean = sum_of_block(squares, sums, tid) / static_cast<float>(args.hidden);
    const float scale = reciprocal_sqrt(mean + args.eps);
#pragma unroll
    for (int i = 0; i < T::kPieces; ++i) {
        const u32 piece = tid + i * blockDim.x;
        if (piece >= pieces) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float low = to_float<T::kBf16>(z[i][j]), high = to_float<T::kBf16>(z[i][j] >> 16);
            z[i][j] = mul_pair<T::kBf16>(to_pair<T::kBf16>(low * scale, high * scale), weight[i][j]);
        }
        store_gmem(args.out + row * args.hidden + piece * kPieceValues, z[i]);
    }
}

struct SiluArgs {
    const u16* x;
    u16* out;
    u32 width;            // values of a row of the output, a multiple of 8
    u32 x_stride;         // in values, a multiple of 8
    u32 blocks_of_a_row;  // each with kPieces * kThreads pieces
};

template <bool kBf16_, int kPieces_, int kThreads_, bool kEarly_>
struct Silu {
    static constexpr bool kBf16 = kBf16_, kEarly = kEarly_;
    static constexpr int kPieces = kPieces_, kThreads = kThreads_, kSmemBytes = 0;
};

// As torch computes it: the exponential and the quotient in fp32.
__device__ __forceinline__ float silu(float value) { return value / (1.0f + expf(-value)); }

template <class T>
__device__ __forceinline__ void silu_kernel(const SiluArgs& args) {
    start_early<T::kEarly>();
    const u32 row = blockIdx.x / args.blocks_of_a_row, part = blockIdx.x - row * args.blocks_of_a_row;
    const u32 first = part * (T::kPieces * T::kThreads) + thread_index(), pieces = args.width / kPieceValues;
    const u16* gates = args.x + static_cast<u64>(row) * args.x_stride;
    u16* out = args.out + static_cast<u64>(row) * args.width;
    u32 gate[T::kPieces][4], up[T::kPieces][4];
    wait_if_early<T::kEarly>();
#pragma unroll
    for (int i = 0; i < T::kPieces; ++i) {
        const u32 piece = first + i * T::kThreads;
        if (piece >= pieces) continue;
        load_l2(gate[i], gates + piece * kPieceValues);
        load_l2(up[i], gates + args.width + piece * kPieceValues);
    }
#pragma unroll
    for (int i = 0; i < T::kPieces; ++i) {
        const u32 piece = first + i * T::kThreads;
        if (piece >= pieces) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float low = to_float<T::kBf16>(gate[i][j]), high = to_float<T::kBf16>(gate[i][j] >> 16);
            gate[i][j] = mul_pair<T::kBf16>(to_pair<T::kBf16>(silu(low), silu(high)), up[i][j]);
        }
        store_gmem(out + piece * kPieceValues, gate[i]);
    }
}

}  // namespace marlin
