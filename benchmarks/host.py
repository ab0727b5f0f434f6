"""Host time of an eager call: `marlin bench host`.

Owns `benchmarks/records/host-<gpu>.json`: microseconds between a call and its return, with the GPU never behind, for
our layer, operator and launch beside torch's. What the host spends is the same for every layer: one small one, M = 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from benchmarks import machine, records, tiles, timing
from marlin import ops, runtime
from marlin.nn import SparseLinear
from marlin.testing.cases import random_act, random_weight

SIZE, ROUNDS, CALLS = 1024, 40, 100
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
Calls = dict[str, Callable[[], object]]


def own_calls(device: torch.device) -> Calls:
    """By name: the module, the operator by our shortest way and by torch's; on a GPU also `tiles.launcher`."""
    layer = SparseLinear.from_weight(random_weight(SIZE, SIZE, 128, device=device)).requires_grad_(False)
    act, packed = random_act(1, SIZE, device=device), layer.packed
    out = torch.empty(1, SIZE, dtype=act.dtype, device=device)
    op = torch.ops.marlin.w4a16_sp24.default
    arguments = (act, packed.codes, packed.meta, packed.scales, None, SIZE, 128)
    calls: Calls = {
        "SparseLinear": lambda: layer(act),
        "marlin.ops.linear": lambda: ops.linear(act, packed),
        "torch.ops.marlin": lambda: op(*arguments),
    }
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        plan = runtime.plan(runtime.Problem(1, SIZE, SIZE, 128, "float16", "w4a16_sp24"), index)
        memory = (
            torch.empty(max(plan.workspace_bytes // 4, 4), device=device),
            torch.zeros(max(plan.num_tickets, 1), dtype=torch.int32, device=device),
        )
        launch = tiles.launcher(plan, memory)
        calls["launch alone"] = lambda: launch(packed, act, out)
    return calls


def torch_calls(device: torch.device) -> Calls:
    """The same of torch: the module, the function, and the product into a given output."""
    dense = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=torch.float16, device=device).requires_grad_(False)
    act = random_act(1, SIZE, device=device)
    out, turned = torch.empty(1, SIZE, dtype=act.dtype, device=device), dense.weight.T
    return {
        "nn.Linear": lambda: dense(act),
        "F.linear": lambda: torch.nn.functional.linear(act, dense.weight),
        "mm(out=)": lambda: torch.mm(act, turned, out=out),
    }


def host_us(calls: Calls, rounds: int = ROUNDS, per_round: int = CALLS) -> dict[str, tuple[float, float, float]]:
    """(median, p10, p90) of microseconds a call; rounds take turns, and none is so long that the queue fills."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            began = time.perf_counter()
            for _ in range(per_round):
                call()
            samples[name].append((time.perf_counter() - began) / per_round * 1e6)
    wait()
    return {name: timing.percentiles(times) for name, times in samples.items()}


def measure(device: torch.device, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Rows of every call in every mode. A round of all calls is some 20 ms."""
    calls = {("torch", name): call for name, call in torch_calls(device).items()}
    calls |= {("marlin", name): call for name, call in own_calls(device).items()}
    rows = []
    for mode, enter in MODES.items():
        with enter():
            found = host_us({"/".join(key): call for key, call in calls.items()}, rounds)
        for impl, name in calls:
            us, p10, p90 = (round(value, 2) for value in found[f"{impl}/{name}"])
            rows.append({"impl": impl, "call": name, "mode": mode, "us": us, "p10": p10, "p90": p90})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="marlin bench host", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {CALLS} calls each")
    args = parser.parse_args(argv)
    if not machine.has_gpu():
        print("benchmarks.host: a CUDA GPU is needed; got none. Run `marlin doctor`.", file=sys.stderr)
        return 2
    facts = machine.facts()
    rows = measure(machine.device(), args.rounds)
    for row in rows:
        print(
            f"{row['mode']:<15} {row['impl']:<7} {row['call']:<18} {row['us']:6.2f} us  ({row['p10']} to {row['p90']})"
        )
    path = records.RECORDS / f"host-{machine.slug(facts['gpu'])}.json"
    records.write(path, {**facts, "kernel_hash": records.kernel_hash(), "m": 1, "n": SIZE, "k": SIZE, "rows": rows})
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
