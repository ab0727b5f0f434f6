// Runs one kernel variant on the host, block after block in random order. Built with -DTILE=... beside ptx.cuh (host).
#include "sm80_w4a16.cuh"

using T = marlin::Tile<TILE>;

static marlin::Args* arguments;

static void entry() {
    marlin::w4a16_kernel<T>(*arguments, host::smem);
    host::self->done = true;
    host::yield();
}

static void run_block(int threads, std::mt19937& random) {
    host::fibers.clear();
    host::fibers.resize(threads);
    host::warps.assign(threads / 32, {});
    host::block = {threads};
    for (int tid = 0; tid < threads; ++tid) {
        host::Fiber& fiber = host::fibers[tid];
        fiber.tid = tid;
        fiber.done = false;
        fiber.stack.reset(new char[64 << 10]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = 64 << 10;
        makecontext(&fiber.context, entry, 0);
    }
    std::vector<int> live(threads);
    for (int i = 0; i < threads; ++i) live[i] = i;
    while (!live.empty()) {
        std::shuffle(live.begin(), live.end(), random);
        for (int tid : live) {
            host::self = &host::fibers[tid];
            swapcontext(&host::scheduler, &host::self->context);
        }
        live.erase(std::remove_if(live.begin(), live.end(), [](int tid) { return host::fibers[tid].done; }), live.end());
    }
}

extern "C" int smem_bytes() { return T::kSmemBytes; }

// Returns how many times an instruction was given what it does not define.
extern "C" int run(const void* act, const void* codes, const void* meta, const void* scales, const void* bias, void* out,
                    void* workspace, int* tickets, const int* numbers, int grid, int seed) {
    const int* n = numbers;
    marlin::Args args{static_cast<const marlin::u16*>(act),
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
    host::violations = 0;
    std::mt19937 random(seed);
    std::vector<int> blocks(grid);
    for (int i = 0; i < grid; ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), random);
    host::grid_size = {grid};
    for (int block : blocks) {
        // Shared memory starts as 0xFF: NaN to whoever reads what nobody wrote.
        std::vector<float4> shared(T::kSmemBytes / 16 + 1);
        memset(shared.data(), 0xff, shared.size() * 16);
        host::smem = reinterpret_cast<char*>(shared.data());
        host::block_index = {block};
        run_block(T::kThreads, random);
    }
    return host::violations;
}
