"""Decoding with a whole model: `marlin bench decode`.

Owns `benchmarks/records/decode-<gpu>.json`: milliseconds a step and tokens a second of a decoder of Llama-3.1-8B's
shape (`benchmarks.decoder`; random weights, nothing is downloaded) at a few batch sizes, fp16 against INT4, each step
in a CUDA graph with attention over a filled cache; and where the time goes: each part alone in a graph of its own.
About a minute on one GPU.

A row: impl, op, dtype, group_size, batch, context, layers, ms_per_step, p10, p90, tokens_per_s, weight_bytes (of the
linear layers), parts_ms (by part of a step, each timed alone; "between" is what the whole step takes beyond their sum:
less than nothing where parts overlap).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import decoder, machine, presets, records, timing
from benchmarks.decoder import PARTS, Decoder, Shape, Step, Weights

KINDS = ("w4a16_sp24", "w4a16_dense")
BATCHES = "1,16,64"
Row = dict[str, Any]
Glue = dict[str, Callable[..., None]]


def programs(shape: Shape, all_weights: Sequence[Weights], batch: int, glue: Glue) -> dict[str, list[Step]]:
    """The steps of every implementation on one set of buffers, by "impl:op"."""
    state = Decoder(shape, batch, machine.device())
    found = {f"{weights.impl}:{weights.op}": state.program(weights, glue) for weights in all_weights}
    for name, steps in found.items():
        decoder.run(steps)
        if not bool(state.logits.isfinite().all()):
            raise AssertionError(f"benchmarks.decode: {name}: logits must be finite; got NaN or infinity.")
    return found


def time_batch(found: dict[str, list[Step]], budget_ms: float) -> dict[str, timing.Timing]:
    """Timings by "impl:op" (a whole step) and "impl:op:part"; parts that are the same for all are timed once."""

    def graph(steps: list[Step], part: str | None) -> tuple[timing.Call, int]:
        return (lambda i: decoder.run(steps, part)), 1

    whole = timing.time_interleaved({name: graph(steps, None) for name, steps in found.items()}, budget_ms)
    linear = {f"{name}:linear": graph(steps, "linear") for name, steps in found.items()}
    first = next(iter(found.values()))
    shared = {part: graph(first, part) for part in PARTS if part != "linear"}
    parts = timing.time_interleaved({**linear, **shared}, budget_ms / 2)
    for name in found:
        whole |= {f"{name}:{part}": parts[f"{name}:{part}" if part == "linear" else part] for part in PARTS}
    return whole


def rows_of(shape: Shape, all_weights: Sequence[Weights], batch: int, timed: dict[str, timing.Timing]) -> list[Row]:
    """One row for each implementation."""
    rows = []
    for weights in all_weights:
        name = f"{weights.impl}:{weights.op}"
        step = timed[name]
        parts = {part: timed[f"{name}:{part}"].us / 1e3 for part in PARTS}
        parts["between"] = step.us / 1e3 - sum(parts.values())
        rows.append(
            {
                "impl": weights.impl,
                "op": weights.op,
                "dtype": "float16",
                "group_size": shape.group_size,
                **{"batch": batch, "context": shape.context, "layers": shape.layers},
                "ms_per_step": round(step.us / 1e3, 4),
                "p10": round(step.p10 / 1e3, 4),
                "p90": round(step.p90 / 1e3, 4),
                "tokens_per_s": round(batch / step.us * 1e6, 1),
                "weight_bytes": weights.nbytes,
                "parts_ms": {part: round(value, 4) for part, value in parts.items()},
            }
        )
    return rows


def describe(rows: Sequence[Row]) -> str:
    """A line for each row: ms, tokens/s, speedup over fp16, parts."""
    base = {row["batch"]: row["ms_per_step"] for row in rows if row["op"] == "fp16"}
    lines = []
    for row in rows:
        parts = "  ".join(f"{part} {value:.2f}" for part, value in row["parts_ms"].items())
        head = f"batch {row['batch']:>3}  {row['impl']}:{row['op']:<11} {row['ms_per_step']:8.3f} ms"
        speedup = base[row["batch"]] / row["ms_per_step"]
        lines.append(f"{head} {row['tokens_per_s']:9.0f} tokens/s {speedup:5.2f}x   ms: {parts}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    default = Shape()
    parser = argparse.ArgumentParser(prog="marlin bench decode", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--batches", default=BATCHES, help=f"comma-separated, default {BATCHES}")
    parser.add_argument("--layers", type=int, default=default.layers, help=f"decoder layers, default {default.layers}")
    parser.add_argument("--context", type=int, default=default.context, help="tokens in the cache")
    parser.add_argument("--kinds", default="w4a16_sp24", help=f"of {', '.join(KINDS)}; fp16 always takes part")
    parser.add_argument("--group-size", type=int, default=default.group_size)
    parser.add_argument("--glue", choices=("compiled", "torch"), default="compiled", help="norms, rotary, activation")
    parser.add_argument("--budget-ms", type=float, default=300.0, help="device time for each graph")
    parser.add_argument("--seconds", type=float, default=90.0, help="start no batch size after this")
    parser.add_argument("--out", type=pathlib.Path, help="the record, default benchmarks/records/decode-<gpu>.json")
    return parser


def _build(shape: Shape, kinds: Sequence[str], batches: Sequence[int]) -> list[Weights]:
    linears = decoder.random_linears(shape, machine.device())
    found = [decoder.dense(linears)]
    for kind in kinds:
        weights = decoder.compressed(linears, kind, shape.group_size)
        decoder.check_linears(weights, batches)
        found.append(weights)
    return found


def _measure(shape: Shape, args: argparse.Namespace, save: Callable[[list[Row], str], None]) -> list[Row]:
    began, batches = time.monotonic(), presets.batches(args.batches)
    glue = decoder.fused_glue() if args.glue == "compiled" else decoder.GLUE
    all_weights = _build(shape, args.kinds.split(","), batches)
    sizes = ", ".join(f"{weights.op} {weights.nbytes / 1e9:.2f} GB" for weights in all_weights)
    print(f"{shape.layers} layers: {sizes}; ready after {time.monotonic() - began:.0f} s", flush=True)
    rows: list[Row] = []
    for batch in batches:
        if time.monotonic() - began > args.seconds:
            print(f"batch {batch}: left out for time (--seconds)", flush=True)
            continue
        timed = time_batch(programs(shape, all_weights, batch, glue), args.budget_ms)
        new = rows_of(shape, all_weights, batch, timed)
        print(describe(new), flush=True)
        rows += new
        save(rows, decoder.describe_glue(glue))
    return rows


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 where an own kernel was wrong, 2 without a GPU or with bad arguments."""
    args = _parser().parse_args(argv)
    unknown = [kind for kind in args.kinds.split(",") if kind not in KINDS]
    try:
        presets.batches(args.batches)
        if unknown:
            raise ValueError(f"benchmarks.decode: --kinds must be of {', '.join(KINDS)}; got {', '.join(unknown)}.")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not machine.has_gpu():
        print("benchmarks.decode: a CUDA GPU is needed; got none. Run `marlin doctor`.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    shape = replace(Shape(), layers=args.layers, context=args.context, group_size=args.group_size)
    facts = machine.facts()
    path = args.out or records.RECORDS / f"decode-{machine.slug(facts['gpu'])}.json"

    def save(rows: list[Row], glue: str) -> None:
        head = {**facts, "clocks": machine.clocks(), "kernel_hash": records.kernel_hash(), "glue": glue}
        records.write(path, {**head, "model": presets.BLOCK_NAME, "rows": rows})

    try:
        rows = _measure(shape, args, save)
    except AssertionError as error:
        print(f"FAULT {error}")
        return 1
    print(f"{len(rows)} rows -> {path}")
    return 0


__all__ = ["main", "programs", "rows_of", "time_batch"]

if __name__ == "__main__":
    sys.exit(main())
