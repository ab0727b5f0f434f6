"""Text of the wgmma wrappers: PTX lists every accumulator register, so the text depends on the token tile.

Pure text; knows nothing of variants and compilers. Source: PTX ISA, "wgmma.mma_async" and "wgmma.mma_async.sp".
"""

from __future__ import annotations

_WRAPPER = """
// "wgmma.mma_async{dot_sp}": d += A ({a_text}, registers) x B ({k} x {n}, shared memory); runs until it is waited for.
{selector}__device__ __forceinline__ void {name}(float (&d)[{blocks}][4], const u32 (&a)[4],
                                     u64 tokens{meta_parameter}) {{
    asm volatile(
        "{{\\n"
        ".reg .pred add;\\n"
        "setp.eq.u32 add, 0, 0;\\n"
        "wgmma.mma_async{dot_sp}.sync.aligned.m64n{n}k{k}.f32.{ptx_dtype}.{ptx_dtype} "
        "{{{registers}}}, "
        "{{{a_registers}}}, %{tokens}, {meta_operands}add, 1, 1, 0;\\n"
        "}}"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens){meta_inputs});
}}
"""


def _wrapper(n: int, bf16: bool, sparse: bool) -> str:
    count = n // 2
    place = [f"%{count + i}" for i in range(8)]
    return _WRAPPER.format(
        n=n,
        k=32 if sparse else 16,
        blocks=n // 8,
        dot_sp=".sp" if sparse else "",
        a_text="2:4, 64 x 32" if sparse else "64 x 16",
        name="wgmma_sp" if sparse else "wgmma",
        selector="template <int kSelector>\n" if sparse else "",
        meta_parameter=", u32 meta" if sparse else "",
        ptx_dtype="bf16" if bf16 else "f16",
        registers=", ".join(f"%{i}" for i in range(count)),
        a_registers=", ".join(place[:4]),
        tokens=count + 4,
        meta_operands=f"{place[5]}, {place[6]}, " if sparse else "",
        outputs=", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(count)),
        meta_inputs=', "r"(meta), "n"(kSelector)' if sparse else "",
    )


def wgmma_text(n: int, *, bf16: bool) -> str:
    """The wrappers of one token tile: `wgmma_sp<selector>(d, a, tokens, meta)` and `wgmma(d, a, tokens)`.

    n: tokens, a multiple of 8 up to 256. d is [n / 8][4] fp32 a thread, a one k-step of the weight, tokens the
    shared-memory descriptor of [n][k-step] activations.
    """
    return _wrapper(n, bf16, True) + _wrapper(n, bf16, False)
