"""How `benchmarks.quality` makes the model of a method: material, compression, the mixed recipes, recovery.

Owns the folder of finished work. Knows nothing of records and rows.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import marlin
from benchmarks import quality_methods as methods
from marlin import Options, Recipe
from marlin.compress.store import fingerprint
from marlin.errors import message

MEASURING_SECONDS = 25.0


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
    minutes: float = 20.0
    trial_minutes: float = 0.5
    bits: float = 3.5
    end: float = float("inf")
    recovery: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the end, those that saving and measuring take left out."""
        return self.end - time.monotonic() - MEASURING_SECONDS


class Material:
    """Model and token streams of a folder, loaded on first use."""

    def __init__(self, setting: Setting) -> None:
        from transformers import AutoTokenizer

        self.setting = setting
        self.tokenizer: Any = AutoTokenizer.from_pretrained(setting.data / "model", local_files_only=True)
        self.begin = marlin.api.beginning(self.tokenizer)
        self._streams: dict[str, torch.Tensor] = {}
        self.generated: torch.Tensor | None = None
        self.writing = 0.0

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

    def perplexity(self, model: Any, name: str) -> float:
        """Of a model on a text, by the protocol."""
        limit = self.setting.limit
        return marlin.evaluate.perplexity(
            model, self.stream(name), window=methods.WINDOW, limit=limit, begin=self.begin
        )

    def windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Calibration windows [samples, 1024] and, disjoint from them, the probe [2, 512] of the mixed recipe."""
        count = self.setting.samples + methods.PROBE_WINDOWS
        stream = self.stream("calibration")
        drawn = marlin.compress.calibration_windows(stream, count, methods.WINDOW, methods.SEED, self.begin)
        return drawn[: self.setting.samples], drawn[self.setting.samples :, : methods.PROBE_TOKENS].contiguous()


@dataclass
class Made:
    """A model by one method. result: None for the dense model. seconds: None where finished blocks were taken over."""

    model: Any
    result: Any
    label: str
    seconds: float | None


def compress(
    material: Material, key: str, recipe: Recipe, label: str, sequential: bool = False, reconstruct: int = 0
) -> Made:
    """Compress the dense model; finished blocks are kept under setting.work and taken from there."""
    setting, resumed = material.setting, False

    def show(event: Any) -> None:
        nonlocal resumed
        resumed |= event.stage == "resumed"
        error = "" if event.error is None else f", error {event.error:.4f}"
        text = f"\r{key}: block {event.done}/{event.total}, {event.seconds:.0f} s{error}   "
        print(text, end="", file=sys.stderr, flush=True)

    model = material.model()
    options = Options(
        setting.device,
        methods.SEED,
        sequential=sequential,
        reconstruct=reconstruct,
        resume_dir=setting.work / key,
        progress=show,
    )
    result = marlin.compress.compress_model(model, material.windows()[0], recipe, options=options)
    spent = setting.work / f"{key}.seconds"
    if not resumed:
        spent.write_text(f"{result.seconds}", encoding="utf-8")
    return Made(model, result, label, float(spent.read_text(encoding="utf-8")) if spent.exists() else None)


def choose(material: Material) -> tuple[Recipe, float | None]:
    """The mixed recipe and the seconds of choosing it, or the one kept under setting.work and None."""
    setting = material.setting
    kept = setting.work / "mixed.json"
    if kept.exists():
        return Recipe.from_json(json.dumps(json.loads(kept.read_text(encoding="utf-8"))["recipe"])), None
    weights = make(material, methods.BEST).result.weights
    started = time.perf_counter()
    choice = marlin.compress.sensitivity.choose(
        material.model().to(setting.device),
        weights,
        material.windows()[1],
        max_ratio=methods.MAX_RATIO,
        options=Options(device=setting.device),
    )
    kept.write_text(choice.to_json(), encoding="utf-8")
    return choice.recipe, time.perf_counter() - started


def share_label(result: Any) -> str:
    """How a mixed recipe stands in the table."""
    sparse = sum(row.n * row.k for row in result.report if row.kind == "w4a16_sp24")
    return f"{sparse / sum(row.n * row.k for row in result.report):.0%} of weights 2:4 INT4, rest INT4"


def auto(material: Material) -> Made:
    """The mixed recipe of setting.bits bits a weight, with the options of the best one-shot rows."""
    setting, started = material.setting, time.perf_counter()
    weights = make(material, methods.BEST).result.weights
    options = Options(device=setting.device)
    dense = material.model().to(setting.device)
    units = marlin.compress.sensitivity.measure(dense, weights, material.windows()[1], options=options)
    int4 = methods.METHODS["gptq-best"].recipe
    assert int4 is not None
    recipe = marlin.compress.sensitivity.for_bits(units, weights, setting.bits, int4)
    best = methods.METHODS[methods.BEST].recipe
    recipe = Recipe(tuple((pattern, best) for pattern, _ in recipe.rules), recipe.default)
    seconds = time.perf_counter() - started
    made = compress(material, f"auto-{setting.bits}", recipe, "", sequential=True)
    made.label = share_label(made.result)
    made.seconds = None if made.seconds is None else seconds + made.seconds
    return made


def make(material: Material, key: str) -> Made:
    """The model of one method."""
    if key == "auto":
        return auto(material)
    method = methods.METHODS[key]
    if key == methods.DENSE:
        return Made(material.model(), None, method.label, None)
    if method.recipe is not None:
        recipe = Recipe(default=method.recipe)
        return compress(material, key, recipe, method.label, method.sequential, method.reconstruct)
    if method.base is not None:
        return recover(material, key, make(material, method.base))
    mixed, seconds = choose(material)
    made = compress(material, key, mixed, "", method.sequential)
    made.label = share_label(made.result)
    made.seconds = None if seconds is None or made.seconds is None else seconds + made.seconds
    return made


def shower(key: str) -> Any:
    """A recovery's progress on one line."""

    def show(event: Any) -> None:
        loss = "" if event.loss is None else f" step {event.step} loss {event.loss:.4f} held out {event.held_out:.4f}"
        print(f"\r{key}: {event.stage} {event.share:.0%}{loss}", end="", file=sys.stderr, flush=True)

    return show


