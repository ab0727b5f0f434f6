"""The serving benchmark without vLLM: its model, its processes, its records, its table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import engines, machine, serving, serving_profile, serving_tables
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
    assert serving.model_config(2, "sparse_marlin, vLLM norms") == serving.model_config(2, "sparse_marlin")
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
        environment = engines.case_environment(case, "/nowhere", 1)
        assert environment["VLLM_PLUGINS"] == plugins
        assert "MARLIN_VLLM_DENSE" not in environment
        assert "MARLIN_VLLM_ROWWISE" not in environment
    assert engines.case_environment("pack-quantized, marlin kernel", "/nowhere", 1)["MARLIN_VLLM_DENSE"] == "1"
    own_norms = engines.case_environment("sparse_marlin, vLLM norms", "/nowhere", 1)
    assert (own_norms["VLLM_PLUGINS"], own_norms["MARLIN_VLLM_ROWWISE"]) == ("sparse_marlin", "0")


def test_entry_points_are_those_of_the_package(tmp_path: pathlib.Path):
    engines.write_entry_points(tmp_path / "site")
    found = importlib.metadata.Distribution.at(tmp_path / "site" / "sparse_marlin-0.0.0.dist-info").entry_points
    (entry,) = found.select(group="vllm.general_plugins")
    stated = re.search(r'vllm\.general_plugins"\]\n(\w+) = "([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert stated is not None and (entry.name, entry.value) == stated.groups()
    assert callable(entry.load())


def scripted(monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> None:
    """Engines that run these Python programs instead of vLLM."""
    real = subprocess.Popen

    def start(words: list[str], **named: Any) -> Any:
        return real([sys.executable, "-c", scripts[words[words.index("--case") + 1]]], **named)

    monkeypatch.setattr(engines.subprocess, "Popen", start)


def printing(*lines: tuple[str, dict[str, Any]], then: str = "") -> str:
    """A program that waits for its start and prints these results."""
    prints = "".join(f"print({kind!r}, {json.dumps(json.dumps(found))}, flush=True); " for kind, found in lines)
    return f"import sys, time; sys.stdin.readline(); print('none: up'); {prints}{then}"


def test_what_engines_measure_comes_at_once_and_a_late_or_failed_one_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
):
    late, failed, good = row("none", 1, 6.5, 9e4), row("sparse_marlin", 1, 2.5, 1e5), row("pack-quantized", 1, 4.0, 1.0)
    scripts = {
        "none": printing(("ROW", late), then="time.sleep(60)"),
        "sparse_marlin": printing(("ROW", failed), then="raise RuntimeError('no such kernel')"),
        "pack-quantized": printing(("ROW", good), ("PROFILE", {"batch": 1})),
    }
    scripted(monkeypatch, scripts)
    args = argparse.Namespace(words=[], tp=1, seconds=4.0, log=str(tmp_path / "log"))
    found = list(engines.measure_all(list(scripts), args))
    assert found == [("ROW", late), ("ROW", failed), ("ROW", good), ("PROFILE", {"batch": 1})]
    out = capsys.readouterr().out
    assert "none: ended with status -9" in out
    assert "sparse_marlin: ended with status 1" in out and "RuntimeError: no such kernel" in out
    assert "pack-quantized" not in out
    log = (tmp_path / "log").read_text()
    assert "none: up" in log and "no such kernel" in log


def test_an_engine_that_is_never_started_ends(monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, {"none": "import sys; sys.stdin.readline(); print('started')"})
    engine = engines.Engine("none", argparse.Namespace(words=[], tp=1, log=None))
    engine.close()
    engine.close()
    assert engine._process.returncode is not None


def test_main_writes_a_record_with_rows_and_profiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
):
    classes = [{"class": "attention", "us_per_step": 90.0, "launches_per_step": 32.0, "largest": ["flash"]}]
    profile = {**row("none", 1, None, 0.0), "step_us": 6500.0, "steps": 12, "classes": classes}
    rows = [("ROW", row("none", 1, 6.5, 9e4)), ("ROW", row("none", 1, None, 8e4, 4096)), ("PROFILE", profile)]
    scripted(monkeypatch, {"none": printing(*rows)})
    monkeypatch.setattr(machine, "facts", lambda: {"gpu": "Some GPU", "driver": "1", "torch": "2"})
    monkeypatch.setattr(serving.records, "RECORDS", tmp_path / "records")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert serving.main(["--cases", "none", "--batches", "1", "--profile"]) == 0
    record = json.loads((tmp_path / "records" / "serving-some-gpu.json").read_text())
    assert [one["ms_per_output_token"] for one in record["rows"]] == [6.5, None]
    assert record["profiles"] == [profile]
    assert json.loads((tmp_path / "out" / "serving-some-gpu.json").read_text()) == record
    assert "| attention | 90 |" in capsys.readouterr().out
    assert serving.main(["--cases", "none", "--batches", "1,16"]) == 1


def test_cache_holds_the_largest_batch_and_no_less_than_two_long_sequences():
    token = 2 * 2 * 8 * 128 * 32
    assert serving.cache_bytes(serving.parse(["--batches", "256"])) == token * (256 * (512 + 128 + 64) + 4096)
    assert serving.cache_bytes(serving.parse(["--batches", "1"])) == token * 2 * 8192
    assert serving.cache_bytes(serving.parse(["--batches", "1", "--tp", "2"])) == token // 2 * 2 * 8192


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("sm90_w4a16_sp24_fp16_g128_8x64x512_s4_g14_c122", "linear, ours"),
        ("void machete::MacheteKernel<cutlass::gemm::collective::X>", "linear, vLLM INT4"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<X>>", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<__half>", "attention"),
        ("void vllm::fused_add_rms_norm_kernel<c10::Half>", "norms"),
        ("void vllm::act_and_mul_kernel<c10::Half>", "activation"),
        ("void vllm::rotary_embedding_kernel<c10::Half>", "rotary"),
        ("sm90_fused_add_rms_norm_fp16_p1", "norms"),
        ("sm90_silu_and_mul_fp16_p1", "activation"),
        ("nvjet_hsh_128x64_64x8_1x2_h_bz_TNT", "linear, fp16"),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>",
            "sampling",
        ),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_classified_by_what_they_do(name: str, label: str):
    assert serving_profile.classify(name) == label


def test_profile_sums_the_kernels_of_a_class_per_step():
    kernels = [("sm90_w4a16_a", 800.0, 40), ("sm90_w4a16_b", 1600.0, 80), ("flash", 400.0, 40), ("odd", 4.0, 4)]
    ours, attention, other = serving_profile.summarize(kernels, 4)
    assert ours == {
        "class": "linear, ours",
        "us_per_step": 600.0,
        "launches_per_step": 30.0,
        "largest": ["sm90_w4a16_b", "sm90_w4a16_a"],
    }
    assert (attention["class"], attention["us_per_step"]) == ("attention", 100.0)
    assert other["largest"] == ["odd"]


def test_merge_keeps_other_modes():
    head = {"gpu": "H200", "driver": "1", "torch": "2", "kernel_hash": "a"}
    old = {**head, "settings": {"mode": "none"}, "rows": [row("none", 1, 6.0, 1.0)]}
    compiled = {**row("none", 1, 5.0, 1.0), "mode": "compile"}
    again = {**row("none", 1, 4.0, 1.0), "mode": "none"}
    new = {**head, "settings": {}, "rows": [compiled], "profiles": []}
    assert len(serving.merge(old, new)["rows"]) == 2
    assert serving.merge(old, {**new, "rows": [again]})["rows"] == [again]


def test_merge_keeps_other_points_of_the_same_machine_only():
    head = {"gpu": "H200", "driver": "1", "torch": "2", "kernel_hash": "a", "settings": {}}
    profiles = [{**row("none", batch, None, 0.0), "step_us": 1.0} for batch in (1, 64)]
    old = {**head, "rows": [row("none", 1, 6.0, 1.0), row("none", 16, 7.0, 1.0)], "profiles": profiles}
    new = {**head, "rows": [row("none", 1, 5.0, 1.0)], "profiles": [{**profiles[0], "step_us": 2.0}]}
    assert [one["step_us"] for one in serving.merge(old, new)["profiles"]] == [1.0, 2.0]
    assert [one["ms_per_output_token"] for one in serving.merge(old, new)["rows"]] == [7.0, 5.0]
    assert serving.merge({**old, "driver": "2"}, new) == new
    ours = [row("sparse_marlin", batch, 3.0, 1.0) for batch in (1, 16)]
    kept = serving.merge({**old, "kernel_hash": "b", "rows": [*old["rows"], *ours]}, {**new, "rows": ours[:1]})
    assert [(one["quantization"], one["batch"]) for one in kept["rows"]] == [
        ("none", 1),
        ("none", 16),
        ("sparse_marlin", 1),
    ]
    assert serving.merge(None, new) == new


def test_tables_compare_ours_with_the_others():
    rows = [row("sparse_marlin", 1, 2.512, 100.4), row("none", 1, 6.28, 50.2), row("none", 1, None, 80.0, 4096)]
    assert serving_tables.speeds(rows).splitlines() == [
        "| ms a token, prompt 512, output 128: batch | sparse_marlin | none | sparse_marlin / none |",
        "| --- | ---: | ---: | ---: |",
        "| 1 | 2.51 | 6.28 | 0.40 |",
        "",
        "| prompt tokens/s: batch, prompt | sparse_marlin | none | sparse_marlin / none |",
        "| --- | ---: | ---: | ---: |",
        "| 1, 512 | 100 | 50 | 2.00x |",
        "| 1, 4096 | - | 80 | - |",
    ]


def test_record_is_rendered_by_mode_and_number_of_gpus():
    classes = [{"class": "attention", "us_per_step": 90.0, "launches_per_step": 32.0, "largest": ["flash"]}]
    rows = [
        row("none", 1, 6.0, 1.0),
        {**row("none", 1, 5.0, 1.0), "mode": "compile"},
        {**row("none", 1, 3.0, 1.0), "tp": 2},
    ]
    profile = {**row("none", 1, None, 0.0), "step_us": 95.0, "classes": classes}
    text = serving_tables.render({"settings": {"mode": "none"}, "rows": rows, "profiles": [profile]})
    titles = [line for line in text.splitlines() if line.startswith("vLLM")]
    assert titles == [
        "vLLM 0.26.0, one GPU, vLLM's compilation off.",
        "vLLM 0.26.0, one GPU, vLLM's compilation on, as it is by default.",
        "vLLM 0.26.0, 2 GPUs, vLLM's compilation off.",
    ]
    assert text.count("| attention | 90 |") == text.count("| all kernels | 90 |") == 1
    assert text.index("| attention") < text.index(titles[1])
