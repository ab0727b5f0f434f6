"""Tasks of the Language Model Evaluation Harness (`lm_eval`) on a loaded model.

Owns the call of the harness and what is kept of its answer. Knows nothing of compression, formats and kernels: the
model runs as it is. Needs lm_eval 0.4 or newer; its tasks fetch their data by themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marlin.errors import UnsupportedError, message, require

_OP = "eval tasks"


def _harness() -> Any:
    try:
        for part in ("tasks", "models.huggingface"):
            importlib.import_module(f"lm_eval.{part}")
        return importlib.import_module("lm_eval")
    except ImportError as error:
        fix = "Install it: pip install lm_eval."
        raise UnsupportedError(message(_OP, "lm_eval must be installed", str(error), fix)) from error


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """The metrics of each task and group of tasks, by name: {"arc_easy": {"acc": 0.7, "acc_stderr": 0.01}}.

    shots: examples before each question, None as the task says. limit: questions a task, None all. folder: of more
    tasks, in the harness's YAML.
    Raises: UnsupportedError (lm_eval is absent), ValueError (no task, one that is not known).
    """
    lm_eval = _harness()
    require(bool(names), _OP, "there must be a task", "none", "Name one, as lm_eval does.")
    known = lm_eval.tasks.TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in names if name not in known.all_tasks]
    fix = "`lm_eval ls tasks` lists them; --task-folder adds those of a folder."
    require(not unknown, _OP, "tasks must be known to lm_eval", ", ".join(unknown), fix)
    wrapped = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    answer = lm_eval.simple_evaluate(
        model=wrapped, tasks=list(names), num_fewshot=shots, limit=limit, task_manager=known, log_samples=False
    )
    return {name: _numbers(metrics) for name, metrics in answer["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics of a task ("acc,none") without the name of the filter, except where another filter has the same."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        name, comma, _ = key.partition(",")
        if comma and isinstance(value, int | float):
            found[key if name in found else name] = float(value)
    return found
