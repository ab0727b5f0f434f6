"""Expanded products: rows of the weight in 16 bits, written slab by slab by our kernel, and multiplied by cuBLAS.

Owns the slab's memory and cuBLAS's precision. Must not know when this way is taken: `marlin.runtime.plan` does.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


class Fp32Sums:
    """Within, cuBLAS adds the products of a dtype in fp32: parts of a split K in 16 bits would miss our tolerance.

    flags: of `torch.backends.cuda.matmul`, what permits less. They are the process's, and read while a product is put
    on its stream: the first of several threads turns them off, and the last one puts them back, so that none sees
    another's restoration. Products that other threads queue meanwhile are more precise than they need be.
    """

    def __init__(self, *flags: str) -> None:
        self.flags = flags
        self._lock, self._users = threading.Lock(), 0
        self._permitted: list[str] = []

    def __enter__(self) -> None:
        matmul = torch.backends.cuda.matmul
        with self._lock:
            if not self._users:
                self._permitted = [name for name in self.flags if getattr(matmul, name, False)]
                for name in self._permitted:
                    setattr(matmul, name, False)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                for name in self._permitted:
                    setattr(torch.backends.cuda.matmul, name, True)


fp32_sums = {
    torch.float16: Fp32Sums("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"),
    torch.bfloat16: Fp32Sums("allow_bf16_reduced_precision_reduction"),
}


def product(
    plan: Any, weight: tuple[int, int, int], act: Tensor, out: Tensor, bias: Tensor | None, stream: int
) -> None:
    """act [M, K] times the weight into out [M, N], on `stream`, the current one of the current device, act's.

    plan: a `runtime.Plan` with an expansion. weight: addresses of codes, metadata (0: none) and scales. The product is
    rounded to 16 bits; where there is a bias, their sum is again.
    """
    from marlin import runtime

    # Why inference mode: out and bias may be of either mode, and gradients are the operator's affair.
    with torch.inference_mode(), fp32_sums[act.dtype]:
        # Why from torch for each call: streams never share it, and a capture takes it from its own pool.
        memory = torch.empty(plan.expansion.slab_rows, plan.problem.k, dtype=act.dtype, device=act.device)
        codes, meta, scales = weight
        at, dense = memory.data_ptr(), memory.t()
        for slab in plan.expansion.slabs:
            runtime.expand(plan, slab, codes=codes, meta=meta, scales=scales, out=at, stream=stream)
            first, rows = slab
            torch.mm(act, dense.narrow(1, 0, rows), out=out.narrow(1, first, rows))
        if bias is not None:
            # Why not torch.addmm: it too rounds twice, for some shapes only; what always does can be tested.
            out.add_(bias)
