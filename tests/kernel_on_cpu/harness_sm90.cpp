// One variant of the kernels for Hopper, on the host. Built with -DTILE=... and -DBF16=... beside ptx_sm90.cuh (host).
#include "sm90_w4a16.cuh"

using T = TILE;

static const marlin::Args90* arguments;

static void kernel() { marlin::w4a16_kernel_sm90<T>(*arguments, host::self->block->smem.data()); }

extern "C" int smem_bytes() { return T::kSmemBytes; }
extern "C" int threads() { return T::kThreads; }

// What the kernel before this one leaves in memory.
struct Left {
    void* to;
    const void* from;
    size_t bytes;
};

// Returns what host::run_grid does.
extern "C" int run(const marlin::TensorMap* maps, const void* bias, void* out, void* workspace, int* tickets,
                   const int* numbers, int grid, int cluster, int seed, const Left* left, int count) {
    const int* n = numbers;
    const marlin::Args90 args{&maps[0], &maps[1], &maps[2], &maps[3], &maps[4],
                              static_cast<const marlin::u16*>(bias),
                              static_cast<marlin::u16*>(out),
                              static_cast<float4*>(workspace),
                              tickets,
                              n[0], n[1], n[2], n[3],
                              {n[4], n[5], n[6], n[7], n[8], n[9]}};
    arguments = &args;
    host::previous_kernel = [=] {
        for (int i = 0; i < count; ++i) memcpy(left[i].to, left[i].from, left[i].bytes);
    };
    return host::run_grid<kernel>(grid, std::max(cluster, 1), 3, T::kThreads, T::kSmemBytes, seed);
}
