"""Time every tile configuration: `python -m benchmarks.tiles [--shapes block] [--batches 1,16,64]`.

Owns `benchmarks/records/tiles-<gpu>.json`, the timings that the constants of `marlin.runtime.cost` are fitted to. Each
configuration is checked before it is timed. Knows configurations only as `marlin.runtime` lists them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from benchmarks import candidates, machine, presets, records, timing
from marlin import runtime
from marlin.formats.layouts import PackedWeight, pack
from marlin.runtime.config import MAX_WORKSPACE_BYTES
from marlin.testing import tolerance

KINDS = ("w4a16_sp24", "w4a16_dense")
Row = dict[str, Any]


def launcher(plan: runtime.Plan, memory: tuple[torch.Tensor, torch.Tensor]) -> Callable[..., None]:
    """call(packed, act, out) that runs a plan on the current stream."""

    def call(packed: PackedWeight, act: torch.Tensor, out: torch.Tensor) -> None:
        runtime.launch(
            plan,
            act=act.data_ptr(),
            codes=packed.codes.data_ptr(),
            meta=0 if packed.meta is None else packed.meta.data_ptr(),
            scales=packed.scales.data_ptr(),
            bias=0,
            out=out.data_ptr(),
            workspace=memory[0].data_ptr(),
            tickets=memory[1].data_ptr(),
            lda=act.stride(0),
            stream=torch.cuda.current_stream().cuda_stream,
        )

    return call


class Tile(Protocol):
    """What deciding takes to know of a configuration."""

    @property
    def block_m(self) -> int: ...

    @property
    def family(self) -> str: ...


def worth_timing(config: Tile, m: int, configs: Sequence[Tile]) -> bool:
    """Whether a tile can be near the best at M: not far larger, and not far smaller while its family has a larger.

    Why: tiles far from M lose by the products alone; timing them costs most of the run.
    """
    largest = max(other.block_m for other in configs if other.family == config.family)
    return config.block_m <= max(8, 2 * m) and (m <= 16 * config.block_m or config.block_m == largest)


def time_shape(kind: str, setting: candidates.Setting, batches: Sequence[int], budget_ms: float) -> list[Row]:
    """Rows of one kind and layer. A configuration that fails its check stops the run: nothing of it is worth timing."""
    memory = (
        torch.empty(MAX_WORKSPACE_BYTES // 4, device=setting.device),
        torch.zeros(4096, dtype=torch.int32, device=setting.device),
    )
    weight = candidates.random_weight(kind, setting)
    first = pack(weight, setting.dtype)
    copies = [first, *(pack(weight, setting.dtype) for _ in range(setting.copies(kind) - 1))]
    rows: list[Row] = []
    for m in batches:
        act = setting.random_act(m)
        out = torch.empty(m, setting.n, dtype=setting.dtype, device=setting.device)
        name = str(setting.dtype).removeprefix("torch.")
        problem = runtime.Problem(m, setting.n, setting.k, setting.group_size, name, kind)
        index = setting.device.index or 0
        calls = {}
        configs = runtime.all_configs(kind)
        for config in configs:
            if not worth_timing(config, m, configs):
                continue
            if runtime.why_illegal(config, problem, runtime.plan(problem, index).device) is not None:
                continue
            run = launcher(runtime.plan(problem, index, config), memory)
            run(first, act, out.fill_(torch.nan))
            tolerance.check(out, act, weight, name=f"{kind} {config.tag} M={m} N={setting.n} K={setting.k}")
            calls[config.tag] = (lambda i, run=run, act=act, out=out: run(copies[i], act, out), len(copies))
        new = [
            {
                **{"impl": "marlin", "op": kind, "config": tag, "m": m, "n": setting.n, "k": setting.k},
                "us": round(one.us, 2),
            }
            for tag, one in timing.time_interleaved(calls, budget_ms).items()
        ]
        rows += new
        print(f"{kind} {setting.n}x{setting.k} M={m}: {describe_best(new)}", flush=True)
    return rows


def describe_best(rows: Sequence[Row]) -> str:
    """The fastest of the rows in words."""
    if not rows:
        return "no configuration to time"
    best = min(rows, key=lambda row: row["us"])
    return f"{best['config']} {best['us']} us, the best of {len(rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="marlin bench tiles", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="block", help="presets or NxK, comma-separated")
    parser.add_argument("--batches", default="1,8,16,24,32,48,64,100,128,256,512,1024,4096")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--budget-ms", type=float, default=15.0, help="device time for each configuration")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.tiles: a CUDA GPU is needed; got none.", file=sys.stderr)
        return 2
    facts = machine.facts()
    rows: list[Row] = []
    for n, k in presets.shapes(args.shapes):
        setting = candidates.Setting(n, k, torch.float16, args.group_size, machine.l2_bytes())
        for kind in args.kinds.split(","):
            rows += time_shape(kind, setting, presets.batches(args.batches), args.budget_ms)
    head = {**facts, "kernel_hash": records.kernel_hash(), "dtype": "float16", "group_size": args.group_size}
    path = records.RECORDS / f"tiles-{machine.slug(facts['gpu'])}.json"
    records.write(path, {**head, "rows": rows})
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
