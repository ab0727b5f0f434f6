// INT4 codes to pairs of fp16 or bf16, exactly, and the product with the group scale, rounded once.
#pragma once
#include "ptx.cuh"

namespace marlin {

// Group size of weights with one scale per row: longer than any row, and a multiple of every chunk.
[[maybe_unused]] constexpr int kWholeRow = 1 << 30;

// Register r of an A fragment from a packed word: nibbles r (low half) and r + 4 (high half), each code + 8.
//
// Why: OR-ing a nibble into the mantissa of a power of two makes a float without a conversion. fp16 1024 leaves ten
// bits: nibble at bit 0 gives 1024 + x, at bit 4 gives 1024 + 16 x. bf16 128 leaves seven: only bit 0 works.
template <bool kBf16, int kRegister>
__device__ __forceinline__ u32 code_pair(u32 word) {
    if constexpr (kBf16) {
        const u32 biased = and_or<0x000f000fu, 0x43004300u>(word >> (4 * kRegister));
        return fma_pair<true>(biased, 0x3f803f80u, 0xc308c308u);  // 1.0 * (128 + x) - 136
    } else {
        const u32 shifted = kRegister < 2 ? word : word >> 8;
        if constexpr (kRegister % 2 == 0) {
            return add_f16_pair(and_or<0x000f000fu, 0x64006400u>(shifted), 0xe408e408u);  // (1024 + x) - 1032
        } else {
            // (1024 + 16 x) / 16 - 72
            return fma_pair<false>(and_or<0x00f000f0u, 0x64006400u>(shifted), 0x2c002c00u, 0xd480d480u);
        }
    }
}

template <bool kBf16>
__device__ __forceinline__ u32 scale_pair(u32 codes, u32 scale) {
    if constexpr (kBf16) {
        return fma_pair<true>(codes, scale, 0x80008000u);  // + (-0.0): keeps the sign of a zero product
    } else {
        return mul_f16_pair(codes, scale);
    }
}

// The four registers of an A fragment. Registers 0 and 2 hold row g, 1 and 3 row g + 8, whose scales are the low and
// the high half of `scales`.
template <bool kBf16>
__device__ __forceinline__ void dequantize(u32 (&a)[4], u32 word, u32 scales) {
    const u32 row[2] = {permute_bytes<0x1010>(scales), permute_bytes<0x3232>(scales)};
    a[0] = scale_pair<kBf16>(code_pair<kBf16, 0>(word), row[0]);
    a[1] = scale_pair<kBf16>(code_pair<kBf16, 1>(word), row[1]);
    a[2] = scale_pair<kBf16>(code_pair<kBf16, 2>(word), row[0]);
    a[3] = scale_pair<kBf16>(code_pair<kBf16, 3>(word), row[1]);
}

// One of them; r must be known when the kernel is compiled.
template <bool kBf16>
__device__ __forceinline__ u32 dequantize_register(u32 word, u32 scales, int r) {
    const u32 row = r % 2 == 0 ? permute_bytes<0x1010>(scales) : permute_bytes<0x3232>(scales);
    const u32 codes = r == 0   ? code_pair<kBf16, 0>(word)
                      : r == 1 ? code_pair<kBf16, 1>(word)
                      : r == 2 ? code_pair<kBf16, 2>(word)
                               : code_pair<kBf16, 3>(word);
    return scale_pair<kBf16>(codes, row);
}

}  // namespace marlin