def writer(material: Material, key: str) -> marlin.compress.Recovery:
    """The settings that text is written with."""
    setting = material.setting
    return marlin.compress.Recovery(
        **setting.recovery,
        minutes=setting.minutes,
        device=setting.device,
        seed=methods.SEED,
        begin=material.begin,
        progress=shower(key),
    )


def kept_text(path: pathlib.Path, identity: dict[str, str], most: float) -> tuple[torch.Tensor, float] | None:
    """Tokens kept at path and the seconds of writing them; None where others are, or took more than `most` seconds."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if header.get("identity") != json.dumps(identity) or float(header["seconds"]) > most:
            return None
        return file.get_tensor("ids"), float(header["seconds"])


def keep_text(path: pathlib.Path, identity: dict[str, str], ids: torch.Tensor, seconds: float) -> None:
    """Write tokens aside and rename; a second run finds them."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(
            {"ids": ids.contiguous()}, aside, metadata={"identity": json.dumps(identity), "seconds": f"{seconds}"}
        )
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write(material: Material, key: str, teacher: Any) -> float:
    """Let the dense model write what all recoveries are trained on, once; returns the seconds that it took.

    The tokens are kept under setting.work, by model, text and settings of the writing; how long a run lets it write is
    not among them, so that one with more or less time takes them too (unless writing took half of its minutes).
    """
    setting = material.setting
    if material.generated is not None:
        return material.writing
    recovery = writer(material, key)
    # Why cut: the tail of the text is held out by the recovery.
    stream = material.stream("calibration")
    stream = stream[: int(0.9 * stream.numel())]
    names = ("generated_tokens", "generated_rows", "generated_length", "seed")
    settings = {name: getattr(recovery, name) for name in names} | {"device": torch.device(setting.device).type}
    identity, path = fingerprint(teacher, stream, "", settings), setting.work / "generated.safetensors"
    found = kept_text(path, identity, 30 * setting.minutes)
    if found is None:
        started = time.perf_counter()
        seconds = min(setting.minutes * 60, max(setting.left(), 1.0)) * recovery.generation_share
        ids = marlin.compress.generate_text(teacher.to(setting.device), stream, recovery, seconds)
        found = ids, time.perf_counter() - started
        if ids.numel():
            keep_text(path, identity, *found)
        print(f"\r{key}: {ids.numel()} tokens written in {found[1]:.1f} s", file=sys.stderr, flush=True)
    else:
        print(f"{key}: {found[0].numel()} tokens taken from {path}", file=sys.stderr, flush=True)
    material.generated, material.writing = found
    return material.writing


