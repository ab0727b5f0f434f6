"""The package in four calls: `compress` a model in memory, `recover` its quality, `save_pretrained` it, `load` it.

Owns the order of the steps, and the model card. The steps belong to `marlin.compress`, `marlin.nn`,
`marlin.formats.checkpoint` and `marlin.integrations.transformers`. transformers is imported by the calls that need it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from marlin import experts, nn
from marlin.compress import Compressed, Options, Recipe, Recovery, calibration_windows, compress_model, preset
from marlin.compress import recover as train
from marlin.errors import UnsupportedError, message, require
from marlin.formats import checkpoint
from marlin.formats.atomic import check_replaceable, replace_directory

REPORT_FILE, CARD_FILE = "compression_report.json", "README.md"


def tokenize(texts: str | Sequence[str], tokenizer: Any) -> torch.Tensor:
    """One token stream of texts joined in order, without special tokens: int64 [tokens].

    Raises: TypeError (no tokenizer, or something else than text), ValueError (no token at all).
    """
    op = "tokenize"
    parts = [texts] if isinstance(texts, str) else list(texts)
    if tokenizer is None or not all(isinstance(part, str) for part in parts):
        got = "no tokenizer" if tokenizer is None else f"a list with {sorted({type(p).__name__ for p in parts})}"
        raise TypeError(message(op, "texts must be strings and come with a tokenizer", got, "Pass tokenizer=..."))
    ids = [torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"], dtype=torch.int64) for part in parts]
    stream = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)
    require(stream.numel() > 0, op, "texts must hold at least one token", "none")
    return stream


def beginning(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text (BOS of Llama and Gemma), None where it puts none."""
    ids = [] if tokenizer is None else list(tokenizer("a")["input_ids"])
    first = ids[0] if ids else None
    return first if first is not None and first == getattr(tokenizer, "bos_token_id", None) else None


def compress(
    model: Any,
    calibration: torch.Tensor | str | Sequence[str],
    recipe: Recipe | str | None = None,
    *,
    tokenizer: Any = None,
    samples: int = 16,
    length: int = 1024,
    options: Options | None = None,
    dtype: torch.dtype | None = None,
) -> Compressed:
    """Compress a causal language model in place: its linears become `SparseLinear`, ready to run and to save.

    calibration: int64 token ids [S, T], or text (with tokenizer), of which `samples` windows of `length` tokens are
    drawn. recipe: a `Recipe`, the name of a preset, or None for all decoder linears to 2:4 INT4. dtype: of everything
    that stays floating point, scales included (None keeps the model's). Fused experts of a mixture become linear layers
    first (`marlin.experts.split`).
    Raises: ValueError, TypeError (calibration, recipe, layer shapes, dtype that cannot hold a scale, a model that is
    compressed already).
    """
    options = options or Options()
    found = next(nn.sparse_linears(model), None)
    if found is not None:
        fix = "Compress the model that it was made of."
        raise ValueError(message("compress", "the model must be dense", f"compressed layer {found[0]}", fix))
    if isinstance(recipe, str):
        recipe = preset(recipe)
    if not isinstance(calibration, torch.Tensor):
        begin, stream = beginning(tokenizer), tokenize(calibration, tokenizer)
        calibration = calibration_windows(stream, samples, length, options.seed, begin)
    recipe = recipe or Recipe()
    experts.split(model, lambda name: recipe.layer(name).kind != "skip")
    compressed = compress_model(model, calibration, recipe, options=options)
    nn.replace_linears(model, compressed.weights, dtype, compressed.low_rank)
    if dtype is not None:
        model.to(dtype)
    if hasattr(model, "save_pretrained"):
        _attach(model)
    return compressed


