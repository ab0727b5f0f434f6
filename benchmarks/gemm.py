"""The GEMM benchmark: `marlin bench gemm`, checked first, then timed against cuBLAS and peers.

Owns the loop over shapes, dtypes and batch sizes, and the record it writes. What is timed is in `candidates` and
`peers`, how in `timing`, what by default in `presets.default_parts`. The record is written after every shape, so a run
that is stopped loses nothing.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import candidates, ceilings, cliffs, isolated, machine, peers, presets, records, timing, traffic
from benchmarks.candidates import AbsentError, Factory, Prepared, Setting
from benchmarks.presets import Part

INVARIANT, PORTABLE = "w4a16_sp24-batch-invariant", ("w4a16_sp24-portable", "w4a16_dense-portable")
OWN: dict[str, Factory] = {
    "w4a16_sp24": candidates.marlin("w4a16_sp24"),
    "w4a16_dense": candidates.marlin("w4a16_dense"),
    INVARIANT: candidates.marlin("w4a16_sp24", batch_invariant=True),
    PORTABLE[0]: candidates.portable("w4a16_sp24"),
    PORTABLE[1]: candidates.portable("w4a16_dense"),
}
# These take part at these points alone (shapes and batches of a dtype), unless --impls names them.
_FEW = {
    candidates.BATCH_INVARIANT: {"float16": (presets.BLOCK, presets.BATCHES)},
    candidates.PORTABLE: {"float16": (presets.BLOCK, (1, 16, 32, 64, 128, 256, 512, 1024, 4096))},
}
_IMPLS = {INVARIANT: candidates.BATCH_INVARIANT, **dict.fromkeys(PORTABLE, candidates.PORTABLE)}
QUICK_BATCHES, QUICK_BUDGET_MS = "1,16,64,256", 15.0
DEFAULT_SECONDS = 200.0


@dataclass
class Run:
    """One benchmark run: what it measures with, and what it found.

    ends: when to start no further point, on the scale of `time.monotonic`. read: a reading of the GPU, taken after each
    point. everywhere: whether what is measured at few points is measured at all.
    """

    factories: dict[str, Factory]
    group_size: int
    budget_ms: float
    ceilings: traffic.Ceilings
    ends: float = float("inf")
    read: Callable[[], machine.Reading] | None = None
    everywhere: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    readings: list[machine.Reading] = field(default_factory=list)

    def prepare(self, setting: Setting, wanted: tuple[str, ...] | None = None) -> list[Prepared]:
        """Build every implementation that is there; note why others are not. wanted: of the peers, None for all."""
        built = []
        for name, factory in self.factories.items():
            if name in peers.PEERS and wanted is not None and name not in wanted:
                continue
            if not self._measures(_IMPLS.get(name, name), setting):
                continue
            try:
                built.append(factory(setting))
            except AbsentError as reason:
                self._note_absent(name, setting, str(reason))
            except Exception as error:
                if name in peers.PEERS:
                    self._note_absent(name, setting, f"{type(error).__name__}: {_first_line(error)}")
                else:
                    self._fault(f"{name} n={setting.n} k={setting.k}: {type(error).__name__}: {error}")
        return built

    def _measures(self, impl: str, setting: Setting, m: int | None = None) -> bool:
        if self.everywhere or impl not in _FEW:
            return True
        shapes, batches = _FEW[impl].get(_dtype_name(setting.dtype), ((), ()))
        return (setting.n, setting.k) in shapes and (m is None or m in batches)

    def _note_absent(self, name: str, setting: Setting, reason: str) -> None:
        dtype = _dtype_name(setting.dtype)
        key = f"{name} {dtype}"
        if self.absent.get(key) != reason:
            print(f"  {name} ({dtype}): absent ({reason})", flush=True)
            self.absent[key] = reason

    def _fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"  FAULT {text}", flush=True)

    def measure(self, setting: Setting, batches: Sequence[int], wanted: tuple[str, ...] | None = None) -> None:
        """All batch sizes of one shape and dtype."""
        built = self.prepare(setting, wanted) if time.monotonic() < self.ends else []
        for m in batches:
            if time.monotonic() >= self.ends:
                self.left_out.append(f"{setting.n}x{setting.k} {_dtype_name(setting.dtype)} M={m}")
                continue
            act = setting.random_act(m)
            out = torch.empty(m, setting.n, dtype=setting.dtype, device=setting.device)
            at_m = [one for one in built if self._measures(one.impl, setting, m)]
            sound = [one for one in at_m if self._is_right(one, act, out, setting)]
            calls = {one.key: (_bind(one, act, out), one.copies) for one in sound if one.record is None}
            others = {one.key: partial(one.record, m) for one in sound if one.record is not None}
            timings = timing.time_interleaved(calls, self.budget_ms, self._on_failure(setting, m), others)
            if self.read is not None:
                self.readings.append(self.read())
            new = [self._row(one, setting, m, timings[one.key]) for one in sound if one.key in timings]
            self.rows.extend(new)
            print(describe_point(new), flush=True)

    def _is_right(self, one: Prepared, act: torch.Tensor, out: torch.Tensor, setting: Setting) -> bool:
        if one.check is None:
            return True
        try:
            one.check(act, out)
        except Exception as error:
            self._fault(f"{one.key} m={act.shape[0]} n={setting.n} k={setting.k}: {type(error).__name__}: {error}")
            return False
        return True

    def _on_failure(self, setting: Setting, m: int) -> Callable[[str, Exception], None]:
        def failed(key: str, error: Exception) -> None:
            name = key.partition(":")[0]
            if isinstance(error, AbsentError):
                self._note_absent(name, setting, str(error))
            elif name in peers.PEERS:
                self._note_absent(name, setting, f"{type(error).__name__}: {_first_line(error)}")
            else:
                self._fault(f"{key} m={m} n={setting.n} k={setting.k}: {type(error).__name__}: {error}")

        return failed

    def _row(self, one: Prepared, setting: Setting, m: int, timed: timing.Timing) -> dict[str, Any]:
        bits = traffic.META_BITS.get(one.op) if one.meta_bits is None else one.meta_bits
        moved = traffic.traffic(one.op, m, setting.n, setting.k, self.group_size, bits)
        floor_us = moved.floor_us(one.op, self.ceilings)
        row = {
            "impl": one.impl,
            "op": one.op,
            "dtype": _dtype_name(setting.dtype),
            "group_size": self.group_size,
            "meta_bits": bits,
            **{"m": m, "n": setting.n, "k": setting.k},
            **{name: round(getattr(timed, name), 3) for name in ("us", "p10", "p90")},
            "bytes": moved.total_bytes,
            "gb_per_s": round(moved.total_bytes / timed.us / 1e3, 1),
            "tflops_dense_equivalent": round(moved.flops / timed.us / 1e6, 2),
            "floor_us": round(floor_us, 3),
            "fraction_of_floor": round(floor_us / timed.us, 4),
            "config": one.config(m),
        }
        records.check_row(row)
        return row


def _bind(one: Prepared, act: torch.Tensor, out: torch.Tensor) -> timing.Call:
    return lambda i: one.call(i, act, out)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_point(rows: list[dict[str, Any]]) -> str:
    """One line for one (shape, dtype, M): the baseline in us, then each time over it and its share of the floor."""
    base = next((row["us"] for row in rows if row["impl"] == "cublas"), None)
    parts = []
    for row in rows:
        if row["impl"] == "cublas":
            parts.append(f"{row['m']:>6} cublas {row['us']:.1f} us")
        else:
            speedup = f" {base / row['us']:.2f}x" if base else ""
            floor = f" {100 * row['fraction_of_floor']:.0f}%" if row["impl"] == "marlin" else ""
            parts.append(f"{row['impl']}:{row['op']} {row['us']:.1f}{speedup}{floor}")
    return " | ".join(parts) or "  nothing measured"


def block_lines(rows: list[dict[str, Any]], group_size: int) -> Iterator[str]:
    """Sums over the block, one line per dtype and M, for points where every layer was measured."""
    for dtype in records.DTYPES:
        for m in sorted({row["m"] for row in rows}):
            sums: dict[str, list[float]] = {}
            for row in rows:
                at = (row["n"], row["k"]) in presets.BLOCK and row["group_size"] == group_size
                if at and row["m"] == m and row["dtype"] == dtype:
                    sums.setdefault(f"{row['impl']}:{row['op']}", []).append(row["us"])
            whole = {name: sum(times) for name, times in sums.items() if len(times) == len(presets.BLOCK)}
            base = whole.pop("cublas:fp16", None)
            if base:
                speedups = " ".join(f"{name} {base / us:.2f}x" for name, us in whole.items())
                yield f"{dtype:>8} M={m:<5} cublas {base:8.1f} us  {speedups}"


def _parser() -> argparse.ArgumentParser:
    known = ", ".join(presets.PRESETS)
    parser = argparse.ArgumentParser(prog="marlin bench gemm", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the block, few batch sizes, fp16; writes only to --out")
    parser.add_argument("--shapes", help=f"comma-separated: block, large, all, NxK, {known}")
    parser.add_argument("--batches", help="comma-separated numbers, `standard`, `odd`")
    parser.add_argument("--dtypes", help="comma-separated: float16, bfloat16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--impls", help=f"of {', '.join([*OWN, *peers.PEERS])}; cublas always takes part")
    parser.add_argument("--budget-ms", type=float, help="device time for each point and implementation, default 40")
    parser.add_argument("--seconds", type=float, help="start no point after this; default 200 for the default points")
    parser.add_argument("--peer-seconds", type=float, default=40.0, help="for preparing each peer over the whole run")
    parser.add_argument("--out", type=pathlib.Path, help="the record, default benchmarks/records/gemm-<gpu>.json")
    return parser


def parts(args: argparse.Namespace) -> list[Part]:
    """What to measure: the default points, or those that the arguments ask for. Raises: ValueError."""
    if not (args.quick or args.shapes or args.batches or args.dtypes):
        return presets.default_parts()
    shapes = tuple(presets.shapes(args.shapes or "block"))
    batches = tuple(presets.batches(args.batches or (QUICK_BATCHES if args.quick else "standard")))
    return [Part(shapes, batches, dtype) for dtype in _dtypes(args.dtypes or "float16")]


def _factories(names: str | None, peer_seconds: float) -> tuple[dict[str, Factory], list[isolated.Process]]:
    """Factories by name, and the processes that some of them stand for, started where they can be."""
    known = {**OWN, **peers.PEERS}
    wanted = list(known) if names is None else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"benchmarks.gemm: --impls must be of {', '.join(known)}; got {', '.join(unknown)}.")
    found: dict[str, Factory] = {"cublas": candidates.cublas}
    processes = []
    for name in wanted:
        maker = known[name]
        if isinstance(maker, isolated.Peer):
            process = isolated.Process(maker, peer_seconds)
            processes.append(process)
            maker = process.build
        found[name] = maker
    return found, processes


def _start(processes: list[isolated.Process]) -> None:
    """All at once, since each takes seconds to import its libraries."""
    for process in processes:
        try:
            process.start()
        except AbsentError:
            continue  # Why: said where it is asked for a weight.


def _dtypes(names: str) -> list[str]:
    short = {"fp16": "float16", "bf16": "bfloat16"}
    found = [short.get(name.strip(), name.strip()) for name in names.split(",")]
    if any(name not in records.DTYPES for name in found):
        raise ValueError(f"benchmarks.gemm: --dtypes must be of {', '.join(records.DTYPES)}; got {names!r}.")
    return found


def _record(facts: dict[str, Any], run: Run, source: str) -> dict[str, Any]:
    return records.check(
        {
            **facts,
            "peers": machine.peer_versions(),
            "clocks": machine.clocks(),
            "load": machine.summarize(source, run.readings),
            "ceilings": vars(run.ceilings),
            "kernel_hash": records.kernel_hash(),
            "absent": run.absent,
            "left_out": run.left_out,
            "rows": run.rows,
        }
    )


def _measure_all(run: Run, wanted: list[Part], save: Callable[[], None]) -> None:
    for part in wanted:
        for n, k in part.shapes:
            print(f"N={n} K={k} {part.dtype}", flush=True)
            dtype = getattr(torch, part.dtype)
            run.measure(Setting(n, k, dtype, run.group_size, machine.l2_bytes()), part.batches, part.peers)
            if machine.has_gpu():
                torch.cuda.empty_cache()
            save()


def _closing(run: Run) -> Iterator[str]:
    yield from block_lines(run.rows, run.group_size)
    yield from cliffs.lines(run.rows)
    if run.left_out:
        yield f"{len(run.left_out)} point(s) left out for time (--seconds): {', '.join(run.left_out)}"


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 when an own kernel was wrong or failed, 2 without a GPU or with bad arguments."""
    began = time.monotonic()
    args = _parser().parse_args(argv)
    try:
        wanted = parts(args)
        factories, processes = _factories(args.impls, args.peer_seconds)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not machine.has_gpu():
        print("benchmarks.gemm: a CUDA GPU is needed; got none. Run `marlin doctor`.", file=sys.stderr)
        return 2
    _start(processes)
    facts, (source, read) = machine.facts(), machine.reader()
    torch.manual_seed(0)
    budget_ms = args.budget_ms or (QUICK_BUDGET_MS if args.quick else 40.0)
    seconds = args.seconds or (DEFAULT_SECONDS if wanted == presets.default_parts() else float("inf"))
    run = Run(factories, args.group_size, budget_ms, ceilings.measure(), began + seconds)
    run.everywhere = args.impls is not None
    if source == "nvml":  # Why: nvidia-smi takes a tenth of a second, which adds up.
        run.read = read
    print(f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}: {vars(run.ceilings)}", flush=True)
    path = args.out or (None if args.quick else records.RECORDS / f"gemm-{machine.slug(facts['gpu'])}.json")
    before = None if path is None else records.read(path)

    def save() -> None:
        if path is not None and run.rows:
            records.write(path, records.merge(before, _record(facts, run, source)))

    try:
        _measure_all(run, wanted, save)
    finally:
        for process in processes:
            process.stop()
    print("\n".join(_closing(run)))
    print(f"{len(run.rows)} rows in {time.monotonic() - began:.0f} s" + (f" -> {path}" if path else ""))
    if run.faults:
        print(f"{len(run.faults)} fault(s):\n" + "\n".join(f"  {text.splitlines()[0]}" for text in run.faults))
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
