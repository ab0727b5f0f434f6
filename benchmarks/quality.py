"""Perplexity by method on a real model: `python -m benchmarks.quality --data FOLDER`.

Owns `benchmarks/records/quality-NAME.json`: which methods are compared and by what protocol. FOLDER is what
`marlin demo` prepares: `model/` (a Hugging Face directory) and `text/{calibration,wiki,news}-v*.txt`.

Protocol: perplexity by `marlin.evaluate` in float32, windows of 1024 tokens without overlap and without special tokens,
the first 40; calibration on 16 windows of 1024 tokens of other articles, seed 0, shared by all rows; group_size 64. The
mixed recipe is chosen on 2 calibration windows of 512 tokens that no row is calibrated on.

A figure that is in the record is not measured again (--again measures the rows named anew). A row: key (of `METHODS`),
model, method, recipe, wiki, news, bits_per_weight (of the decoder's linear layers), seconds (of compression, and of the
choice where there is one; null when it was resumed), device, peak_memory_gib (of compression, model included). Runs on
the CPU or on one GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

import marlin
from benchmarks import records
from marlin import LayerRecipe, Options, Recipe
from marlin.errors import message

WINDOW, GROUP_SIZE, SEED = 1024, 64, 0
MAX_RATIO, PROBE_WINDOWS, PROBE_TOKENS = 1.9, 2, 512
DENSE, MIXED, JOINT = "dense", "mixed", "joint"
TEXTS = ("wiki", "news")


@dataclass(frozen=True)
class Method:
    """One line of the table. recipe: of every decoder layer; None for the dense model and the mixed recipe."""

    method: str
    label: str
    recipe: LayerRecipe | None


def _method(method: str, label: str, kind: str) -> Method:
    return Method(method, label, LayerRecipe(kind=kind, method=method, group_size=GROUP_SIZE))


METHODS: dict[str, Method] = {
    DENSE: Method("none", "dense", None),
    JOINT: _method("sparsegpt", "2:4 INT4", "w4a16_sp24"),
    MIXED: Method("sparsegpt + rtn", "mixed", None),
    "rtn": _method("rtn", "INT4", "w4a16_dense"),
    "gptq": _method("gptq", "INT4", "w4a16_dense"),
    "prune-sparsegpt": _method("sparsegpt", "2:4", "sp24"),
    "prune-wanda": _method("wanda", "2:4", "sp24"),
    "prune-magnitude": _method("magnitude", "2:4", "sp24"),
    "joint-wanda": _method("wanda", "2:4 INT4", "w4a16_sp24"),
    "joint-magnitude": _method("magnitude", "2:4 INT4", "w4a16_sp24"),
    "joint-apart": _method("sparsegpt_rtn", "2:4 INT4", "w4a16_sp24"),
}


@dataclass(frozen=True)
class Setting:
    """Where material and work are, and how much of it is used."""

    data: pathlib.Path
    work: pathlib.Path
    name: str
    device: str
    samples: int
    limit: int
    texts: tuple[str, ...]


class Material:
    """Model and token streams of a folder, loaded on first use."""

    def __init__(self, setting: Setting) -> None:
        from transformers import AutoTokenizer

        self.setting = setting
        self.tokenizer: Any = AutoTokenizer.from_pretrained(setting.data / "model", local_files_only=True)
        self._streams: dict[str, torch.Tensor] = {}

    def stream(self, name: str) -> torch.Tensor:
        """Token ids of a text, int64. Raises: FileNotFoundError."""
        if name not in self._streams:
            found = sorted((self.setting.data / "text").glob(f"{name}-v*.txt"))
            if not found:
                where = str(self.setting.data / "text")
                raise FileNotFoundError(
                    message(
                        "benchmarks.quality", f"--data must hold text/{name}-v*.txt", where, "Run `marlin demo` first."
                    )
                )
            ids = self.tokenizer(found[-1].read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
            self._streams[name] = torch.tensor(ids, dtype=torch.int64)
        return self._streams[name]

    def model(self) -> Any:
        """The dense model in float32 on the CPU."""
        from transformers import AutoModelForCausalLM

        path = self.setting.data / "model"
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()

    def windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Calibration windows [samples, 1024] and, disjoint from them, the probe [2, 512] of the mixed recipe."""
        count = self.setting.samples + PROBE_WINDOWS
        drawn = marlin.compress.calibration_windows(self.stream("calibration"), count, WINDOW, SEED)
        return drawn[: self.setting.samples], drawn[self.setting.samples :, :PROBE_TOKENS].contiguous()


def reset_peak(device: str) -> None:
    """Forget the highest memory use so far."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_gib(device: str) -> float | None:
    """Highest memory use since `reset_peak`: of the GPU's allocator, or resident memory of this process on Linux."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    except OSError:
        return None
    return round(int(found.group(1)) / 2**20, 2) if found else None


def device_name(device: str) -> str:
    """As it stands in the table."""
    return (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    )


@dataclass
class Made:
    """A model by one method. result: None for the dense model. seconds: None where finished blocks were taken over."""

    model: Any
    result: Any
    label: str
    seconds: float | None


def compress(material: Material, key: str, recipe: Recipe, label: str) -> Made:
    """Compress the dense model; finished blocks are kept under setting.work and taken from there."""
    setting, resumed = material.setting, False

    def show(event: Any) -> None:
        nonlocal resumed
        resumed |= event.stage == "resumed"
        print(f"\r{key}: block {event.done}/{event.total}, {event.seconds:.0f} s", end="", file=sys.stderr, flush=True)

    model = material.model()
    options = Options(device=setting.device, seed=SEED, resume_dir=setting.work / key, progress=show)
    result = marlin.compress.compress_model(model, material.windows()[0], recipe, options=options)
    return Made(model, result, label, None if resumed else result.seconds)


