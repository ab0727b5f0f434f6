// Stands in for src/marlin/kernels/ptx_sm90.cuh, and for the text of runtime/wgmma.py, when the Hopper kernel is built
// for the host. What hardware does some time between an instruction and the wait for it happens here at the worst time:
// the copy engine and stores to other blocks spoil their target at once and fill it late, in random order; products
// read registers and shared memory, and change sums, when they are waited for. Not modelled: the order between accesses
// of the copy engine and those of threads (proxy fences), and how many registers there are.
#pragma once
#include "ptx.cuh"

inline uint32_t __shfl_sync(uint32_t mask, uint32_t value, int source) {
    host::require(mask == 0xffffffffu);
    host::Warp& w = host::warp();
    w.in[host::lane()][0] = value;
    host::meet(w.group, [&] {
        for (int lane = 0; lane < 32; ++lane) w.out[lane][0] = w.in[source][0];
    });
    return w.out[host::lane()][0];
}

namespace host {

// A barrier lies in its eight bytes: whoever writes there breaks it.
constexpr uint64_t kMbarrierMark = 0x6d62617272696572;

inline Mbarrier& mbarrier_at(uint32_t address) {
    static Mbarrier none;
    none = {1 << 20, 1 << 20, 0, 0};
    uint64_t mark;
    memcpy(&mark, smem_at(address, 8), 8);
    const auto found = block_at(address).mbarriers.find(address % kWindow);
    require(mark == kMbarrierMark && found != block_at(address).mbarriers.end());
    return found == block_at(address).mbarriers.end() ? none : found->second;
}
inline void advance(Mbarrier& barrier, int arrivals, long bytes) {
    constexpr long kMaxBytes = (1 << 20) - 1;
    require(barrier.pending >= arrivals);
    barrier.pending -= arrivals;
    barrier.bytes += bytes;
    require(std::labs(barrier.bytes) <= kMaxBytes);
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.arrivals, barrier.phase ^= 1;
}
// An address of this block as that in the window of a block of its cluster.
inline uint32_t in_window(uint32_t address, int rank) {
    return address + (self->block - blocks.data() - self->block->rank + rank + 1) * kWindow;
}

}  // namespace host

