"""`benchmarks.quality` from end to end on a tiny model: rows, resumption, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quality, quality_methods, quality_models, records

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(94)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for seed, name in enumerate(("calibration", "wiki", "news")):
        picks = torch.randint(0, len(WORDS), (400,), generator=torch.Generator().manual_seed(seed)).tolist()
        (folder / "text" / f"{name}-v1.txt").write_text(" ".join(WORDS[i] for i in picks), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_methods, "WINDOW", 32)
    monkeypatch.setattr(quality_methods, "MAX_RATIO", 3.0)


def run(data: Path, out: Path, *more: str) -> int:
    given = ["--data", str(data), "--name", "tiny", "--out", str(out), "--device", "cpu", "--samples", "4"]
    return quality.main([*given, "--work", str(out.parent / "work"), "--limit", "2", *more])


def test_quality_recovers_with_the_best_trial_and_saves_what_it_measured(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality-tiny.json"
    settings = '{"length": 32, "batch": 4, "generated_rows": 4, "generated_length": 32, "generated_tokens": 256}'
    more = ["--minutes", "0.03", "--trial-minutes", "0.01", "--recovery", settings, "--bits", "4.0"]
    assert run(data, out, "--rows", "joint-recovered,auto-recovered", *more) == 0
    recovered, auto = json.loads(out.read_text())["rows"]
    assert recovered["key"] == "joint-recovered" and recovered["bits_per_weight"] == 3.25
    assert 3.25 < auto["bits_per_weight"] <= 4.0
    assert recovered["wiki"] == recovered["reloaded"] and auto["wiki"] == auto["reloaded"]
    trials = json.loads((tmp_path / "work" / "trials.json").read_text())
    assert set(trials) == set(quality_methods.TRIALS)
    report = json.loads((tmp_path / "work" / "recovery-joint-recovered.json").read_text())
    assert report["learning_rate"] == quality_methods.TRIALS[min(trials, key=trials.__getitem__)]["learning_rate"]


def test_quality_takes_the_text_that_an_earlier_run_wrote(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = '{"length": 32, "batch": 4, "generated_rows": %d, "generated_length": 32, "generated_tokens": 256}'
    more = ["--rows", "joint-recovered", "--minutes", "0.02", "--trial-minutes", "0", "--again", "--recovery"]
    drawn: list[int] = []
    generate = quality_models.marlin.compress.generate_text

    def counted(*given: Any) -> torch.Tensor:
        drawn.append(given[2].generated_rows)
        return torch.as_tensor(generate(*given))

    monkeypatch.setattr(quality_models.marlin.compress, "generate_text", counted)
    for rows in (4, 4, 2):
        assert run(data, tmp_path / "quality-tiny.json", *more, settings % rows) == 0
    assert drawn == [4, 2]
    assert not list((tmp_path / "work").glob(".*"))


def test_quality_leaves_rows_out_when_time_is_up(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality-tiny.json"
    assert run(data, out, "--rows", "dense,joint", "--until", "0") == 0
    assert not out.exists()


def test_quality_writes_a_row_per_method_in_the_order_of_the_table(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality-tiny.json"
    assert run(data, out, "--rows", "prune-wanda,mixed,dense,joint") == 0
    record = json.loads(out.read_text())
    assert [row["key"] for row in record["rows"]] == ["dense", "joint", "mixed", "prune-wanda"]
    dense, joint, mixed, pruned = record["rows"]
    assert dense["bits_per_weight"] == 16.0 and dense["seconds"] is None
    assert joint["bits_per_weight"] == 3.25 and pruned["bits_per_weight"] == 9.0
    assert mixed["recipe"].endswith("% of weights 2:4 INT4, rest INT4")
    assert 3.25 <= mixed["bits_per_weight"] <= 4.25
    assert all(row["wiki"] > 1 and row["news"] > 1 for row in record["rows"])
    assert "first 2 windows of 32 tokens" in record["protocol"]


def test_quality_trains_blocks(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, method = tmp_path / "quality-tiny.json", quality_methods.METHODS["joint-blocks"]
    assert method.method.endswith(f"correct=0.5 + sequential + reconstruct={quality_methods.STEPS}")
    monkeypatch.setitem(quality_methods.METHODS, "joint-blocks", dataclasses.replace(method, reconstruct=4))
    assert run(data, out, "--rows", "joint-blocks", "--samples", "8") == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["bits_per_weight"] == 3.25 and row["wiki"] > 1 and row["seconds"] > 0
    kept = json.loads((tmp_path / "work" / "joint-blocks" / "fingerprint.json").read_text())
    assert json.loads(kept["options"])["reconstruct"] == 4


def test_quality_keeps_the_figures_that_a_record_has(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality-tiny.json"
    run(data, out, "--rows", "rtn", "--texts", "wiki")
    record = json.loads(out.read_text())
    assert record["rows"][0]["news"] is None
    record["rows"][0]["wiki"] = 1.5
    records.write(out, record)
    run(data, out, "--rows", "rtn,dense", "--texts", "wiki")
    assert [row["key"] for row in json.loads(out.read_text())["rows"]] == ["dense", "rtn"]
    assert json.loads(out.read_text())["rows"][1]["wiki"] == 1.5
    before = json.loads(out.read_text())["rows"][1]
    run(data, out, "--rows", "rtn")
    after = json.loads(out.read_text())["rows"][1]
    assert after["news"] > 1
    cost = ("seconds", "peak_memory_gib")  # of making the model, which was made again
    assert {**after, "news": None, **{name: before[name] for name in cost}} == before
    run(data, out, "--rows", "rtn", "--again")
    assert json.loads(out.read_text())["rows"][1]["wiki"] != 1.5


def test_quality_refuses_a_record_of_another_protocol(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality-tiny.json"
    records.write(out, {"protocol": "by eye", "rows": []})
    with pytest.raises(ValueError) as caught:
        run(data, out, "--rows", "dense")
    assert str(caught.value) == (
        "benchmarks.quality: the record must be of this protocol; got by eye. Choose another --out, or delete it."
    )


def test_quality_refuses_unknown_rows(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(data, tmp_path / "quality-tiny.json", "--rows", "dense,best")
    assert "benchmarks.quality: --rows must be of dense, joint, " in capsys.readouterr().err


def test_quality_refuses_a_model_that_it_cannot_fetch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--name", "unknown"])
    need = "benchmarks.quality: --name must be of SmolLM2-135M, Gemma-3-270M; got unknown. Give the folder"
    assert need in capsys.readouterr().err
