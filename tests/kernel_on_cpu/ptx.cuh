// Stands in for src/marlin/kernels/ptx.cuh when the kernels are built for the host: the same wrappers, computed by the
// semantics of the PTX ISA on the machine of host.h. Copies of cp.async land as late as cp.async.wait_group allows.
#pragma once
#include "host.h"

namespace marlin {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

inline int thread_index() { return host::self->tid; }
inline int opaque(int value) { return value; }
inline u32 smem_address(const void* pointer) {
    return static_cast<u32>(static_cast<const char*>(pointer) - host::self->block->smem.data()) + host::kSmemBase;
}
inline void cp_async_16(u32 smem, const void* gmem, int source_bytes = 16) {
    host::self->open.push_back({smem, gmem, source_bytes});
}
inline void cp_async_commit() {
    host::self->groups.push_back(std::move(host::self->open));
    host::self->open.clear();
}
template <int kPending>
void cp_async_wait() {
    auto& groups = host::self->groups;
    while (static_cast<int>(groups.size()) > kPending) {
        for (const auto& copy : groups.front()) {
            char* to = host::smem_at(copy.smem, 16);
            memset(to, 0, 16);
            memcpy(to, copy.gmem, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}
template <int kWords>
void load_smem(u32 (&word)[kWords], u32 smem) {
    host::require(smem % (4 * kWords) == 0);
    memcpy(word, host::smem_at(smem, 4 * kWords), 4 * kWords);
}
inline void store_smem(u32 smem, u32 word) { memcpy(host::smem_at(smem, 4), &word, 4); }
inline void store_smem(u32 smem, const u32 (&word)[4]) {
    host::require(smem % 16 == 0);
    memcpy(host::smem_at(smem, 16), word, 16);
}
template <int kWords>
void load_gmem(u32 (&word)[kWords], const void* gmem) {
    host::require(reinterpret_cast<uintptr_t>(gmem) % (4 * kWords) == 0);
    memcpy(word, gmem, 4 * kWords);
}
inline void store_gmem(void* gmem, const u32 (&word)[4]) {
    host::require(reinterpret_cast<uintptr_t>(gmem) % 16 == 0);
    memcpy(gmem, word, 16);
}
inline void ldmatrix_x4(u32 (&frag)[4], u32 smem) {
    host::Warp& w = host::warp();
    host::require(smem % 16 == 0);
    w.in[host::lane()][0] = smem;
    host::meet(w.group, [&] {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i)
                memcpy(&w.out[lane][i], host::smem_at(w.in[8 * i + lane / 4][0] + lane % 4 * 4, 4), 4);
    });
    memcpy(frag, w.out[host::lane()], 16);
}
inline u32 movmatrix_trans(u32 frag) {
    host::Warp& w = host::warp();
    w.in[host::lane()][0] = frag;
    host::meet(w.group, [&] {
        for (int lane = 0; lane < 32; ++lane) {
            u32 word = 0;
            for (int half = 0; half < 2; ++half) {
                const int row = lane % 4 * 2 + half, column = lane / 4;  // of the source
                word |= (w.in[row * 4 + column / 2][0] >> (16 * (column % 2)) & 0xffff) << (16 * half);
            }
            w.out[lane][0] = word;
        }
    });
    return w.out[host::lane()][0];
}
template <u32 kMask, u32 kBits>
u32 and_or(u32 word) {
    return (word & kMask) | kBits;
}
template <u32 kSelector>
u32 permute_bytes(u32 word) {
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= (word >> (8 * (kSelector >> (4 * i) & 3)) & 0xff) << (8 * i);
    return result;
}
inline u32 place_bytes(u32 word, u32 selector) {
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 from = selector >> (4 * i) & 15;
        host::require(from < 8);
        result |= (from < 4 ? word >> (8 * from) & 0xff : 0) << (8 * i);
    }
    return result;
}
template <bool kBf16>
u32 fma_pair(u32 a, u32 b, u32 c) {
    double value[2];
    for (int i = 0; i < 2; ++i) {
        value[i] = static_cast<double>(host::half_of(a, i, kBf16)) * host::half_of(b, i, kBf16) +
                   host::half_of(c, i, kBf16);
    }
    return host::pair_of(value[0], value[1], kBf16);
}
inline u32 add_f16_pair(u32 a, u32 b) { return fma_pair<false>(a, 0x3c003c00u, b); }
inline u32 mul_f16_pair(u32 a, u32 b) { return fma_pair<false>(a, b, 0x80008000u); }
template <bool kBf16>
u32 to_pair(float low, float high) {
    return host::pair_of(low, high, kBf16);
}
template <bool kBf16>
float to_float(u32 bits) {
    return host::half_to_float(bits & 0xffff, kBf16);
}

// Operands of one thread of a warp's product, and the sums that come back.
inline void warp_product(float (&d)[4], const u32 (&operands)[16], void (*compute)(host::Warp&)) {
    host::Warp& w = host::warp();
    const int lane = host::lane();
    memcpy(w.in[lane], operands, sizeof(operands));
    memcpy(w.sums[lane], d, sizeof(d));
    host::meet(w.group, [&] { compute(w); });
    memcpy(d, w.sums[lane], sizeof(d));
}
template <bool kBf16, int kSelector>
void compute_sparse(host::Warp& w) {
    for (int row = 0; row < 16; ++row) {
        const int g = row % 8, hi = row / 8;
        double dense[32] = {};
        for (int j = 0; j < 8; ++j) {
            const u32 meta = w.in[4 * g + 2 * kSelector + j / 4][8] >> (4 * (j % 4) + 16 * hi) & 15;
            const int i0 = meta & 3, i1 = meta >> 2;
            host::require(i0 < i1);  // undefined with ordered metadata
            const u32 word = w.in[4 * g + j % 4][2 * (j / 4) + hi];
            dense[4 * j + i0] = host::half_of(word, 0, kBf16);
            dense[4 * j + i1] = host::half_of(word, 1, kBf16);
        }
        for (int n = 0; n < 8; ++n) {
            float& sum = w.sums[4 * g + n / 2][2 * hi + n % 2];
            double total = sum;
            for (int k = 0; k < 32; ++k) {
                total += dense[k] * host::half_of(w.in[4 * n + k % 8 / 2][4 + k / 8], k % 2, kBf16);
            }
            sum = static_cast<float>(total);
        }
    }
}
template <bool kBf16>
void compute_dense(host::Warp& w) {
    for (int row = 0; row < 16; ++row) {
        for (int n = 0; n < 8; ++n) {
            const int g = row % 8, hi = row / 8;
            float& sum = w.sums[4 * g + n / 2][2 * hi + n % 2];
            double total = sum;
            for (int k = 0; k < 16; ++k) {
                const float a = host::half_of(w.in[4 * g + k % 8 / 2][2 * (k / 8) + hi], k % 2, kBf16);
                total += static_cast<double>(a) * host::half_of(w.in[4 * n + k % 8 / 2][4 + k / 8], k % 2, kBf16);
            }
            sum = static_cast<float>(total);
        }
    }
}
template <bool kBf16, int kSelector>
void mma_sp_m16n8k32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
    const u32 operands[16] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], meta};
    warp_product(d, operands, compute_sparse<kBf16, kSelector>);
}
template <bool kBf16>
void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 operands[16] = {a[0], a[1], a[2], a[3], b0, b1};
    warp_product(d, operands, compute_dense<kBf16>);
}
inline int atomic_add_acq_rel(int* counter, int value) {
    const int old = *counter;
    *counter += value;
    return old;
}
inline float4 load_l2(const float4* gmem) { return *gmem; }
inline void load_l2(u32 (&word)[4], const void* gmem) { load_gmem(word, gmem); }
inline float reciprocal_sqrt(float value) { return 1 / std::sqrt(value); }

}  // namespace marlin
