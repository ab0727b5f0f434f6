"""`marlin compress` with recovery and automatic recipes, and `marlin eval --against`, on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from marlin import api, nn
from marlin.cli import recovery
from marlin.cli.evaluate import CONTINUED_TOKENS
from marlin.compress import RecoveryEvent
from tests.test_cli import TEXT, _text, _tokenizer, error_of, run

SMALL = {"batch": 2, "length": 32, "generated_rows": 2, "generated_length": 32}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(recovery, "ON_CPU", SMALL)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dense model, text file)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, vocab_size=64, max_position_embeddings=128, initializer_range=0.1, eos_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    _tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder / "dense", folder / "text.txt"


def compress(material: tuple[Path, Path], output: Path, *more: str | Path) -> Any:
    dense, text = material
    given = ("-c", text, "--samples", "4", "--length", "32", "--device", "cpu", "-g", "32", *more)
    return run("compress", dense, output, *given)


def test_compress_recovers_saves_what_it_measured_and_resumes(material: tuple[Path, Path], tmp_path: Path) -> None:
    more = ("--recover", "0.02", "--resume-dir", tmp_path / "resume", "--json")
    result = compress(material, tmp_path / "out", *more)
    summary = json.loads(result.stdout)
    trained = summary["recovery"]
    assert summary["layers"] == {"w4a16_sp24": 14} and trained["steps"] > 0
    assert trained["divergence"] <= trained["divergence_before"]
    assert result.stderr.startswith("recovery without a GPU: about ") and "steps of 2 x 32 tokens" in result.stderr
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| recovery, divergence |" in card and (tmp_path / "resume" / "recovery" / "state.safetensors").is_file()
    again = json.loads(compress(material, tmp_path / "again", *more).stdout)
    assert again["recovery"]["divergence"] == trained["divergence"]
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert a == b


def test_recover_trains_a_directory_and_keeps_what_is_known_of_it(material: tuple[Path, Path], tmp_path: Path) -> None:
    dense, text = material
    compress(material, tmp_path / "out")
    more = ("--minutes", "0.02", "-c", str(text), "--device", "cpu", "--resume-dir", str(tmp_path / "resume"))
    result = run("recover", str(tmp_path / "out"), str(dense), str(tmp_path / "better"), *more, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert set(summary) == {"output", "calibration", "recovery"}
    first, second = (json.loads((tmp_path / n / "compression_report.json").read_text()) for n in ("out", "better"))
    assert second["layers"] == first["layers"] and second["recipe"] == first["recipe"]
    assert second["numbers"]["recovery, divergence"] == summary["recovery"]["divergence"]
    assert api.load(tmp_path / "better").config.quantization_config.layers.keys() == {
        r["name"] for r in first["layers"]
    }
    again = run("recover", str(tmp_path / "out"), str(dense), str(tmp_path / "better"), *more)
    assert again.exit_code == 0 and "recovered in " in again.stdout and "Next: marlin eval" in again.stderr


def test_recover_refuses_what_is_not_what_it_should_be(material: tuple[Path, Path], tmp_path: Path) -> None:
    dense, text = str(material[0]), str(material[1])
    compress(material, tmp_path / "out")
    ours, order = str(tmp_path / "out"), "The order is: compressed, dense, result."
    found = error_of("recover", dense, dense, str(tmp_path / "x"), "-c", text)
    assert found == f"error: recover: the first directory must be compressed; got {dense}. {order}"
    found = error_of("recover", ours, ours, str(tmp_path / "x"), "-c", text)
    assert found == f"error: recover: the second directory must be dense; got {ours}. {order}"
    found = error_of("recover", ours, dense, str(tmp_path / "x"), "-c", text, "--minutes", "0")
    assert found == "error: recover: --minutes must be above 0; got 0.0."


def test_recover_of_a_loaded_model_changes_codes_but_not_masks(material: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    compress(material, tmp_path / "out")
    model = api.load(tmp_path / "out", dtype=torch.float32)
    before = {name: layer.to_weight() for name, layer in nn.sparse_linears(model)}
    teacher = AutoModelForCausalLM.from_pretrained(material[0])
    given = replace(
        recovery.settings(1.0, torch.device("cpu"), 0, None),
        minutes=None,
        steps=30,
        generated_tokens=0,
        learning_rate=2e-3,
    )
    report = api.recover(model, teacher, TEXT, tokenizer=_tokenizer(), recovery=given)
    after = {name: layer.to_weight() for name, layer in nn.sparse_linears(model)}
    assert report["steps"] > 0 and after.keys() == before.keys()
    assert all(torch.equal(after[name].mask(), before[name].mask()) for name in before)
    assert report["best_step"] == 0 or any(not torch.equal(after[n].codes, before[n].codes) for n in before)
    with pytest.raises(ValueError, match=r"^recover: the model must have compressed layers; got none\. "):
        api.recover(teacher, teacher, TEXT, tokenizer=_tokenizer(), recovery=given)


def test_compress_plans_for_a_mixture_of_experts(material: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(**sizes, num_hidden_layers=2, vocab_size=64, num_local_experts=4, initializer_range=0.1)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    _tokenizer().save_pretrained(tmp_path / "dense")
    result = compress(
        (tmp_path / "dense", material[1]), tmp_path / "out", "--recipe", "auto", "--bits", "4.1", "--json"
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert sum(summary["layers"].values()) == 24 and len(summary["layers"]) == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert {layer.kind for name, layer in nn.sparse_linears(model) if ".experts." in name} <= set(summary["layers"])
    again = json.loads(run("inspect", str(tmp_path / "out"), "--json").stdout)
    assert len(again["layers"]) == 24


@pytest.mark.parametrize("budget", [("--bits", "4.0"), ("--max-ppl-increase", "0.5")])
def test_compress_plans_before_it_compresses(
    material: tuple[Path, Path], tmp_path: Path, budget: tuple[str, str]
) -> None:
    result = compress(material, tmp_path / "out", "--recipe", "auto", *budget, "--json")
    summary = json.loads(result.stdout)
    assert sum(summary["layers"].values()) == 14 and 3.5 <= summary["bits_per_weight"] <= 4.5
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(summary["layers"].items()))
    plan = _text(result.stderr)
    assert f"plan: {layers}; {summary['bits_per_weight']:.3f} bits per weight, " in plan
    assert ("x dense" in plan) == (budget[0] == "--max-ppl-increase")
    if budget[0] == "--bits":
        assert summary["bits_per_weight"] <= 4.0 and len(summary["layers"]) == 2


def test_compress_trains_blocks_on_several_devices(material: tuple[Path, Path], tmp_path: Path) -> None:
    more = ("--reconstruct", "8", "--device", "cpu,cpu", "--samples", "8")
    summary = json.loads(compress(material, tmp_path / "out", *more, "--json").stdout)
    trained = summary["reconstruction"]
    assert (trained["blocks"], trained["steps"]) == (2, 8) and trained["error_after"] <= trained["error_before"]
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text(encoding="utf-8"))
    assert [row["steps"] for row in report["reconstruction"]] == [8, 8]
    assert "| reconstruction, error_after |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    shown = _text(compress(material, tmp_path / "again", *more).stdout)
    change = f"{trained['error_before']:.4f} to {trained['error_after']:.4f}"
    assert f"trained 2 blocks, 8 steps each: error of held-out outputs {change}" in shown


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--reconstruct", "-1"), "Options: reconstruct must be a number of steps, at least 0; got reconstruct=-1."),
        (("--device", "cpu,tpu"), "--device: must be auto, cpu, cuda or cuda:N; got 'tpu'."),
        (
            ("--reconstruct", "4"),
            "reconstruct: there must be two batches of calibration windows; got 1. Use more calibration windows, or a "
            "smaller batch.",
        ),
    ],
)
def test_compress_refuses_training_and_devices_that_make_no_sense(
    material: tuple[Path, Path], tmp_path: Path, more: tuple[str, str], text: str
) -> None:
    dense, calibration = material
    small = ("-c", calibration, "--samples", "4", "--length", "32", "--device", "cpu", "-g", "32", "--json")
    assert error_of("compress", dense, tmp_path / "o", *small, *more) == f"error: {text}"


def test_compress_refuses_a_budget_that_cannot_be_kept(material: tuple[Path, Path], tmp_path: Path) -> None:
    dense, text = material
    given = ("compress", dense, tmp_path / "o", "-c", text, "--device", "cpu", "-g", "32", "--json")
    assert error_of(*given, "-r", "auto") == (
        "error: compress: --recipe auto takes one of --bits and --max-ppl-increase; got neither."
    )
    assert error_of(*given, "-r", "auto", "--bits", "3.5", "--max-ppl-increase", "0.1") == (
        "error: compress: --recipe auto takes one of --bits and --max-ppl-increase; got --bits and --max-ppl-increase."
    )
    assert error_of(*given, "--bits", "3.5") == "error: compress: a budget needs --recipe auto; got --bits."
    assert error_of(*given, "--recover", "0") == "error: compress: --recover must be above 0 minutes; got 0.0."
    small = ("--samples", "4", "--length", "32")
    assert error_of(*given, "-r", "auto", "--bits", "3.4", *small) == (
        "error: for_bits: bits must be at least 3.500; got 3.4. Raise the bits, or use a larger group size."
    )


def test_eval_against_the_dense_model(material: tuple[Path, Path], tmp_path: Path) -> None:
    compress(material, tmp_path / "out")
    arguments = ("--text", material[1], "--window", "64", "--limit", "4", "--device", "cpu")
    found = json.loads(run("eval", tmp_path / "out", "--against", material[0], *arguments, "--json").stdout)
    alone = json.loads(run("eval", tmp_path / "out", *arguments, "--json").stdout)
    assert found["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert found["divergence"] > 0 and 0 < found["agreement"] < 1 and found["against"] == str(material[0])
    line = _text(run("eval", material[0], "--against", material[0], *arguments).stdout)
    assert f"against {material[0]}: perplexity {found['dense_perplexity']:.3f}, divergence 0.0000 nats a token" in line
    assert line.endswith("same next token 100.0%")


def test_eval_continues_prompts_with_both_models(material: tuple[Path, Path], tmp_path: Path) -> None:
    compress(material, tmp_path / "out")
    arguments = ("--text", material[1], "--window", "64", "--limit", "2", "--device", "cpu", "--against", material[0])
    result = json.loads(run("eval", tmp_path / "out", *arguments, "--prompt", "the cat", "--json").stdout)
    (found,) = result["continuations"]
    for key, directory in (("text", tmp_path / "out"), ("dense_text", material[0])):
        generated = run("generate", directory, "the cat", "-n", str(CONTINUED_TOKENS), "--device", "cpu", "--json")
        assert found[key] == json.loads(generated.stdout)["text"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("--tasks", "arc_easy", "--text", "a.txt", "--prompt", "b"),
            "these options go with a text only; got --text, --prompt. Leave them out.",
        ),
        (("--shots", "2"), "these options go with --tasks only; got --shots. Leave them out."),
        (("--limit", "-1"), "--limit must be at least 0; got -1."),
    ],
)
def test_eval_refuses_options_that_it_would_not_use(
    material: tuple[Path, Path], arguments: tuple[str, ...], text: str
) -> None:
    assert error_of("eval", material[0], *arguments) == f"error: eval: {text}"


def test_describe_shows_figures_and_time_left() -> None:
    assert recovery.describe(RecoveryEvent("generate", 0.5, 30.0), 2.0) == "writing text, 1:30 left"
    event = RecoveryEvent("train", 0.5, 125.0, 7, 0.25, 0.5)
    assert recovery.describe(event, 2.0) == "recovering, divergence 0.250, held out 0.500, 0:00 left"