def choose(material: Material) -> tuple[Recipe, float | None]:
    """The mixed recipe and the seconds of choosing it, or the one kept under setting.work and None."""
    setting = material.setting
    kept = setting.work / "mixed.json"
    if kept.exists():
        return Recipe.from_json(json.dumps(json.loads(kept.read_text(encoding="utf-8"))["recipe"])), None
    weights = make(material, JOINT).result.weights
    started = time.perf_counter()
    choice = marlin.compress.sensitivity.choose(
        material.model().to(setting.device),
        weights,
        material.windows()[1],
        max_ratio=MAX_RATIO,
        options=Options(device=setting.device),
    )
    kept.write_text(choice.to_json(), encoding="utf-8")
    return choice.recipe, time.perf_counter() - started


def make(material: Material, key: str) -> Made:
    """The model of one method."""
    method = METHODS[key]
    if key == DENSE:
        return Made(material.model(), None, method.label, None)
    if method.recipe is not None:
        return compress(material, key, Recipe(default=method.recipe), method.label)
    recipe, seconds = choose(material)
    made = compress(material, key, recipe, "")
    sparse = sum(row.n * row.k for row in made.result.report if row.kind == "w4a16_sp24")
    made.label = f"{sparse / sum(row.n * row.k for row in made.result.report):.0%} of weights 2:4 INT4, rest INT4"
    made.seconds = None if seconds is None or made.seconds is None else seconds + made.seconds
    return made


def measure(material: Material, key: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row of one method; what the given row already has of it is kept."""
    setting = material.setting
    reset_peak(setting.device)
    made = make(material, key)
    peak = peak_gib(setting.device)
    made.model.to(setting.device)
    found = {name: row.get(name) for name in TEXTS}
    for name in (name for name in setting.texts if found[name] is None):
        value = marlin.evaluate.perplexity(made.model, material.stream(name), window=WINDOW, limit=setting.limit)
        found[name] = round(value, 2)
        print(f"\r{key}: {name} perplexity {value:.2f}          ", file=sys.stderr, flush=True)
    cost = {
        "seconds": None if made.seconds is None else round(made.seconds, 1),
        "device": device_name(setting.device),
        "peak_memory_gib": None if made.seconds is None else peak,
    }
    return {
        "key": key,
        "model": setting.name,
        "method": METHODS[key].method,
        "recipe": made.label,
        **found,
        "bits_per_weight": 16.0 if made.result is None else round(made.result.bits_per_weight(), 3),
        **(cost if made.seconds is not None or not row else {name: row[name] for name in cost}),
    }


def header(setting: Setting) -> dict[str, Any]:
    """What holds for all rows of a record."""
    import transformers

    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "protocol": (
            f"perplexity of the first {setting.limit} windows of {WINDOW} tokens, no overlap, no special tokens, "
            f"float32; calibration {setting.samples} x {WINDOW} tokens, seed {SEED}; group_size {GROUP_SIZE}"
        ),
    }


def update(path: pathlib.Path, material: Material, keys: list[str], again: bool) -> dict[str, Any]:
    """Measure what the record at path lacks, writing it after each row; returns the record.

    Raises: ValueError (the record was made by another protocol).
    """
    setting = material.setting
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**header(setting), "rows": []}
    if record["protocol"] != header(setting)["protocol"]:
        fix = "Choose another --out, or delete it."
        raise ValueError(message("benchmarks.quality", "the record must be of this protocol", record["protocol"], fix))
    rows = {row["key"]: row for row in record["rows"]}
    if again:
        for key in keys:
            rows.pop(key, None)
            shutil.rmtree(setting.work / key, ignore_errors=True)
            (setting.work / f"{key}.json").unlink(missing_ok=True)
    for key in keys:
        row = rows.get(key, {})
        if row and all(row[name] is not None for name in setting.texts):
            continue
        rows[key] = measure(material, key, row)
        record = {**header(setting), "rows": [rows[name] for name in METHODS if name in rows]}
        records.write(path, record)
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder that `marlin demo` prepared")
    parser.add_argument("--name", default="SmolLM2-135M", help="the model's name in the table")
    parser.add_argument("--out", type=pathlib.Path, help="record; default: benchmarks/records/quality-NAME.json")
    parser.add_argument("--work", type=pathlib.Path, help="folder for finished blocks; default: DATA/quality")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--limit", type=int, default=40, help="windows of each text")
    parser.add_argument("--texts", default=",".join(TEXTS), help=f"of {', '.join(TEXTS)}")
    parser.add_argument("--rows", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--again", action="store_true", help="measure rows that the record already has")
    given = parser.parse_args(arguments)
    keys = [key for key in METHODS if key in given.rows.split(",")]
    for option, values, known in (("rows", given.rows, METHODS), ("texts", given.texts, TEXTS)):
        unknown = sorted(set(values.split(",")) - set(known))
        if unknown:
            parser.error(message("benchmarks.quality", f"--{option} must be of {', '.join(known)}", ", ".join(unknown)))
    work = given.work or given.data / "quality"
    work.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        given.data, work, given.name, given.device, given.samples, given.limit, tuple(given.texts.split(","))
    )
    material = Material(setting)
    path = given.out or records.RECORDS / f"quality-{given.name.lower()}.json"
    update(path, material, keys, given.again)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
