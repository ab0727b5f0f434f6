"""Why a problem runs as it does: the chosen kernel and tile, its estimate, the floor, and the others in order.

Owns the floor of a problem on a described GPU, and the words of an explanation as data. Choosing is `plan`'s, estimates
are `cost`'s. Pure Python; needs no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from marlin.runtime.cost import dense_ops_per_cycle
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.expansion import ExpandVariant, expansion, grid, why_not
from marlin.runtime.plan import Plan, candidates, make_plan
from marlin.runtime.problem import Problem
from marlin.runtime.source import Variant

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
    """One configuration: kernel (None where it cannot run), tile, estimate, or the reason against it.

    For an expanded product the kernel that expands "+ cuBLAS", and the slabs.
    """

    kernel: str | None
    config: str
    us: float | None
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """The plan of a problem, its estimate and floor, and every way to compute it, the chosen one among them.

    estimate_us: of the plan. order: what can run by estimate, then what cannot.
    """

    plan: Plan
    estimate_us: float
    floor: Floor
    order: tuple[Ranked, ...]

    @property
    def chosen(self) -> Ranked:
        plan = self.plan
        kernel, tag = (plan.variant.name, plan.config.tag)
        if plan.expansion is not None:
            kernel, tag = plan.expansion.name, plan.expansion.tag
        return next(row for row in self.order if (row.kernel, row.config) == (kernel, tag))

    @property
    def variant(self) -> Variant | ExpandVariant:
        """The kernel of ours that runs."""
        return self.plan.variant if self.plan.expansion is None else self.plan.expansion.variant

    @property
    def grid(self) -> int:
        """Its blocks, those of the largest slab where it expands."""
        expanded = self.plan.expansion
        return self.plan.geometry.grid if expanded is None else grid(expanded.slab_rows, expanded.k)

    @property
    def workspace_bytes(self) -> int:
        """Of the parts of split tiles, or of a slab."""
        return self.plan.workspace_bytes if self.plan.expansion is None else self.plan.expansion.slab_bytes

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
            "kernel": self.chosen.kernel,
            "entry": self.variant.entry,
            "grid": self.grid,
            "threads": self.variant.threads,
            "smem_bytes": self.variant.smem_bytes,
            "workspace_bytes": self.workspace_bytes,
            "slabs": [] if plan.expansion is None else [slab.rows for slab in plan.expansion.slabs],
            "estimate_us": self.estimate_us,
            "floor_us": self.floor.us,
            "floor": {**self.floor._asdict(), "bound": self.floor.bound},
            "candidates": rows,
        }


def floor(problem: Problem, device: DeviceInfo) -> Floor:
    """The floor of a problem on a described GPU."""
    moved = problem.weight_bytes + 2 * problem.m * (problem.k + problem.n)
    rate = dense_ops_per_cycle(device.arch) * (_SPARSE_RATE if "sp24" in problem.kind else 1)
    cycles = problem.operations / (rate * device.num_sms)
    return Floor(moved / device.memory_bytes_per_s * 1e6, cycles / (device.sm_clock_khz / 1e3))


def explain(problem: Problem, device: DeviceInfo) -> Explanation:
    """The choice for a problem on a GPU, and what it was chosen from. Raises: ValueError, UnsupportedError."""
    plan = make_plan(problem, device)
    rows = [
        Ranked(
            None if row.us is None else make_plan(problem, device, row.config).variant.name, row.config.tag, *row[1:]
        )
        for row in candidates(problem, device)
    ]
    rows.append(_expanded(plan))
    order = tuple(sorted(rows, key=lambda row: (row.us is None, row.us or 0.0)))
    estimate = Explanation(plan, 0.0, floor(problem, device), order).chosen.us
    assert estimate is not None, "what was planned can run"
    return Explanation(plan, estimate, floor(problem, device), order)


def _expanded(plan: Plan) -> Ranked:
    """The row of the expanded product."""
    reason = why_not(plan.problem, plan.config.family)
    if reason is not None:
        return Ranked(None, "expand + cuBLAS", None, reason)
    found = expansion(plan.problem, plan.device)
    return Ranked(found.name, found.tag, found.us, None)
