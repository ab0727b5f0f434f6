// The kernel that expands packed rows, on the host. Built with -DTILE=... beside ptx.cuh (host).
#include "expand.cuh"

using T = TILE;

static const marlin::ExpandArgs* arguments;

static void kernel() { marlin::expand_kernel<T>(*arguments, host::self->block->smem.data()); }

extern "C" int smem_bytes() { return T::kSmemBytes; }

// Returns what host::run_grid does.
extern "C" int run(const void* codes, const void* meta, const void* scales, void* out, unsigned rows, unsigned k, int grid,
                   int seed) {
    const marlin::ExpandArgs args{static_cast<const marlin::u32*>(codes), static_cast<const marlin::u32*>(meta),
                                  static_cast<const marlin::u16*>(scales), static_cast<marlin::u16*>(out), rows, k};
    arguments = &args;
    return host::run_grid<kernel>(grid, 1, 4, T::kThreads, T::kSmemBytes, seed);
}
