"""Which methods `benchmarks.quality` compares, and the protocol's numbers. Knows nothing of how a model is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from marlin import LayerRecipe
from marlin.compress.recipe import HELPS, PLAIN

WINDOW, GROUP_SIZE, SEED = 1024, 64, 0
MAX_RATIO, PROBE_WINDOWS, PROBE_TOKENS = 1.9, 2, 512
DENSE, MIXED, JOINT, BEST = "dense", "mixed", "joint", "joint-best"
RECOVERED, AUTO, LOW_RANK, BLOCKS = "joint-recovered", "auto-recovered", "joint-best-lr32", "joint-blocks"
STEPS = 384
TEXTS = ("wiki", "news")


@dataclass(frozen=True)
class Method:
    """One line of the table. recipe: of every decoder layer; None for the dense model and mixed recipes. sequential:
    and reconstruct: as in `marlin.Options`. base: key of the row whose result is recovered."""

    method: str
    label: str
    recipe: LayerRecipe | None
    sequential: bool = False
    base: str | None = None
    reconstruct: int = 0


def _method(method: str, label: str, kind: str, sequential: bool = False, reconstruct: int = 0, **more: Any) -> Method:
    options = [f"{name}={value}" for name, value in more.items()] + ["sequential"] * sequential
    options += [f"reconstruct={reconstruct}"] * (reconstruct > 0)
    shown = " + ".join([method, *options])
    recipe = LayerRecipe(kind=kind, method=method, group_size=GROUP_SIZE, **{**PLAIN, **more})
    return Method(shown, label, recipe, sequential, reconstruct=reconstruct)


SPARSE, INT4 = ("sparsegpt", "2:4 INT4", "w4a16_sp24"), ("gptq", "INT4", "w4a16_dense")
ALL_HELPS: dict[str, Any] = {name: HELPS[name] for name in ("order", "refine", "correct")}
METHODS: dict[str, Method] = {
    DENSE: Method("none", "dense", None),
    JOINT: _method(*SPARSE),
    "joint-order": _method(*SPARSE, order="activation"),
    "joint-refine": _method(*SPARSE, refine=3),
    "joint-correct": _method(*SPARSE, sequential=True, correct=0.5),
    "joint-correct-1": _method(*SPARSE, sequential=True, correct=1.0, order="activation", refine=3),
    "joint-damped": _method(*SPARSE, sequential=True, **ALL_HELPS, damping=0.05),
    BEST: _method(*SPARSE, sequential=True, **ALL_HELPS),
    BLOCKS: _method(*SPARSE, sequential=True, reconstruct=STEPS, **ALL_HELPS),
    LOW_RANK: _method(*SPARSE, sequential=True, **ALL_HELPS, low_rank=32),
    "rtn": _method("rtn", "INT4", "w4a16_dense"),
    "gptq": _method(*INT4),
    "gptq-order": _method(*INT4, order="activation"),
    "gptq-refine": _method(*INT4, refine=3),
    "gptq-best": _method(*INT4, sequential=True, **ALL_HELPS),
    MIXED: Method("as joint-best and gptq-best", "mixed", None, sequential=True),
    "prune-sparsegpt": _method("sparsegpt", "2:4", "sp24"),
    "prune-wanda": _method("wanda", "2:4", "sp24"),
    "prune-magnitude": _method("magnitude", "2:4", "sp24"),
    "joint-wanda": _method("wanda", "2:4 INT4", "w4a16_sp24"),
    "joint-magnitude": _method("magnitude", "2:4 INT4", "w4a16_sp24"),
    "joint-apart": _method("sparsegpt_rtn", "2:4 INT4", "w4a16_sp24"),
    RECOVERED: Method("recovered", "2:4 INT4", None, base=BEST),
    AUTO: Method("recovered", "auto", None, base="auto"),
}
TRIALS: dict[str, dict[str, Any]] = {
    "lr 5e-4": {"learning_rate": 5e-4},
    "lr 1e-3": {"learning_rate": 1e-3},
    "lr 2e-3": {"learning_rate": 2e-3},
    "lr 4e-3": {"learning_rate": 4e-3},
    "lr 1e-3, not relative": {"learning_rate": 1e-3, "relative": False},
}
