"""From a problem to a running kernel: choose a configuration, get a cubin, launch. Pointers and ints, never tensors."""

from marlin.runtime.config import TileConfig, all_configs, why_illegal
from marlin.runtime.launch import expand, freeze, launch
from marlin.runtime.plan import Plan, candidates, make_plan, plan
from marlin.runtime.problem import Problem

__all__ = [
    "Plan",
    "Problem",
    "TileConfig",
    "all_configs",
    "candidates",
    "expand",
    "freeze",
    "launch",
    "make_plan",
    "plan",
    "why_illegal",
]
