// One wrapper per PTX instruction, and nothing else. Each names its section of the PTX ISA.
#pragma once

namespace marlin {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// "Special registers: %tid". Why volatile: else the compiler reads it anew in every loop, to save a register.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// "mov": a copy whose origin the compiler cannot see, so that what follows from it is computed anew, not kept in
// registers through a loop.
__device__ __forceinline__ int opaque(int value) {
    int copy;
    asm volatile("mov.s32 %0, %1;" : "=r"(copy) : "r"(value));
    return copy;
}

// "Data Movement: cvta": the 32-bit shared-window address that the instructions below take.
__device__ __forceinline__ u32 smem_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// "cp.async": 16 bytes, around L1; `source_bytes` 0 writes zeros and reads nothing.
__device__ __forceinline__ void cp_async_16(u32 smem, const void* gmem, int source_bytes = 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(source_bytes)
                 : "memory");
}

// "cp.async.commit_group"
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// "cp.async.wait_group"
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// "ld.shared": one, two or four words.
__device__ __forceinline__ void load_smem(u32 (&word)[1], u32 smem) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word[0]) : "r"(smem));
}
__device__ __forceinline__ void load_smem(u32 (&word)[2], u32 smem) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(smem));
}
__device__ __forceinline__ void load_smem(u32 (&word)[4], u32 smem) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(smem));
}

// "st.shared": one word or four.
__device__ __forceinline__ void store_smem(u32 smem, u32 word) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(smem), "r"(word) : "memory");
}
__device__ __forceinline__ void store_smem(u32 smem, const u32 (&word)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                 "r"(word[3])
                 : "memory");
}

// "ld.global.nc": one word or four of what no kernel writes meanwhile; the four around L1.
__device__ __forceinline__ void load_gmem(u32 (&word)[1], const void* gmem) {
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(word[0]) : "l"(gmem));
}
__device__ __forceinline__ void load_gmem(u32 (&word)[4], const void* gmem) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "l"(gmem));
}

// "st.global": 16 bytes.
__device__ __forceinline__ void store_gmem(void* gmem, const u32 (&word)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(gmem), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                 "r"(word[3])
                 : "memory");
}

// "ldmatrix": four 8x8 matrices of 16-bit values; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void ldmatrix_x4(u32 (&frag)[4], u32 smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
                 : "r"(smem));
}

// "movmatrix": transposes an 8x8 matrix of 16-bit values across the warp.
__device__ __forceinline__ u32 movmatrix_trans(u32 frag) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(frag));
    return result;
}

// "lop3": (word & mask) | bits.
template <u32 kMask, u32 kBits>
__device__ __forceinline__ u32 and_or(u32 word) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "n"(kMask), "n"(kBits));
    return result;
}

// "prmt": four bytes chosen from two words.
template <u32 kSelector>
__device__ __forceinline__ u32 permute_bytes(u32 word) {
    u32 result;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(word), "n"(kSelector));
    return result;
}

// "prmt": four bytes of `word` (0 to 3) and of zero (4), as the four low nibbles of `selector` say.
__device__ __forceinline__ u32 place_bytes(u32 word, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(word), "r"(selector));
    return result;
}

// "Half precision floating point: fma, add, mul" on pairs. bf16 has only fma before compute capability 9.0.
template <bool kBf16>
__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
    u32 d;
    if constexpr (kBf16) {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    }
    return d;
}
__device__ __forceinline__ u32 add_f16_pair(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 mul_f16_pair(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// "cvt": two fp32 values to a pair, `low` in the low half, rounded to nearest even.
template <bool kBf16>
__device__ __forceinline__ u32 to_pair(float low, float high) {
    u32 d;
    if constexpr (kBf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    }
    return d;
}

// "cvt": one 16-bit value, in the low half of `bits`, to fp32.
template <bool kBf16>
__device__ __forceinline__ float to_float(u32 bits) {
    if constexpr (kBf16) {
        return __uint_as_float(bits << 16);
    } else {
        float value;
        asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(bits & 0xffffu));
        return value;
    }
}

// "mma.sp.m16n8k32": d += A (2:4, 16 x 32) x B (32 x 8); the threads of a quad that kSelector names give `meta`.
template <bool kBf16, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
    if constexpr (kBf16) {
        asm(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta),
              "n"(kSelector));
    } else {
        asm(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta),
              "n"(kSelector));
    }
}

// "mma.m16n8k16": d += A (16 x 16) x B (16 x 8).
template <bool kBf16>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (kBf16) {
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// "atom": adds to a counter; what this thread's block wrote before is visible to whoever sees the sum, and back.
__device__ __forceinline__ int atomic_add_acq_rel(int* counter, int value) {
    int old;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
    return old;
}

// "ld.global.cg": four fp32 values from L2, never from a stale L1 line.
__device__ __forceinline__ float4 load_l2(const float4* gmem) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(gmem)
                 : "memory");
    return v;
}

// The same as four words, for what an earlier kernel may have written after this one started.
__device__ __forceinline__ void load_l2(u32 (&word)[4], const void* gmem) {
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "l"(gmem)
                 : "memory");
}

// "rsqrt.approx": within 2^-22.9 of the value, relatively.
__device__ __forceinline__ float reciprocal_sqrt(float value) {
    float result;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

}  // namespace marlin
