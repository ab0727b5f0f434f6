"""Why a problem runs as it does: the chosen kernel and tile, its estimate, the floor, and the others in order.

Owns the floor of a problem on a described GPU, and the words of an explanation as data. Choosing is `plan`'s, estimates
are `cost`'s. Pure Python; needs no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from marlin.runtime.driver import DeviceInfo
from marlin.runtime.plan import Plan, candidates, make_plan
from marlin.runtime.problem import Problem

# Dense fp16 operations of a multiprocessor in a cycle, with fp32 accumulation, at the architecture's full rate
# (NVIDIA's architecture papers). Boards that halve fp32 accumulation (GeForce) are at best at twice this floor.
_DENSE_OPS_PER_CYCLE = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}
_SPARSE_RATE = 2  # of the 2:4 instruction, dense-equivalent


class Floor(NamedTuple):
    """Times that no kernel beats, in microseconds.

    memory_us: weight, activations and output once each at the bandwidth of the data sheet; tensor_us: the arithmetic at
    the nominal clock.
    """

    memory_us: float
    tensor_us: float

    @property
    def us(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """What sets it: "memory" or "tensor cores"."""
        return "memory" if self.memory_us >= self.tensor_us else "tensor cores"


class Ranked(NamedTuple):
    """One configuration: kernel (None where it cannot run), tile, estimate, or the reason against it."""

    kernel: str | None
    config: str
    us: float | None
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """The plan of a problem, its estimate and floor, and every configuration, the chosen one among them.

    estimate_us: of the plan. order: what can run by estimate, then what cannot.
    """

    plan: Plan
    estimate_us: float
    floor: Floor
    order: tuple[Ranked, ...]

    @property
    def chosen(self) -> Ranked:
        return next(row for row in self.order if row.config == self.plan.config.tag and row.us is not None)

    @property
    def runners_up(self) -> tuple[Ranked, ...]:
        """What else can run, cheapest first."""
        return tuple(row for row in self.order if row.us is not None and row != self.chosen)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plan = self.plan
        rows = [
            {
                "kernel": row.kernel,
                "config": row.config,
                "estimate_us": row.us,
                "reason": row.reason,
                "chosen": row == self.chosen,
            }
            for row in self.order
        ]
        return {
            "problem": plan.problem._asdict(),
            "gpu": plan.device.name,
            "kernel": plan.variant.name,
            "entry": plan.variant.entry,
            "grid": plan.geometry.grid,
            "threads": plan.variant.threads,
            "smem_bytes": plan.variant.smem_bytes,
            "workspace_bytes": plan.workspace_bytes,
            "estimate_us": self.estimate_us,
            "floor_us": self.floor.us,
            "floor": {**self.floor._asdict(), "bound": self.floor.bound},
            "candidates": rows,
        }


def floor(problem: Problem, device: DeviceInfo) -> Floor:
    """The floor of a problem on a described GPU."""
    moved = problem.weight_bytes + 2 * problem.m * (problem.k + problem.n)
    known = [arch for arch in _DENSE_OPS_PER_CYCLE if arch <= device.arch]
    rate = _DENSE_OPS_PER_CYCLE[max(known) if known else (8, 0)] * (_SPARSE_RATE if "sp24" in problem.kind else 1)
    cycles = problem.operations / (rate * device.num_sms)
    return Floor(moved / device.memory_bytes_per_s * 1e6, cycles / (device.sm_clock_khz / 1e3))


def explain(problem: Problem, device: DeviceInfo) -> Explanation:
    """The choice for a problem on a GPU, and what it was chosen from. Raises: ValueError, UnsupportedError."""
    plan = make_plan(problem, device)
    order = tuple(
        Ranked(
            None if row.us is None else make_plan(problem, device, row.config).variant.name, row.config.tag, *row[1:]
        )
        for row in candidates(problem, device)
    )
    estimate = next(row.us for row in order if row.config == plan.config.tag and row.us is not None)
    return Explanation(plan, estimate, floor(problem, device), order)
