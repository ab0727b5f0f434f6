// One variant of the kernels for Ampere and newer, on the host. Built with -DTILE=... beside ptx.cuh (host).
#include "sm80_w4a16.cuh"

using T = TILE;

static const marlin::Args* arguments;

static void kernel() { marlin::w4a16_kernel<T>(*arguments, host::self->block->smem.data()); }

extern "C" int smem_bytes() { return T::kSmemBytes; }

// Returns what host::run_grid does.
extern "C" int run(const void* act, const void* codes, const void* meta, const void* scales, const void* bias,
                   void* out, void* workspace, int* tickets, const int* numbers, int grid, int seed) {
    const int* n = numbers;
    const marlin::Args args{static_cast<const marlin::u16*>(act),
                            static_cast<const marlin::u32*>(codes),
                            static_cast<const marlin::u32*>(meta),
                            static_cast<const marlin::u16*>(scales),
                            static_cast<const marlin::u16*>(bias),
                            static_cast<marlin::u16*>(out),
                            static_cast<float4*>(workspace),
                            tickets,
                            n[0], n[1], n[2], n[3],
                            {n[4], n[5], n[6], n[7], n[8], n[9]}};
    arguments = &args;
    // Why one block at a time: its __shared__ variables are static here.
    return host::run_grid<kernel>(grid, 1, 1, T::kThreads, T::kSmemBytes, seed);
}
