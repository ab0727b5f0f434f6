"""The serving benchmark without vLLM: its model, its processes, its records, its table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import re
import sys
from typing import Any

import pytest
import torch

from benchmarks import serving
from marlin.formats.checkpoint import packed_meta_is_legal, parse_description
from marlin.formats.published import describe_published

ROOT = pathlib.Path(__file__).parents[1]


def row(quantization: str, batch: int, ms: float | None, prefill: float, prompt: int = 512) -> dict[str, Any]:
    fixed = {"engine": "vllm", "version": "0.26.0", "model": serving.MODEL, "kernel": "K", "tp": 1}
    times = {"ms_per_output_token": ms, "prefill_tokens_per_s": prefill}
    return {**fixed, "quantization": quantization, "batch": batch, "prompt": prompt, "output": 128, **times}


def test_models_of_all_quantizations_are_described_for_every_layer():
    assert "quantization_config" not in serving.model_config(32, "none")
    layers = parse_description(serving.model_config(2, "sparse_marlin")["quantization_config"])
    assert len(layers) == 2 * 7
    assert (layers["model.layers.1.mlp.down_proj"].n, layers["model.layers.1.mlp.down_proj"].k) == (4096, 14336)
    described = describe_published(serving.model_config(2, "pack-quantized")["quantization_config"], "config.json")
    assert described.facts.group_sizes == (serving.GROUP_SIZE,)
    with pytest.raises(ValueError, match="serving: quantization must be one of"):
        serving.model_config(2, "fp8")


def test_random_weights_are_legal_and_change_integers_only():
    model = torch.nn.Module()
    model.linear = torch.nn.Module()
    model.linear.quant_method = object()
    shapes = {"qweight": 256, "meta": 128, "scales": 64}
    for name, words in shapes.items():
        dtype = torch.float16 if name == "scales" else torch.int32
        model.linear.register_parameter(name, torch.nn.Parameter(torch.zeros(2, 2, words, dtype=dtype), False))
    assert serving.randomize(model) == {"object": 1}
    assert packed_meta_is_legal(model.linear.meta)
    assert model.linear.qweight.unique().numel() > 900 and model.linear.meta.unique().numel() > 400
    assert not model.linear.scales.any()


def test_only_measured_engines_load_the_plugin():
    args = serving.parse(["--layers", "4", "--batches", "1,16"])
    assert "--layers=4" in args.words and "--batches=1,16" in args.words
    assert serving.parse([*args.words, "--case", "none"]).layers == 4
    for case, plugins in (("sparse_marlin", "sparse_marlin"), ("pack-quantized", ""), ("none", "")):
        environment = serving.case_environment(case, "/nowhere", 1)
        assert environment["VLLM_PLUGINS"] == plugins
        assert "MARLIN_VLLM_DENSE" not in environment
    assert serving.case_environment("pack-quantized, marlin kernel", "/nowhere", 1)["MARLIN_VLLM_DENSE"] == "1"


def test_entry_points_are_those_of_the_package(tmp_path: pathlib.Path):
    serving.write_entry_points(tmp_path / "site")
    found = importlib.metadata.Distribution.at(tmp_path / "site" / "sparse_marlin-0.0.0.dist-info").entry_points
    (entry,) = found.select(group="vllm.general_plugins")
    stated = re.search(r'vllm\.general_plugins"\]\n(\w+) = "([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert stated is not None and (entry.name, entry.value) == stated.groups()
    assert callable(entry.load())


def test_rows_come_as_they_are_measured_and_a_late_engine_is_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = (
        f"print('ROW ' + {json.dumps(json.dumps(row('none', 1, 6.5, 9e4)))!s}, flush=True); import time; time.sleep(60)"
    )
    args = argparse.Namespace(words=[], tp=1)
    real = serving.subprocess.Popen
    monkeypatch.setattr(
        serving.subprocess, "Popen", lambda words, **named: real([sys.executable, "-c", script], **named)
    )
    assert list(serving.rows_of("none", args, 2.0)) == [row("none", 1, 6.5, 9e4)]
    assert "none: ended with status -9" in capsys.readouterr().out


def test_merge_keeps_other_points_of_the_same_machine_only():
    head = {"gpu": "H200", "driver": "1", "torch": "2", "kernel_hash": "a", "settings": {}}
    old = {**head, "rows": [row("none", 1, 6.0, 1.0), row("none", 16, 7.0, 1.0)]}
    new = {**head, "rows": [row("none", 1, 5.0, 1.0)]}
    assert [one["ms_per_output_token"] for one in serving.merge(old, new)["rows"]] == [7.0, 5.0]
    assert serving.merge({**old, "kernel_hash": "b"}, new) == new
    assert serving.merge(None, new) == new


def test_table_has_a_line_for_each_point():
    rows = [row("sparse_marlin", 1, 2.512, 100.4), row("none", 1, 6.5, 90.0), row("none", 1, None, 80.0, 4096)]
    assert serving.table(rows).splitlines() == [
        "| batch, prompt | sparse_marlin, ms | none, ms | sparse_marlin, prompt tokens/s | none, prompt tokens/s |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 1, 512 | 2.51 | 6.50 | 100 | 90 |",
        "| 1, 4096 | - | - | - | 80 |",
    ]
