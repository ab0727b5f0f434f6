"""The whole job on a real model: compress it twice, measure, save, load back, generate, and write what came of it.

Owns the order of the steps, the protocol, and `results.json`. Each finished step is kept in the output folder, so that
a run that was killed goes on where it stopped; a run with other settings starts anew. Knows nothing of consoles: what
happens is told to a `Reporter`.

    out/sp24-int4/            all decoder linears 2:4 INT4
    out/mixed/                2:4 INT4 where the layer stands it, dense INT4 elsewhere
    out/mixed-recipe.json     the recipe that the measured sensitivity chose
    out/results.json          figures, protocol, generated text
    out/work/                 finished steps and blocks
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from marlin.demo import data
from marlin.errors import require

MAX_RATIO = 2.0
PROMPT = "Explain in two sentences why the sky is blue."
SPARSE, MIXED, DENSE = "sp24-int4", "mixed", "dense"
MODEL_NAME = "SmolLM2-135M-Instruct (from 4-bit GGUF, dequantized)"

Count = Callable[[int, int], None]


class Reporter(Protocol):
    """Where progress goes. bar: a context whose value is called with (done, total); write: streamed text."""

    def step(self, text: str) -> None: ...
    def bar(self, text: str) -> AbstractContextManager[Count]: ...
    def write(self, text: str) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What a run does; a run in the same folder continues only one with equal settings.

    device: "cpu" or "cuda[:N]". windows: of 1024 tokens for each perplexity. samples: calibration windows of 1024
    tokens. probe: windows x tokens on which the sensitivity of each unit is measured; choose_windows: windows on which
    the recipe put together must stay under choose_ratio times the dense perplexity. Both are drawn from the calibration
    text, disjoint from the calibration windows.
    """

    device: str = "cpu"
    windows: int = 8
    samples: int = 16
    window: int = 1024
    group_size: int = 64
    seed: int = 0
    probe: tuple[int, int] = (2, 256)
    choose_windows: int = 2
    # Why below 2: the choice is made on other text than the figure that counts is measured on.
    choose_ratio: float = 1.65
    texts: tuple[str, ...] = ("wiki",)
    prompt: str = PROMPT
    max_new_tokens: int = 48

    @property
    def dtype_name(self) -> str:
        """Of evaluation and generation."""
        return "float16" if self.device.startswith("cuda") else "float32"


def default_settings(device: str) -> Settings:
    """Sized for ten minutes on two CPU cores, or for the protocol of the published figures on a GPU."""
    if device.startswith("cuda"):
        return Settings(device, windows=40, samples=64, probe=(4, 1024), choose_windows=8, texts=("wiki", "news"))
    return Settings(device)


