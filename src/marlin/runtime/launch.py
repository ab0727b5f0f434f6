"""Run a plan: load its kernel once per device, then put pointers on a stream. Pointers and ints only."""

from __future__ import annotations

import functools

from marlin.runtime import cache, compiler, driver
from marlin.runtime.plan import Plan
from marlin.runtime.source import SIGNATURE, Variant


@functools.cache
def kernel(variant: Variant, arch: str, device_index: int) -> driver.Kernel:
    """The loaded kernel of a variant on a GPU; compiled on first use.

    Raises: CompileError, LaunchError, UnsupportedError.
    """
    cubin = cache.get_cubin(variant.render(), name=variant.entry, arch=arch)
    return driver.load_kernel(
        cubin, variant.entry, device_index=device_index, smem_bytes=variant.smem_bytes, signature=SIGNATURE
    )


def launch(
    plan: Plan,
    *,
    act: int,
    codes: int,
    meta: int,
    scales: int,
    bias: int,
    out: int,
    workspace: int,
    tickets: int,
    lda: int,
    stream: int,
) -> None:
    """Launch on `stream` (0: the default stream). Pointers are device addresses, 0 for none; lda counts elements.

    Raises: LaunchError (the driver's word), and what compiling on first use raises.
    """
    device, problem, shape = plan.device, plan.problem, plan.geometry
    loaded = kernel(plan.variant, compiler.arch_for(device.arch), device.index)
    args = (
        *(act, codes, meta, scales, bias, out, workspace, tickets),
        *(problem.m, problem.n, problem.k, lda),
        *shape[1:],
    )
    loaded.launch((shape.grid, 1, 1), plan.variant.threads, stream, args)