def train(material: Material, key: str, made: Made, teacher: Any, minutes: float, more: dict[str, Any]) -> Any:
    """One recovery of made.model, in place; its report is kept under setting.work."""
    setting = material.setting
    recovery = marlin.compress.Recovery(
        **{**setting.recovery, **more},
        minutes=minutes,
        device=setting.device,
        seed=methods.SEED,
        begin=material.begin,
        progress=shower(key),
    )
    stream = material.stream("calibration")
    result = marlin.compress.recover(
        made.model, teacher, made.result.weights, stream, recovery=recovery, generated=material.generated
    )
    path = setting.work / f"recovery-{re.sub('[^a-z0-9.-]+', '-', key)}.json"
    path.write_text(json.dumps(result.report), encoding="utf-8")
    final = f"{result.report['divergence_before']:.4f} to {result.report['divergence']:.4f}"
    speed = result.report["tokens"] / result.report["training_seconds"]
    print(
        f"\r{key}: divergence {final}, {result.report['steps']} steps, {speed:.0f} tokens/s, "
        f"{result.report['seconds']} s, {result.report['generated_tokens']} generated",
        file=sys.stderr,
        flush=True,
    )
    return result


def tried(material: Material, made: Made, teacher: Any) -> dict[str, Any]:
    """The settings of the best trial, of those kept under setting.work or made now; none without trials."""
    setting, kept = material.setting, material.setting.work / "trials.json"
    if setting.trial_minutes > 0 and not kept.exists():
        scores: dict[str, float] = {}
        warm = Made(copy.deepcopy(made.model), made.result, "", None)
        train(material, "compiling", warm, teacher, 0.01, {})
        for name, changes in methods.TRIALS.items():
            trial, changes = Made(copy.deepcopy(made.model), made.result, name, None), {**changes, "validations": 2}
            scores[name] = train(material, f"trial {name}", trial, teacher, setting.trial_minutes, changes).report[
                "divergence"
            ]
            kept.write_text(json.dumps(scores), encoding="utf-8")
    if not kept.exists():
        return {}
    scores = json.loads(kept.read_text(encoding="utf-8"))
    return methods.TRIALS[min(scores, key=scores.__getitem__)]


def recover(material: Material, key: str, made: Made) -> Made:
    """made, trained; with the settings of the best trial where there are trials."""
    setting, teacher = material.setting, material.model()
    writing = write(material, key, teacher)
    started = time.perf_counter()
    more = tried(material, made, teacher)
    minutes = max(min(setting.minutes - writing / 60, setting.left() / 60), 0.01)
    made.result.weights = train(material, key, made, teacher, minutes, more).weights
    spent = time.perf_counter() - started + writing
    made.seconds = None if made.seconds is None else made.seconds + spent
    return made


def reloaded(material: Material, made: Made, key: str) -> float:
    """Wiki perplexity of the model saved as a packed directory, loaded again and unpacked."""
    setting = material.setting
    folder = setting.work / f"saved-{key}"
    model = copy.deepcopy(made.model).cpu()
    marlin.replace_linears(model, made.result.weights, torch.float16, made.result.low_rank)
    marlin.save_pretrained(model.half(), folder, overwrite=True)
    loaded = marlin.api.load(folder)
    plain = material.model()
    names = dict(marlin.sparse_linears(loaded))
    values = {name: tensor for name, tensor in loaded.state_dict().items() if name.rpartition(".")[0] not in names}
    values |= {f"{name}.weight": layer.to_dense(torch.float32) for name, layer in names.items()}
    plain.load_state_dict(values)
    return material.perplexity(plain.to(setting.device), "wiki")
