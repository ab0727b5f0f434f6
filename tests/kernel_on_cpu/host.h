// The machine that kernels run on when they are built for the host. A GPU thread is a fiber; an instruction that
// involves a whole warp, or a barrier, waits until all have come. The order of fibers is random, warps stall and blocks
// start late at random, so that a missing wait or barrier shows as a wrong number. Shared memory starts as 0xFF: NaN to
// whoever reads what nobody wrote.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static
using std::max;
using std::min;
struct float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace host {

struct Index {
    int x;
};
struct Copy {  // of cp.async
    uint32_t smem;
    const void* gmem;
    int bytes;
};
struct Product {  // of wgmma, as one thread gave it
    void (*compute)(const Product* const (&lanes)[32]);
    float (*sums)[4];
    const uint32_t *a, *meta;
    uint64_t tokens;
    int group;
    uint32_t given[5];  // a and meta at that time
};
struct Block;
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Block* block;
    int tid;
    bool done = false;
    const int* waits_for = nullptr;  // asleep while it is what was seen
    int seen;
    std::vector<std::vector<Copy>> groups;  // of copies, committed
    std::vector<Copy> open;                 // not yet
    std::vector<Product> products;          // that have not run
    int product_groups = 0;                 // committed
    bool fenced = false;
};
struct Group {  // of fibers that meet
    int size, count = 0, generation = 0;
};
struct Warp {
    Group group{32};
    uint32_t in[32][16], out[32][8];
    float sums[32][4];
    int stalled = 0;  // rounds
};
struct Mbarrier {
    int arrivals, pending, phase;
    long bytes;
};
struct Block {
    int index, rank, cluster;  // in the grid, in the cluster, and which of those that run together
    bool late;  // starts after all others are done, or wait
    std::vector<char> smem;
    std::vector<Warp> warps;
    Group all;
    std::map<int, Group> named;
    std::map<uint32_t, Mbarrier> mbarriers;
};

// Where a block's shared memory begins, and how far that of one block is from that of the next.
constexpr uint32_t kSmemBase = 1024, kWindow = 1u << 24;

// Why static: the loader would share inline variables between all variants of a process.
static int violations;  // of an instruction's preconditions
static std::mt19937 dice;
static ucontext_t scheduler;
static std::vector<Fiber> fibers;  // of the blocks that run together
static std::vector<Block> blocks;
static std::vector<Group> clusters;  // of all their threads that have not ended
static Fiber* self;
static int grid_size;
static std::vector<std::function<void()>> in_flight;  // what lands in memory later
// Programmatic dependent launch: what the kernel before leaves behind, as late as somebody can wait for it.
static std::function<void()> previous_kernel;
static int previous_ended;

inline void require(bool holds) { violations += !holds; }
inline void yield() { swapcontext(&self->context, &scheduler); }
inline void sleep_while(const int& place, int value) {
    while (place == value) {
        self->waits_for = &place;
        self->seen = value;
        yield();
    }
    self->waits_for = nullptr;
}
// For a few rounds, mostly, and sometimes for many.
inline void stall(Warp& warp) { warp.stalled = dice() % (1 << dice() % 12); }
template <class F>
void meet(Group& group, F last) {
    if (++group.count == group.size) {
        last();
        group.count = 0;
        ++group.generation;
        // Why: the first to leave a barrier may be far ahead of the last.
        if (group.size > 32) stall(self->block->warps[dice() % self->block->warps.size()]);
    } else {
        sleep_while(group.generation, group.generation);
    }
}
inline Warp& warp() { return self->block->warps[self->tid / 32]; }
inline int lane() { return self->tid % 32; }

// Shared memory at an address: of this block, or in the window of any.
inline Block& block_at(uint32_t address) {
    const uint32_t window = address / kWindow;
    require(window <= blocks.size());
    return window == 0 || window > blocks.size() ? *self->block : blocks[window - 1];
}
inline char* smem_at(uint32_t address, size_t bytes) {
    static char elsewhere[1 << 18];
    Block& block = block_at(address);
    const size_t offset = address % kWindow - kSmemBase;
    const bool inside = offset + bytes <= block.smem.size() && address % kWindow >= kSmemBase;
    require(inside);
    return inside ? block.smem.data() + offset : elsewhere;
}

// Some of what is in flight lands, in random order.
inline void land() {
    std::shuffle(in_flight.begin(), in_flight.end(), dice);
    for (size_t left = 1 + dice() % in_flight.size(); left > 0; --left) {
        const auto one = std::move(in_flight.back());
        in_flight.pop_back();
        one();
    }
}

template <void (*kKernel)()>
void entry() {
    kKernel();
    require(self->products.empty());
    self->done = true;
    Group& cluster = clusters[self->block->cluster];
    if (--cluster.size == cluster.count && cluster.count > 0) cluster.count = 0, ++cluster.generation;
    yield();
}

