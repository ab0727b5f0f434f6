"""The layers of a model, back to back for long enough to heat the GPU: `marlin bench sustained`.

Owns `benchmarks/records/sustained-<gpu>.json`: for each model and implementation, the time of one decoder block's
linear layers at one batch size while nothing pauses, and the clocks, power and temperature meanwhile. Takes
`--seconds` (at least 20) for every model and implementation: 2 x 20 s a model, about 5 minutes in all. cuBLAS and ours
alone, since what matters here is what heat and power do to both. Timing of single layers is in `benchmarks.gemm`.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import candidates, machine, presets, records, timing, traffic
from benchmarks.candidates import Factory, Prepared, Setting

IMPLS: dict[str, Factory] = {
    "cublas": candidates.cublas,
    "w4a16_sp24": candidates.marlin("w4a16_sp24"),
    "w4a16_dense": candidates.marlin("w4a16_dense"),
}
MIN_SECONDS, WINDOW_S = 20.0, 0.5
# Graphs queued ahead at least, so that the GPU never waits for the host.
IN_FLIGHT = 4
ADVICE = (
    "Clocks move with heat and power, and so do these figures. Where you may (as root), lock them, measure, unlock:\n"
    "  nvidia-smi -q -d SUPPORTED_CLOCKS        which there are\n"
    "  nvidia-smi --lock-gpu-clocks=MHZ,MHZ     one that the GPU holds under load: the mean above, or its base clock\n"
    "  nvidia-smi --reset-gpu-clocks            back to normal"
)


@dataclass(frozen=True)
class Block:
    """The layers of a decoder block in one implementation; call(i) runs all of them once, with the i-th weights."""

    impl: str
    op: str
    weight_bytes: int
    copies: int
    call: Callable[[int], None]


def build(name: str, model: str, m: int, group_size: int) -> Block:
    """The block of a model at M = m. Each layer has copies enough for its weights to be cold."""
    parts: list[tuple[Prepared, torch.Tensor, torch.Tensor]] = []
    total = 0
    device = machine.device()
    for layer in presets.PRESETS[model]:
        # Why a quarter: the other layers of the block pass through the cache between two uses of a weight.
        setting = Setting(layer.n, layer.k, torch.float16, group_size, machine.l2_bytes() // 4, device)
        one = IMPLS[name](setting)
        act, out = setting.random_act(m), torch.empty(m, layer.n, dtype=torch.float16, device=device)
        if one.check is not None:
            one.check(act, out)
        bits = one.meta_bits
        total += traffic.weight_bytes(one.op, layer.n, layer.k, group_size, bits)
        parts.append((one, act, out))

    def call(i: int) -> None:
        for one, act, out in parts:
            one.call(i % one.copies, act, out)

    first = parts[0][0]
    return Block(first.impl, first.op, total, max(one.copies for one, _, _ in parts), call)


def run_for(block: Block, seconds: float) -> list[float]:
    """Run it without a pause; returns us per block over consecutive windows of half a second."""
    recorded = timing.record(block.call, block.copies)
    recorded.queue()
    replay_s = recorded.collect()[0] * recorded.launches / 1e6
    batch = max(IN_FLIGHT, round(WINDOW_S / replay_s))
    windows: list[float] = []
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        for _ in range(batch):
            recorded.queue()
        found = recorded.collect()
        windows.append(sum(found) / len(found))
    recorded.reset()
    return windows


def measure(block: Block, seconds: float, source: tuple[str, Callable[[], machine.Reading]]) -> dict[str, Any]:
    """The fields of a row that time gives: us (median of windows), p10, p90, first_us (first window), seconds, load."""
    with machine.Sampler(source) as sampler:
        began = time.monotonic()
        windows = run_for(block, seconds)
        took = time.monotonic() - began
    us, p10, p90 = timing.percentiles(windows)
    numbers = {"us": us, "p10": p10, "p90": p90, "first_us": windows[0]}
    return {
        **{name: round(value, 2) for name, value in numbers.items()},
        "seconds": round(took, 1),
        "load": sampler.summary(),
    }


def _row(model: str, m: int, group_size: int, block: Block, found: dict[str, Any]) -> dict[str, Any]:
    gb_per_s = round(block.weight_bytes / found["us"] / 1e3, 1)
    head = {"model": model, "impl": block.impl, "op": block.op, "dtype": "float16", "group_size": group_size, "m": m}
    return {**head, "weight_bytes": block.weight_bytes, "weight_gb_per_s": gb_per_s, **found}


def describe(row: dict[str, Any], base: float | None) -> str:
    """One line: time, speedup, clocks and power."""
    load, speedup = row["load"], f" {base / row['us']:.2f}x" if base and row["impl"] != "cublas" else ""
    parts = [f"{row['model']:<13} {row['impl']}:{row['op']:<11} {row['us']:9.1f} us{speedup:>7}"]
    for name, unit in (("sm_mhz", "MHz"), ("power_w", "W"), ("temperature_c", "C")):
        if load.get(name):
            parts.append(f"{load[name]['mean']:.0f} {unit}")
    if load.get("limited_by"):
        parts.append(", ".join(f"{what} {100 * share:.0f} % of the time" for what, share in load["limited_by"].items()))
    return "  ".join(parts)


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """new, plus what old knows of other models, batches and group sizes, where everything else is the same."""
    same = ("gpu", "driver", "torch", "kernel_hash")
    if old is None or any(old.get(name) != new[name] for name in same):
        return new
    done = {(row["model"], row["m"], row["group_size"]) for row in new["rows"]}
    kept = [row for row in old["rows"] if (row["model"], row["m"], row["group_size"]) not in done]
    order = list(presets.PRESETS)
    return {**new, "rows": sorted(kept + new["rows"], key=lambda row: (order.index(row["model"]), row["m"]))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marlin bench sustained", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", default="all", help=f"comma-separated: all, {', '.join(presets.PRESETS)}")
    parser.add_argument("--impls", default="w4a16_sp24", help="of w4a16_sp24, w4a16_dense; cublas always takes part")
    parser.add_argument("--seconds", type=float, default=MIN_SECONDS, help="for each model and implementation")
    parser.add_argument("--batch", type=int, default=presets.LAYER_BATCH, help="M")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path, help="the record, default benchmarks/records/sustained-<gpu>.json")
    return parser


def _names(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Models and implementations. Raises: ValueError."""
    impls = ["cublas", *(name.strip() for name in args.impls.split(","))]
    unknown = [name for name in impls if name not in IMPLS]
    if unknown:
        known = ", ".join(list(IMPLS)[1:])
        raise ValueError(f"benchmarks.sustained: --impls must be of {known}; got {', '.join(unknown)}.")
    return presets.models(args.models), list(dict.fromkeys(impls))


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 without a GPU or with bad arguments."""
    args = _parser().parse_args(argv)
    try:
        models, impls = _names(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not machine.has_gpu():
        print("benchmarks.sustained: a CUDA GPU is needed; got none. Run `marlin doctor`.", file=sys.stderr)
        return 2
    facts, source = machine.facts(), machine.reader()
    path = args.out or records.RECORDS / f"sustained-{machine.slug(facts['gpu'])}.json"
    before, rows = records.read(path), []
    minutes = len(models) * len(impls) * (args.seconds + 2) / 60
    print(f"{facts['gpu']}, M={args.batch}: {', '.join(models)}; about {minutes:.1f} minutes", flush=True)
    for model in models:
        base = None
        for name in impls:
            block = build(name, model, args.batch, args.group_size)
            row = _row(model, args.batch, args.group_size, block, measure(block, args.seconds, source))
            base = row["us"] if name == "cublas" else base
            rows.append(row)
            print(describe(row, base), flush=True)
            del block
            if machine.has_gpu():
                torch.cuda.empty_cache()
        head = {**facts, "clocks": machine.clocks(), "kernel_hash": records.kernel_hash()}
        records.write(path, merge(before, {**head, "rows": rows}))
    print(f"{ADVICE}\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
