"""From a problem to a launch: enumerate configurations, drop the illegal, take the cheapest; remember the answer."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from marlin.errors import UnsupportedError
from marlin.runtime import driver
from marlin.runtime.config import MAX_WORKSPACE_BYTES, Config, all_configs, why_illegal, why_illegal_problem
from marlin.runtime.cost import Geometry, cost_us, geometry
from marlin.runtime.driver import DeviceInfo
from marlin.runtime.expansion import Expansion, worthwhile
from marlin.runtime.invariant import chosen_order, order, why_variant
from marlin.runtime.problem import Problem
from marlin.runtime.source import Variant


class Plan(NamedTuple):
    """Everything about a launch but its pointers.

    workspace_bytes: fp32 parts of split tiles; num_tickets: int32 counters, zero before the first launch and left zero.
    expansion: what is faster than the launch, where something is; either computes the product.
    """

    problem: Problem
    device: DeviceInfo
    config: Config
    variant: Variant
    geometry: Geometry
    workspace_bytes: int
    num_tickets: int
    expansion: Expansion | None = None

    @property
    def runs(self) -> str:
        """What computes the product, in words: kernel and tile, or kernel and slabs."""
        if self.expansion is not None:
            return f"{self.expansion.name} {self.expansion.tag}"
        return f"{self.variant.name} {self.config.tag}"


class Candidate(NamedTuple):
    """One line of `explain`: a configuration with its estimated time, or the reason why it is out."""

    config: Config
    us: float | None
    reason: str | None


def candidates(problem: Problem, device: DeviceInfo) -> list[Candidate]:
    """Every configuration with its cost or the reason against it, cheapest first."""
    rows = []
    for config in all_configs(problem.kind):
        reason = why_illegal(config, problem, device)
        if reason is None and problem.batch_invariant:
            reason = why_variant(config, problem) or _why_other_order(config, problem, device)
        if reason is None and _workspace_bytes(config, geometry(config, problem, device)) > MAX_WORKSPACE_BYTES:
            reason = f"{config.tag} needs a workspace of more than {MAX_WORKSPACE_BYTES >> 20} MiB."
        rows.append(Candidate(config, None if reason else cost_us(config, problem, device), reason))
    return sorted(rows, key=lambda row: (row.us is None, row.us or 0.0))


def _why_other_order(config: Config, problem: Problem, device: DeviceInfo) -> str | None:
    if order(config, problem) == chosen_order(problem, device):
        return None
    return f"{config.tag} adds along K in another order than the one that serves every M of this layer."


def _workspace_bytes(config: Config, shape: Geometry) -> int:
    shared = shape.num_split_tiles and shape.stripe_chunks < shape.num_chunks and not config.cluster
    return 2 * shape.grid * config.block_m * config.block_n * 4 if shared else 0


def make_plan(problem: Problem, device: DeviceInfo, config: Config | None = None, *, portable: bool = False) -> Plan:
    """Plan for any device description; `config` overrides the choice. Raises: ValueError, UnsupportedError.

    Plans of one batch-invariant problem at any M add in one order; with `config`, in that of the configuration.
    portable: choose as on a GPU without kernels of its own, from those that every GPU runs.
    """
    reason = why_illegal_problem(problem)
    if reason is not None:
        raise ValueError(f"{problem.kind}: {reason}")
    expanded = None
    if config is None:
        rows = candidates(problem, device)
        best = next((row for row in rows if not portable or row.config.family == "sm80"), rows[0])
        if best.us is None:
            raise UnsupportedError(f"{problem.kind}: {best.reason}")
        config = best.config
        expanded = worthwhile(problem, device, config.family, best.us)
    else:
        reason = why_illegal(config, problem, device)
        if reason is None and problem.batch_invariant:
            reason = why_variant(config, problem)
        if reason is not None:
            raise UnsupportedError(f"{problem.kind}: {reason}")
    shape = geometry(config, problem, device)
    variant = Variant(problem.kind, problem.dtype, problem.group_size, config)
    return Plan(
        problem,
        device,
        config,
        variant,
        shape,
        _workspace_bytes(config, shape),
        0 if config.cluster else shape.num_split_tiles,
        expanded,
    )


@lru_cache(maxsize=8192)
def plan(problem: Problem, device_index: int, config: Config | None = None, *, portable: bool = False) -> Plan:
    """`make_plan` for a GPU of this machine, cached. Raises: ValueError, UnsupportedError."""
    return make_plan(problem, driver.device_info(device_index), config, portable=portable)
