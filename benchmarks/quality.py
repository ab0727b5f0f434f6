"""Perplexity by method on a real model: `python -m benchmarks.quality`, or with `--name Gemma-3-270M` on another one.

Owns `benchmarks/records/quality-NAME.json`: its rows and its protocol. `quality_methods` has the METHODS and TRIALS,
`quality_models` makes the models, `quality_data` fetches the dense ones. Any other may be measured by --name and
--data, a folder with `model/` (a Hugging Face directory) and `text/{calibration,wiki,news}-v*.txt`.

Protocol: perplexity by `marlin.evaluate` in float32, windows of 1024 tokens without overlap, the first 40, without
special tokens (where the tokenizer begins texts with one, that stands in the place of the first token); calibration on
--samples windows of 1024 tokens of other articles, seed 0, shared by all rows; group_size 64. The mixed recipe is
chosen on 2 calibration windows of 512 tokens that no row is calibrated on. Recovered rows are trained on the
calibration text and on text that the dense model writes, for --minutes each (compilation and writing included), with
the settings of `TRIALS` that a run of --trial-minutes finds best on a held-out part of that text.

A figure that is in the record is not measured again (--again measures the rows named anew). A row: key (of `METHODS`),
model, method, recipe, wiki, news, bits_per_weight (of the decoder's linear layers), seconds (of compression, recovery,
and of the choice where there is one; null where that was interrupted), device, peak_memory_gib (of all that, model
included). Recovered rows also have `reloaded`: the wiki perplexity of what was saved and loaded again. Runs on the CPU
or on one GPU. --until SECONDS: rows that are not begun by then are left out, and the last recovery ends by then.
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
import traceback
from typing import Any

import torch

from benchmarks import quality_data, records
from benchmarks import quality_methods as methods
from benchmarks.quality_models import Material, Setting, make, reloaded
from marlin.errors import MarlinError, message


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


def measure(material: Material, key: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row of one method; what the given row already has of it is kept."""
    setting = material.setting
    reset_peak(setting.device)
    made = make(material, key)
    peak = peak_gib(setting.device)
    made.model.to(setting.device)
    found = {name: row.get(name) for name in methods.TEXTS}
    for name in (name for name in setting.texts if found[name] is None):
        value = material.perplexity(made.model, name)
        found[name] = round(value, 2)
        print(f"\r{key}: {name} perplexity {value:.4f}          ", file=sys.stderr, flush=True)
    cost = {
        "seconds": None if made.seconds is None else round(made.seconds, 1),
        "device": device_name(setting.device),
        "peak_memory_gib": None if made.seconds is None else peak,
    }
    if methods.METHODS[key].base is not None:
        try:
            found["reloaded"] = round(reloaded(material, made, key), 2)
        except Exception:  # Why: what was measured stands without it.
            traceback.print_exc()
            found["reloaded"] = None
    return {
        "key": key,
        "model": setting.name,
        "method": methods.METHODS[key].method,
        "recipe": made.label,
        **found,
        "bits_per_weight": 16.0 if made.result is None else round(made.result.bits_per_weight(), 3),
        **(cost if made.seconds is not None or not row else {name: row[name] for name in cost}),
    }


def header(material: Material) -> dict[str, Any]:
    """What holds for all rows of a record."""
    import transformers

    setting, window = material.setting, methods.WINDOW
    special = "no special tokens" if material.begin is None else "the first token of each replaced by BOS"
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "protocol": (
            f"perplexity of the first {setting.limit} windows of {window} tokens, no overlap, {special}, "
            f"float32; calibration {setting.samples} x {window} tokens, seed {methods.SEED}; "
            f"group_size {methods.GROUP_SIZE}"
        ),
    }


def update(path: pathlib.Path, material: Material, keys: list[str], again: bool) -> dict[str, Any]:
    """Measure what the record at path lacks, writing it after each row; returns the record.

    Raises: ValueError (the record was made by another protocol).
    """
    setting = material.setting
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**header(material), "rows": []}
    if record["protocol"] != header(material)["protocol"]:
        fix = "Choose another --out, or delete it."
        raise ValueError(message("benchmarks.quality", "the record must be of this protocol", record["protocol"], fix))
    rows = {row["key"]: row for row in record["rows"]}
    stale: set[str] = set()
    if again:
        for key in keys:
            stale.add(key)
            shutil.rmtree(setting.work / key, ignore_errors=True)
            (setting.work / f"{key}.seconds").unlink(missing_ok=True)
            (setting.work / f"{key}.json").unlink(missing_ok=True)
    for key in keys:
        row = {} if key in stale else rows.get(key, {})
        if row and all(row[name] is not None for name in setting.texts):
            continue
        if time.monotonic() > setting.end - 45:
            print(f"{key}: left out, --until is near", file=sys.stderr)
            continue
        try:
            rows[key] = measure(material, key, row)
        except Exception:  # Why: a row that fails must not cost those after it.
            traceback.print_exc()
            continue
        record = {**header(material), "rows": [rows[name] for name in methods.METHODS if name in rows]}
        records.write(path, record)
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, help="folder of the model; default: fetched, by its name")
    parser.add_argument(
        "--name", default=quality_data.DEMO, help=f"in the table; known: {', '.join(quality_data.NAMES)}"
    )
    parser.add_argument("--out", type=pathlib.Path, help="record; default: benchmarks/records/quality-NAME.json")
    parser.add_argument("--work", type=pathlib.Path, help="folder for finished blocks; default: DATA/quality")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--minutes", type=float, default=20.0, help="of each recovery")
    parser.add_argument("--trial-minutes", type=float, default=0.5, help="of each trial of settings; 0: none")
    parser.add_argument("--recovery", type=json.loads, default={}, help="settings of marlin.compress.Recovery, JSON")
    parser.add_argument("--bits", type=float, default=3.5, help="a weight, of the recovered mixed recipe")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--limit", type=int, default=40, help="windows of each text")
    parser.add_argument("--texts", default=",".join(methods.TEXTS), help=f"of {', '.join(methods.TEXTS)}")
    parser.add_argument("--rows", default=",".join(methods.METHODS), help=f"of {', '.join(methods.METHODS)}")
    parser.add_argument("--again", action="store_true", help="measure rows that the record already has")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    keys = [key for key in given.rows.split(",") if key in methods.METHODS]
    for option, values, known in (("rows", given.rows, methods.METHODS), ("texts", given.texts, methods.TEXTS)):
        unknown = sorted(set(values.split(",")) - set(known))
        if unknown:
            parser.error(message("benchmarks.quality", f"--{option} must be of {', '.join(known)}", ", ".join(unknown)))
    try:
        folder = given.data or quality_data.prepare(given.name)
    except (ValueError, MarlinError) as error:
        parser.error(str(error))
    work = given.work or folder / "quality"
    work.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        folder,
        work,
        given.name,
        given.device,
        given.samples,
        given.limit,
        tuple(given.texts.split(",")),
        given.minutes,
        given.trial_minutes,
        given.bits,
        started + given.until,
        given.recovery,
    )
    material = Material(setting)
    path = given.out or records.RECORDS / f"quality-{given.name.lower()}.json"
    update(path, material, keys, given.again)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