def recover(
    model: Any,
    teacher: Any,
    text: torch.Tensor | str | Sequence[str],
    *,
    recovery: Recovery,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Train a compressed model in place to predict what the dense model predicts; returns the report, JSON.

    model: what `compress` left or `load` gave. teacher: the dense model. text: int64 token ids, or text with its
    tokenizer; never what the result is judged on. Masks stay, so do names, kinds and sizes; codes, scales, norms and
    biases change, and stay exactly what is saved. On the device recovery.device, with about 24 bytes a weight.
    Raises: ValueError (nothing compressed, text too short, memory, a loss that is not finite), TypeError,
    CheckpointError (resume_dir of another run, or damaged).
    """
    ids = text if isinstance(text, torch.Tensor) else tokenize(text, tokenizer)
    weights = {name: layer.to_weight() for name, layer in nn.sparse_linears(model)}
    dtype = next((layer.scales.dtype for _, layer in nn.sparse_linears(model)), torch.float16)
    begin = beginning(tokenizer) if recovery.begin is None else recovery.begin
    found = train(model, teacher, weights, ids, recovery=replace(recovery, dtype=dtype, begin=begin))
    for name, weight in found.weights.items():
        old = model.get_submodule(name)
        layer = nn.SparseLinear.from_weight(weight, old.bias, dtype, old.low_rank)
        layer.to(old.scales.device).train(old.training)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    return found.report


def _attach(model: Any) -> None:
    try:
        from marlin.integrations.transformers.quantizer import attach
    except ImportError as error:
        fix = "Install it: pip install 'sparse-marlin[transformers]'."
        raise UnsupportedError(message("marlin", "transformers must be installed", str(error), fix)) from error
    attach(model)


def save_pretrained(
    model: Any,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    report: Compressed | Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    numbers: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a compressed model as a Hugging Face directory, whole or not at all; returns the directory.

    Beside what `model.save_pretrained` writes: the tokenizer, `compression_report.json` (report, recipe, numbers) and
    a model card: use, layers, calibration, results, recipe. report: what `compress` returned, or any JSON object, whose
    "calibration" (an object) is shown too. An existing directory is replaced when it is empty, holds a model of ours,
    or under overwrite.
    Raises: TypeError (not a model of transformers), ValueError (nothing compressed, adapters attached),
    FileExistsError, NotADirectoryError, OSError, CheckpointError (illegal values).
    """
    op = "save_pretrained"
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        fix = "Save other modules with torch.save(model.state_dict())."
        raise TypeError(message(op, "model must be a transformers.PreTrainedModel", type(model).__name__, fix))
    found = next(nn.sparse_linears(model), None)
    if found is None:
        raise ValueError(message(op, "model must have a compressed layer", "none", "Call marlin.compress first."))
    fix = "Save the adapters with model.save_pretrained, and the model without them (PeftModel.unload)."
    require(not found[0].endswith(".base_layer"), op, "model must have no adapters", found[0], fix)
    target = Path(directory)
    check_replaceable(target, overwrite, checkpoint.is_directory_of_ours)
    record = card_record(report, recipe, numbers)
    _attach(model)
    options: dict[str, Any] = {"max_shard_size": max_shard_size}
    if "save_original_format" in inspect.signature(type(model).save_pretrained).parameters:
        options["save_original_format"] = False  # Why: names of tensors must be those of the modules.
    with replace_directory(target, overwrite=overwrite, is_ours=checkpoint.is_directory_of_ours) as temporary:
        model.save_pretrained(temporary, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_card(temporary, target.name, record, tokenizer is not None)
    return target


def write_card(directory: Path, name: str, record: Mapping[str, Any], has_tokenizer: bool) -> None:
    """Write the report and the model card of a directory that is otherwise whole. record: what `card_record` gave."""
    summary = checkpoint.read_directory_summary(directory)
    (directory / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (directory / CARD_FILE).write_text(_card(name, summary, record, has_tokenizer), encoding="utf-8")


def card_record(
    report: Compressed | Mapping[str, Any] | None, recipe: Recipe | None, numbers: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What `compression_report.json` holds. Raises: TypeError (something that JSON cannot hold)."""
    body = json.loads(report.report_json()) if isinstance(report, Compressed) else dict(report or {})
    if recipe is not None:
        body["recipe"] = json.loads(recipe.to_json())
    if numbers is not None:
        body["numbers"] = dict(numbers)
    try:
        json.dumps(body)
    except (TypeError, ValueError) as error:
        raise TypeError(message("save_pretrained", "report and numbers must be JSON", str(error))) from error
    return body


def _layer_rows(summary: checkpoint.DirectorySummary) -> list[str]:
    rows = ["| kind | layers | weights | bits per weight | MB |", "|---|---:|---:|---:|---:|"]
    for kind in checkpoint.KINDS:
        layers = [layer for layer in summary.layers if layer.spec.kind == kind]
        if layers:
            weights, nbytes = sum(x.spec.n * x.spec.k for x in layers), sum(x.nbytes for x in layers)
            rows.append(f"| {kind} | {len(layers)} | {weights:,} | {8 * nbytes / weights:.2f} | {nbytes / 1e6:,.1f} |")
    others = summary.unquantized_bytes
    rows.append(f"| not quantized | {len(others)} tensors | | | {sum(others.values()) / 1e6:,.1f} |")
    return rows


def _show(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _use(name: str, has_tokenizer: bool) -> list[str]:
    """How the model is loaded and, with its tokenizer, asked."""
    lines = ["```python", "import marlin  # pip install 'sparse-marlin[transformers]'"]
    lines += [f"from transformers import AutoModelForCausalLM{', AutoTokenizer' * has_tokenizer}", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")']
    if has_tokenizer:
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
        lines += ['inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)']
        lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"]
    return [*lines, "```", ""]


def _solved_rows(record: Mapping[str, Any]) -> list[str]:
    """How the layers were solved, by kind and method: calibration tokens that a layer saw, and relative errors."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    layers = record.get("layers")
    for row in layers if isinstance(layers, list) else []:
        if isinstance(row, Mapping) and isinstance(row.get("relative_error"), float):
            groups.setdefault((str(row.get("kind")), str(row.get("method"))), []).append(row)
    if not groups:
        return []
    lines = ["| kind | method | layers | tokens | relative error, mean | worst |", "|---|---|---:|---:|---:|---|"]
    for (kind, method), rows in groups.items():
        tokens = sorted({row.get("tokens") or 0 for row in rows})
        seen = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
        worst = max(rows, key=lambda row: row["relative_error"])
        mean = sum(row["relative_error"] for row in rows) / len(rows)
        text = f"{worst['relative_error']:.3g}, {worst.get('name')}"
        lines.append(f"| {kind} | {method} | {len(rows)} | {seen} | {mean:.3g} | {text} |")
    note = "The relative error is that of a layer's outputs on the calibration tokens: squared error over square."
    return [*lines, "", note, ""]


def _fact_rows(facts: Any) -> list[str]:
    if not isinstance(facts, Mapping) or not facts:
        return []
    return ["| | |", "|---|---:|", *(f"| {key} | {_show(value)} |" for key, value in facts.items()), ""]


def _card(name: str, summary: checkpoint.DirectorySummary, record: Mapping[str, Any], has_tokenizer: bool) -> str:
    """The model card: use, layers, calibration, results, recipe."""
    architecture = ", ".join(summary.config.get("architectures") or ["model"])
    lines = ["---", "library_name: transformers", "tags:", "- sparse-marlin", "- int4", "- 2:4-sparsity", "---", ""]
    lines += [f"# {name}", ""]
    lines += [f"{architecture} with INT4 weights, 2:4-sparse where the table says `w4a16_sp24`.", ""]
    lines += _use(name, has_tokenizer)
    lines += ["## Layers", "", *_layer_rows(summary), ""]
    sections = {"Calibration": [*_fact_rows(record.get("calibration")), *_solved_rows(record)]}
    sections["Results"] = _fact_rows(record.get("numbers"))
    for title, rows in sections.items():
        if rows:
            lines += [f"## {title}", "", *rows]
    if record.get("recipe"):
        lines += ["## Recipe", "", "```json", json.dumps(record["recipe"], indent=2), "```", ""]
    return "\n".join(lines)


def load(directory: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A compressed causal language model from a directory: `AutoModelForCausalLM.from_pretrained`, checked first.

    device: where the whole model goes (None: the CPU). dtype: of everything floating point (None: as saved).
    Raises: CheckpointError (see `marlin.formats.checkpoint.open_directory`), UnsupportedError (no transformers).
    """
    checkpoint.open_directory(directory)
    try:
        from transformers import AutoModelForCausalLM

        from marlin.integrations.transformers import register_lazily
    except ImportError as error:
        fix = "Install it: pip install 'sparse-marlin[transformers]'."
        raise UnsupportedError(message("load", "transformers must be installed", str(error), fix)) from error
    register_lazily()
    device_map = {} if device is None else {"device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype or "auto", **device_map)