// Fibers that can go on. Warps stall at random.
inline std::vector<Fiber*> awake() {
    for (Block& block : blocks) {
        for (Warp& warp : block.warps) {
            if (warp.stalled > 0) {
                --warp.stalled;
            } else if (dice() % 64 == 0) {
                stall(warp);
            }
        }
    }
    std::vector<Fiber*> result;
    for (Fiber& fiber : fibers) {
        const bool asleep = fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen;
        const bool held = fiber.block->late || fiber.block->warps[fiber.tid / 32].stalled > 0;
        if (!fiber.done && !asleep && !held) result.push_back(&fiber);
    }
    return result;
}
// What happens when no fiber can go on: first all that is in flight lands, then one of the things that hold fibers up
// ends. False: nothing.
inline bool proceed() {
    if (!in_flight.empty()) {
        land();
        return true;
    }
    std::vector<std::function<void()>> held;
    for (Block& block : blocks) {
        if (block.late) held.push_back([&block] { block.late = false; });
        for (Warp& warp : block.warps) {
            if (warp.stalled > 0) held.push_back([&warp] { warp.stalled = 0; });
        }
    }
    if (previous_kernel && !previous_ended) held.push_back([] { previous_kernel(), previous_ended = 1; });
    if (held.empty()) return false;
    held[dice() % held.size()]();
    return true;
}

inline void start(Fiber& fiber, Block& block, int tid, void (*run)()) {
    constexpr int kStackBytes = 64 << 10;
    fiber.block = &block;
    fiber.tid = tid;
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, run, 0);
}

// Runs clusters of blocks to their end, all at once; each is given by its first block. Returns whether they came to
// one: false when all threads that are left wait.
template <void (*kKernel)()>
bool run_together(const std::vector<int>& first_blocks, int cluster_size, int threads, int smem_bytes) {
    const int count = first_blocks.size() * cluster_size;
    blocks.assign(count, {});
    clusters.assign(first_blocks.size(), {cluster_size * threads});
    fibers.clear();
    fibers.resize(count * threads);
    in_flight.clear();
    for (int i = 0; i < count; ++i) {
        Block& block = blocks[i];
        block.cluster = i / cluster_size, block.rank = i % cluster_size;
        block.index = first_blocks[block.cluster] + block.rank;
        block.late = dice() % 4 == 0;
        block.smem.assign(smem_bytes, '\xff');
        block.warps.assign(threads / 32, {});
        block.all = {threads};
        for (int tid = 0; tid < threads; ++tid) start(fibers[i * threads + tid], block, tid, entry<kKernel>);
    }
    const auto done = [](const Fiber& fiber) { return fiber.done; };
    while (!std::all_of(fibers.begin(), fibers.end(), done)) {
        std::vector<Fiber*> runnable = awake();
        if (runnable.empty() && !proceed()) return false;
        std::shuffle(runnable.begin(), runnable.end(), dice);
        for (Fiber* fiber : runnable) {
            self = fiber;
            swapcontext(&scheduler, &self->context);
        }
        if (!in_flight.empty() && dice() % 8 == 0) land();
    }
    require(in_flight.empty());
    return true;
}

// Runs a grid, its clusters in random order, `resident` of them at a time. Returns how many instructions were given
// what they do not define, or -1 when threads wait forever.
template <void (*kKernel)()>
int run_grid(int grid, int cluster_size, int resident, int threads, int smem_bytes, int seed) {
    violations = previous_ended = 0;
    grid_size = grid;
    dice.seed(seed);
    std::vector<int> first;
    for (int i = 0; i < grid; i += cluster_size) first.push_back(i);
    std::shuffle(first.begin(), first.end(), dice);
    for (size_t i = 0; i < first.size(); i += resident) {
        const std::vector<int> some(first.begin() + i, first.begin() + min(i + resident, first.size()));
        if (!run_together<kKernel>(some, cluster_size, threads, smem_bytes)) return -1;
    }
    return violations;
}

inline float half_to_float(uint32_t bits, bool bf16) {
    if (bf16) {
        bits <<= 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    _Float16 value;
    const uint16_t low = static_cast<uint16_t>(bits);
    memcpy(&value, &low, 2);
    return static_cast<float>(value);
}
inline uint32_t double_to_half(double value, bool bf16) {
    if (!bf16) {
        const _Float16 rounded = static_cast<_Float16>(value);
        uint16_t bits;
        memcpy(&bits, &rounded, 2);
        return bits;
    }
    float single = static_cast<float>(value);
    // Round to odd in fp32 first, so that the second rounding is as one.
    uint32_t bits;
    memcpy(&bits, &single, 4);
    if (static_cast<double>(single) != value && std::isfinite(single)) {
        if (std::fabs(static_cast<double>(single)) > std::fabs(value)) --bits;
        bits |= 1;
    }
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits >> 16;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t pair_of(double low, double high, bool bf16) {
    return double_to_half(low, bf16) | double_to_half(high, bf16) << 16;
}
inline float half_of(uint32_t word, int half, bool bf16) { return half_to_float(word >> (16 * half) & 0xffff, bf16); }

}  // namespace host

#define threadIdx (host::Index{host::self->tid})
#define blockIdx (host::Index{host::self->block->index})
#define gridDim (host::Index{host::grid_size})
inline void __syncthreads() { host::meet(host::self->block->all, [] {}); }
inline void __syncwarp() { host::meet(host::warp().group, [] {}); }
inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