namespace marlin {

// What `encode_map` of machine.py packs.
struct alignas(64) TensorMap {
    const char* pointer;
    u64 extent[3], stride[2];  // strides in bytes, of the second and third dimension
    u32 box[3], element_bytes, swizzled;
};
static_assert(sizeof(TensorMap) == 128);

inline void mbarrier_init(u32 barrier, int arrivals) {
    host::require(barrier % 8 == 0 && arrivals > 0);
    memcpy(host::smem_at(barrier, 8), &host::kMbarrierMark, 8);
    host::self->block->mbarriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(u32 barrier) { host::advance(host::mbarrier_at(barrier), 1, 0); }
inline void mbarrier_arrive_expect(u32 barrier, int bytes) { host::advance(host::mbarrier_at(barrier), 1, bytes); }
inline void mbarrier_wait(u32 barrier, int parity) { host::sleep_while(host::mbarrier_at(barrier).phase, parity); }

inline u32 swizzled(u32 address) { return address ^ (address >> 3 & 0x70); }
inline void land_box(u32 smem, const TensorMap& map, const int (&at)[3]) {
    const u32 bytes = map.element_bytes;
    for (u32 z = 0; z < map.box[2]; ++z) {
        for (u32 y = 0; y < map.box[1]; ++y) {
            for (u32 x = 0; x < map.box[0]; ++x, smem += bytes) {
                const long place[3] = {at[0] + long(x), at[1] + long(y), at[2] + long(z)};
                bool inside = true;
                for (int i = 0; i < 3; ++i) inside = inside && place[i] >= 0 && place[i] < long(map.extent[i]);
                char* to = host::smem_at(map.swizzled ? swizzled(smem) : smem, bytes);
                memset(to, 0, bytes);
                if (inside) {
                    const long offset = place[0] * bytes + place[1] * map.stride[0] + place[2] * map.stride[1];
                    memcpy(to, map.pointer + offset, bytes);
                }
            }
        }
    }
}
inline void tensor_copy(u32 smem, const TensorMap* map, int x, int y, int z, u32 barrier) {
    const u32 bytes = map->box[0] * map->box[1] * map->box[2] * map->element_bytes;
    host::require(smem % 128 == 0);
    memset(host::smem_at(smem, bytes), 0xff, bytes);
    const int rank = host::self->block->rank;
    smem = host::in_window(smem, rank), barrier = host::in_window(barrier, rank);
    host::in_flight.push_back([=] {
        land_box(smem, *map, {x, y, z});
        host::advance(host::mbarrier_at(barrier), 0, -long(bytes));
    });
}
inline void prefetch_map(const TensorMap*) {}

inline void sync_cluster() { host::meet(host::clusters[host::self->block->cluster], [] {}); }
inline int cluster_rank() { return host::self->block->rank; }
inline u32 in_block(u32 smem, int rank) { return host::in_window(smem, rank); }
inline void store_remote(u32 remote, const float (&value)[4], u32 remote_barrier) {
    host::require(remote >= host::kWindow && remote / host::kWindow == remote_barrier / host::kWindow);
    host::require(remote % 16 == 0);
    host::mbarrier_at(remote_barrier);
    memset(host::smem_at(remote, 16), 0xff, 16);
    const float4 sent{value[0], value[1], value[2], value[3]};
    host::in_flight.push_back([=] {
        memcpy(host::smem_at(remote, 16), &sent, 16);
        host::advance(host::mbarrier_at(remote_barrier), 0, -16);
    });
}

inline void wait_for_previous_kernel() { host::sleep_while(host::previous_ended, 0); }
inline void let_next_kernel_start() {}

template <int kThreads>
void sync_threads(int barrier) {
    static_assert(kThreads % 32 == 0);
    host::require(barrier > 0 && barrier < 16);
    host::Group& group = host::self->block->named[barrier];
    host::require(group.count == 0 || group.size == kThreads);
    group.size = kThreads;
    host::meet(group, [] {});
}

// Sums of a warp's 16 rows: += A x B, A of `columns` stored values, each times the row of B that `column` says.
template <int kBlocks, bool kSparse, int kSelector>
void compute_product(const host::Product* const (&lanes)[32]) {
    constexpr int kTokens = 8 * kBlocks, kColumns = kSparse ? 32 : 16;
    static float tokens[kColumns][kTokens];
    const u64 descriptor = lanes[0]->tokens;
    const u32 begin = (descriptor & 0x3fff) * 16, stride = (descriptor >> 32 & 0x3fff) * 16;
    host::require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0);  // 128-byte swizzle, no base offset
    for (int n = 0; n < kTokens; ++n) {
        for (int k = 0; k < kColumns; k += 8) {
            u16 piece[8];
            memcpy(piece, host::smem_at(swizzled(begin + n / 8 * stride + n % 8 * 128 + k * 2), 16), 16);
            for (int i = 0; i < 8; ++i) tokens[k + i][n] = host::half_to_float(piece[i], BF16);
        }
    }
    for (int row = 0; row < 16; ++row) {
        const int g = row % 8, hi = row / 8;
        double sums[kTokens];
        for (int n = 0; n < kTokens; ++n) sums[n] = lanes[4 * g + n % 8 / 2]->sums[n / 8][2 * hi + n % 2];
        for (int pair = 0; pair < 8; ++pair) {
            const u32 word = lanes[4 * g + pair % 4]->a[2 * (pair / 4) + hi];
            int column[2] = {2 * pair, 2 * pair + 1};
            if constexpr (kSparse) {
                const u32 meta = *lanes[4 * g + 2 * kSelector + pair / 4]->meta >> (4 * (pair % 4) + 16 * hi) & 15;
                column[0] = 4 * pair + (meta & 3), column[1] = 4 * pair + (meta >> 2);
                // What other metadata picks is undefined, but all the same where the columns or the values are zero.
                if (column[0] >= column[1] && (word & 0x7fff7fffu) != 0) {
                    for (int n = 0; n < kTokens; ++n) {
                        for (int k = 4 * pair; k < 4 * pair + 4; ++k) {
                            if (tokens[k][n] != 0.0f) sums[n] = NAN;
                        }
                    }
                }
            }
            for (int i = 0; i < 2; ++i) {
                const double value = host::half_of(word, i, BF16);
                for (int n = 0; n < kTokens; ++n) sums[n] += value * tokens[column[i]][n];
            }
        }
        for (int n = 0; n < kTokens; ++n) {
            lanes[4 * g + n % 8 / 2]->sums[n / 8][2 * hi + n % 2] = static_cast<float>(sums[n]);
        }
    }
}
inline void start_product(host::Product product) {
    host::Fiber& fiber = *host::self;
    host::require(fiber.fenced);
    product.group = fiber.product_groups;
    memcpy(product.given, product.a, 16);
    product.given[4] = *product.meta;
    fiber.products.push_back(product);
}
template <int kBlocks>
void wgmma(float (&d)[kBlocks][4], const u32 (&a)[4], u64 tokens) {
    start_product({compute_product<kBlocks, false, 0>, d, a, a, tokens});
}
template <int kSelector, int kBlocks>
void wgmma_sp(float (&d)[kBlocks][4], const u32 (&a)[4], u64 tokens, const u32& meta) {
    start_product({compute_product<kBlocks, true, kSelector>, d, a, &meta, tokens});
}
// A group whose registers were written after the group before needs its own fence.
inline void wgmma_fence() { host::self->fenced = true; }
inline void wgmma_commit() {
    ++host::self->product_groups;
    host::self->fenced = false;
}
template <int kPending>
void wgmma_wait() {
    host::meet(host::warp().group, [] {
        host::Fiber* const lanes = host::self - host::lane();
        auto& first = lanes[0].products;
        while (!first.empty() && first[0].group < lanes[0].product_groups - kPending) {
            const host::Product* products[32];
            for (int lane = 0; lane < 32; ++lane) {
                const host::Product& product = lanes[lane].products.at(0);
                products[lane] = &product;
                host::require(product.tokens == first[0].tokens && product.compute == first[0].compute);
                // Registers of a product are not to be written before it has ended.
                host::require(memcmp(product.a, product.given, 16) == 0 && *product.meta == product.given[4]);
            }
            first[0].compute(products);
            for (int lane = 0; lane < 32; ++lane) lanes[lane].products.erase(lanes[lane].products.begin());
        }
    });
}

template <int kRegisters>
void take_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void give_registers() {
    take_registers<kRegisters>();
}

inline void pin(float (&)[4]) {}

inline void stmatrix_x2_trans(u32 smem, u32 first, u32 second) {
    host::Warp& w = host::warp();
    u32(&in)[16] = w.in[host::lane()];
    in[0] = smem, in[1] = first, in[2] = second;
    host::meet(w.group, [&] {
        for (int matrix = 0; matrix < 2; ++matrix) {
            for (int row = 0; row < 8; ++row) {
                const u32 to = w.in[8 * matrix + row][0];
                host::require(to % 16 == 0);
                for (int column = 0; column < 8; ++column) {
                    const u16 value = w.in[4 * column + row / 2][1 + matrix] >> (16 * (row % 2)) & 0xffff;
                    memcpy(host::smem_at(to + 2 * column, 2), &value, 2);
                }
            }
        }
    });
}

}  // namespace marlin
