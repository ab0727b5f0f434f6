"""Batch-invariant choice: configurations that add the products of an output in an order that M has no part in.

Owns what fixes that order, and which order a layer gets. Pure Python; knows no kernel text.

A sum over K is grouped by the warps (or warpgroups) that share a chunk, which take its 64 columns in turn, and by the
blocks that share a tile; within a group the instructions take K in ascending order, whatever the extents of the tile.
So configurations that agree in both groupings give the same bits for every row, and M may choose among them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from marlin.runtime.config import Config, TileConfig, all_configs, why_illegal
from marlin.runtime.cost import cost_us
from marlin.runtime.problem import Problem

if TYPE_CHECKING:
    from marlin.runtime.driver import DeviceInfo

# An order is chosen by its mean cost at these M, each relative to that of the cheapest order there.
REFERENCE_M = (1, 16, 64, 256, 1024)
_MAX_CLUSTER = 2  # a sum of two parts is the same from both ends; of more it depends on the row which comes first


class Order(NamedTuple):
    """What fixes the order of additions.

    family: its instructions; groups: warps or warpgroups along K; blocks: that share a tile; columns: of K that each
    of them takes, zeros beyond the end of K included.
    """

    family: str
    groups: int
    blocks: int
    columns: int


def order(config: Config, problem: Problem) -> Order | None:
    """The order in which a configuration adds, or None where it depends on M."""
    chunks = -(-problem.k // config.block_k)
    if isinstance(config, TileConfig):
        return Order(config.family, config.warps_k, 1, chunks * config.block_k)
    if not 1 <= config.cluster <= _MAX_CLUSTER:
        return None
    return Order(config.family, config.wgs_k, config.cluster, -(-chunks // config.cluster) * config.block_k)


def why_variant(config: Config, problem: Problem) -> str | None:
    """Why a configuration cannot serve a batch-invariant problem, in a sentence, or None."""
    if order(config, problem) is not None:
        return None
    if config.cluster:
        return f"{config.tag} adds parts of a tile in an order that depends on the row."
    return f"{config.tag} shares tiles evenly among the blocks of the grid, so M decides how K is cut."


@lru_cache(maxsize=8192)
def _chosen_order(problem: Problem, device: DeviceInfo) -> Order | None:
    orders: dict[Order, list[Config]] = {}
    for config in all_configs(problem.kind):
        key = order(config, problem)
        if key is not None and why_illegal(config, problem, device) is None:
            orders.setdefault(key, []).append(config)
    relative = dict.fromkeys(orders, 0.0)
    for m in REFERENCE_M:
        at_m = problem._replace(m=m)
        costs = {key: min(cost_us(config, at_m, device) for config in configs) for key, configs in orders.items()}
        for key, us in costs.items():
            relative[key] += us / min(costs.values())
    return min(relative, key=relative.__getitem__, default=None)


def chosen_order(problem: Problem, device: DeviceInfo) -> Order | None:
    """The order of a layer on a GPU, the same for every M; None where no configuration can run."""
    return _chosen_order(problem._replace(m=1, batch_invariant=True), device)