@dataclass
class State:
    """Finished steps by name, kept in a file."""

    path: Path
    settings: Settings
    steps: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, settings: Settings) -> State:
        """The state on disk if it is of equal settings, else an empty one; other settings' work is removed."""
        identity = json.loads(json.dumps(asdict(settings)))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and found.get("settings") == identity and isinstance(found.get("steps"), dict):
                return cls(path, settings, found["steps"])
        except (OSError, ValueError):
            pass
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        return cls(path, settings)

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The kept result of a step (JSON), or that of doing it now."""
        if name not in self.steps:
            started = time.perf_counter()
            value = json.loads(json.dumps(work()))
            self.steps[name] = {"value": value, "seconds": round(time.perf_counter() - started, 1)}
            body = {"settings": asdict(self.settings), "steps": self.steps}
            data.write_text(self.path, json.dumps(body, indent=2))
        return self.steps[name]["value"]

    def seconds(self) -> float:
        """Of all steps, over all runs."""
        return round(sum(step["seconds"] for step in self.steps.values()), 1)


class Demo:
    """One run: material, settings, folders. Each method is one step."""

    def __init__(self, out: Path, material: data.DemoData, settings: Settings, reporter: Reporter) -> None:
        self.out, self.material, self.settings, self.reporter = out, material, settings, reporter
        self.state = State.open(out / "work" / "state.json", settings)

    def load(self, directory: Path, device: str | None = None) -> tuple[Any, Any]:
        """Model and tokenizer, in float32 on the CPU and float16 on a GPU."""
        import torch

        from marlin.demo.models import load_model

        device = device or self.settings.device
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        return load_model(directory, torch.device(device), dtype)

    def windows(self, tokenizer: Any) -> tuple[Any, Any]:
        """(calibration [samples, window], other [B, window]): token ids of disjoint windows of the calibration text."""
        from marlin import api
        from marlin.compress import calibration_windows

        settings = self.settings
        ids = api.tokenize(self.material.calibration, tokenizer)
        count = settings.samples + max(settings.probe[0], settings.choose_windows)
        drawn = calibration_windows(ids, count, settings.window, settings.seed)
        return drawn[: settings.samples], drawn[settings.samples :]

    def perplexities(self, model: Any, tokenizer: Any, label: str) -> dict[str, float]:
        """Perplexity on each held-out text."""
        from marlin import api
        from marlin.evaluate import perplexity

        found = {}
        for name in self.settings.texts:
            ids = api.tokenize(getattr(self.material, name), tokenizer)
            with self.reporter.bar(f"perplexity of {label}, {name}") as progress:
                found[name] = perplexity(
                    model, ids, window=self.settings.window, limit=self.settings.windows, progress=progress
                )
        return found

    def generated(self, model: Any, tokenizer: Any, label: str) -> dict[str, Any]:
        """The answer to the prompt through the chat template, greedy, with its speed."""
        from marlin.demo.models import encode_prompt, generate

        ids, _ = encode_prompt(tokenizer, self.settings.prompt, chat=True)
        self.reporter.step(f"{label} answers: {self.settings.prompt}")
        streamer = generate(
            model, tokenizer, ids, max_new_tokens=self.settings.max_new_tokens, write=self.reporter.write
        )
        self.reporter.write("\n")
        rate = streamer.tokens_per_second
        return {"text": streamer.text, "tokens_per_second": None if rate is None else round(rate, 1)}

    def measure(self, directory: Path, label: str) -> dict[str, Any]:
        """Load a directory and measure it: perplexities, generated text, which path ran."""
        from marlin.demo.models import path_that_runs

        model, tokenizer = self.load(directory)
        path = path_that_runs(model)
        self.reporter.step(f"{label} loaded with transformers; path: {path}")
        result = {"perplexity": self.perplexities(model, tokenizer, label), "path": path}
        result.update(self.generated(model, tokenizer, label))
        return result

    def compress(self, recipe: Any, name: str) -> dict[str, Any]:
        """Compress the dense model by recipe and save it as out/name."""
        import torch

        from marlin import api
        from marlin.compress import Options

        model, tokenizer = self.load(self.material.model_dir, "cpu")
        calibration, _ = self.windows(tokenizer)
        with self.reporter.bar(f"compressing: {name}") as progress:
            options = Options(
                device=self.settings.device,
                seed=self.settings.seed,
                resume_dir=self.out / "work" / name,
                progress=lambda event: progress(event.done, event.total),
            )
            compressed = api.compress(model, calibration, recipe, options=options, dtype=torch.float16)
        api.save_pretrained(model, self.out / name, tokenizer=tokenizer, report=compressed, recipe=recipe)
        shutil.rmtree(self.out / "work" / name, ignore_errors=True)
        return {"seconds": round(compressed.seconds, 1)}

    def choose(self) -> dict[str, Any]:
        """The mixed recipe by measured sensitivity, from the all-2:4 weights on disk."""
        from marlin.compress import Options
        from marlin.compress.sensitivity import choose, measure
        from marlin.formats.checkpoint import open_directory
        from marlin.formats.layouts import unpack

        settings, options = self.settings, Options(device=self.settings.device)
        model, tokenizer = self.load(self.material.model_dir, settings.device)
        checkpoint = open_directory(self.out / SPARSE)
        weights = {name: unpack(checkpoint.packed(name)) for name in checkpoint.layers}
        _, other = self.windows(tokenizer)
        probe = other[: settings.probe[0], : settings.probe[1]].contiguous()
        with self.reporter.bar("measuring the sensitivity of each block") as progress:
            units = measure(model, weights, probe, options=options, progress=progress)
        self.reporter.step(
            f"choosing 2:4 layers: perplexity at most {settings.choose_ratio}x dense on calibration text"
        )
        judged = other[: settings.choose_windows]
        choice = choose(model, weights, judged, max_ratio=settings.choose_ratio, units=units, options=options)
        data.write_text(self.out / "mixed-recipe.json", choice.recipe.to_json())
        return {
            "recipe": choice.recipe.to_json(),
            "sparse_units": choice.num_sparse,
            "units": len(choice.units),
            "estimated_ratio": choice.perplexity / choice.dense_perplexity,
        }


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _row(label: str, directory: Path, measured: dict[str, Any], bits: float) -> dict[str, Any]:
    return {"model": label, "bytes": _size(directory), "bits_per_weight": bits, "directory": str(directory), **measured}


def _compressed_row(label: str, directory: Path, measured: dict[str, Any]) -> dict[str, Any]:
    from marlin.formats.checkpoint import read_directory_summary

    summary = read_directory_summary(directory)
    kinds = [layer.spec.kind for layer in summary.layers]
    row = _row(label, directory, measured, summary.bits_per_weight)
    return {**row, "layers": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}


def protocol(settings: Settings) -> str:
    """How the figures of a run were taken, in one sentence."""
    return (
        f"held-out text, the first {settings.windows} windows of {settings.window} tokens without overlap, "
        f"{settings.dtype_name}; calibration: {settings.samples} windows of {settings.window} tokens of other texts, "
        f"seed {settings.seed}; group_size {settings.group_size}"
    )


def run(out: str | Path, settings: Settings, reporter: Reporter, *, data_folder: Path | None = None) -> dict[str, Any]:
    """The whole demo; returns what out/results.json holds. Steps that an earlier run finished are not repeated.

    Raises: DemoError (material out of reach), ValueError, OSError (disk), CheckpointError (a damaged result).
    """
    from marlin.compress import Recipe, preset
    from marlin.demo.models import quiet_transformers

    require(
        settings.windows >= 1 and settings.samples >= 1,
        "demo",
        "windows and samples must be at least 1",
        f"{settings.windows} and {settings.samples}",
    )
    quiet_transformers()
    started, out = time.perf_counter(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    material = data.prepare(data_folder or data.default_folder(), reporter.step)
    demo = Demo(out, material, settings, reporter)
    state, rows = demo.state, []

    measured = state.once("measure dense", lambda: demo.measure(material.model_dir, DENSE))
    rows.append(_row("dense fp16", material.model_dir, measured, 16.0))
    # Why fast on the CPU: the correction takes two thirds as long again, and the demo is to end within ten minutes.
    recipe = preset(SPARSE if settings.device.startswith("cuda") else f"{SPARSE}-fast", settings.group_size)
    state.once("compress sp24-int4", lambda: demo.compress(recipe, SPARSE))
    choice = state.once("choose", demo.choose)
    mixed = Recipe.from_json(choice["recipe"])
    state.once("compress mixed", lambda: demo.compress(mixed, MIXED))
    for label, name in (("all 2:4 INT4", SPARSE), ("mixed", MIXED)):
        measured = state.once(f"measure {name}", partial(demo.measure, out / name, label))
        rows.append(_compressed_row(label, out / name, measured))
    result = {
        "model": MODEL_NAME,
        "protocol": protocol(settings),
        "settings": asdict(settings),
        "rows": rows,
        "mixed": {key: choice[key] for key in ("sparse_units", "units", "estimated_ratio")},
        "ratio": rows[2]["perplexity"]["wiki"] / rows[0]["perplexity"]["wiki"],
        "seconds": {name: step["seconds"] for name, step in state.steps.items()},
        "seconds_this_run": round(time.perf_counter() - started, 1),
    }
    text = json.dumps(result, indent=2)
    data.write_text(out / "results.json", text + "\n")
    return json.loads(text)
