// A kernel between products, on the host. Built with -DTILE=... beside ptx.cuh and ptx_sm90.cuh (host).
#include "host.h"

static int num_threads;
#define blockDim (host::Index{num_threads})
inline float __shfl_xor_sync(uint32_t mask, float value, int distance) {
    host::require(mask == 0xffffffffu);
    host::Warp& w = host::warp();
    memcpy(&w.in[host::lane()][0], &value, 4);
    host::meet(w.group, [&] {
        for (int lane = 0; lane < 32; ++lane) w.out[lane][0] = w.in[lane ^ distance][0];
    });
    memcpy(&value, &w.out[host::lane()][0], 4);
    return value;
}

#include "rowwise.cuh"

using T = TILE;
using marlin::u16;

static const void* arguments;

template <bool kAdd, bool kBf16, int kPieces, bool kEarly>
void run_thread(marlin::Norm<kAdd, kBf16, kPieces, kEarly>) {
    const auto& args = *static_cast<const marlin::NormArgs*>(arguments);
    marlin::norm_kernel<T>(args, reinterpret_cast<float*>(host::self->block->smem.data()));
}
template <bool kBf16, int kPieces, int kThreads, bool kEarly>
void run_thread(marlin::Silu<kBf16, kPieces, kThreads, kEarly>) {
    marlin::silu_kernel<T>(*static_cast<const marlin::SiluArgs*>(arguments));
}
static void kernel() { run_thread(T{}); }

extern "C" int smem_bytes() { return T::kSmemBytes; }

// What the kernel before this one leaves in memory.
struct Left {
    void* to;
    const void* from;
    size_t bytes;
};

static int run(const void* args, int grid, int threads, int seed, const Left* left, int count) {
    arguments = args;
    num_threads = threads;
    // Without an early start the kernel before has ended when this one begins.
    const auto leave = [=] {
        for (int i = 0; i < count; ++i) memcpy(left[i].to, left[i].from, left[i].bytes);
    };
    if (T::kEarly) {
        host::previous_kernel = leave;
    } else {
        host::previous_kernel = nullptr;
        leave();
    }
    return host::run_grid<kernel>(grid, 1, 3, threads, T::kSmemBytes, seed);
}

// Both return what host::run_grid does.
extern "C" int run_norm(const u16* x, const u16* residual, const u16* weight, u16* out, u16* sum, unsigned hidden,
                        unsigned x_stride, unsigned residual_stride, float eps, int grid, int threads, int seed,
                        const Left* left, int count) {
    const marlin::NormArgs args{x, residual, weight, out, sum, hidden, x_stride, residual_stride, eps};
    return run(&args, grid, threads, seed, left, count);
}
extern "C" int run_silu(const u16* x, u16* out, unsigned width, unsigned x_stride, unsigned blocks_of_a_row, int grid,
                        int threads, int seed, const Left* left, int count) {
    const marlin::SiluArgs args{x, out, width, x_stride, blocks_of_a_row};
    return run(&args, grid, threads, seed, left, count);
}
