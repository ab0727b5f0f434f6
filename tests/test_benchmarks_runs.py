"""Whole benchmark runs on the CPU at tiny scale: what they measure, write and say, and what a peer's process may do."""

from __future__ import annotations

import json
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import (
    ceilings,
    decode,
    decoder,
    gemm,
    isolated,
    machine,
    presets,
    records,
    report,
    sustained,
    timing,
    traffic,
)
from benchmarks.candidates import AbsentError, Setting
from benchmarks.decoder import Decoder, Shape

CEILINGS = traffic.Ceilings(read_bytes_per_s=3e12, copy_bytes_per_s=2.9e12, flops_per_s=8e14)
FACTS = {
    "gpu": "NVIDIA Test 1",
    "driver": "580.1",
    "torch": "2.11.0",
    "cuda": "13.0",
    "nvrtc": "13.0",
    "python": "3.12.3",
    "date": "2026-01-02",
}
READING = {"sm_mhz": 1500, "memory_mhz": 2600, "power_w": 400.0, "temperature_c": 60, "limits": ["power cap"]}
CPU = torch.device("cpu")
TINY = Shape(layers=5, hidden=64, inter=96, heads=4, kv_heads=2, vocab=50, context=8, group_size=32)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of a GPU, and the shortest measurements."""
    for name, value in {"has_gpu": True, "device": CPU, "facts": FACTS, "clocks": {"sm_mhz": 1500}}.items():
        monkeypatch.setattr(machine, name, lambda value=value: value)
    monkeypatch.setattr(machine, "l2_bytes", lambda: 10_000)
    monkeypatch.setattr(machine, "reader", lambda: ("nvml", lambda: dict(READING)))
    monkeypatch.setattr(ceilings, "measure", lambda: CEILINGS)
    monkeypatch.delenv("MARLIN_PEERS_DIR", raising=False)
    for name, few in {"REPLAY_US": 50.0, "MIN_LAUNCHES": 2, "MIN_ROUNDS": 2, "MAX_ROUNDS": 3}.items():
        monkeypatch.setattr(timing, name, few)


# GEMM


@pytest.mark.usefixtures("on_cpu")
def test_gemm_run_writes_a_sound_record(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gemm.json"
    arguments = ["--shapes", "64x128", "--batches", "1,5", "--dtypes", "fp16,bf16", "--out", str(path)]
    assert gemm.main(arguments) == 0
    record = records.check(json.loads(path.read_text()))
    points = {(row["impl"], row["op"], row["dtype"], row["m"]) for row in record["rows"]}
    impls = [("cublas", "fp16"), ("marlin", "w4a16_sp24"), ("marlin", "w4a16_dense")]
    assert points == {(*impl, dtype, m) for impl in impls for dtype in records.DTYPES for m in (1, 5)}
    assert record["kernel_hash"] == records.kernel_hash() and record["left_out"] == []
    assert record["absent"]["sparse-marlin float16"] == "MARLIN_PEERS_DIR is not set"
    assert record["load"]["sm_mhz"] == {"mean": 1500.0, "min": 1500.0, "max": 1500.0}
    assert "cpu reference (fp32)" in {row["config"] for row in record["rows"]}
    assert "12 rows in" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu")
def test_gemm_run_stops_in_time_and_says_what_it_left_out(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gemm.json"
    arguments = ["--shapes", "64x128", "--batches", "1,5", "--seconds", "0.000001", "--out", str(path)]
    assert gemm.main(arguments) == 0
    assert not path.exists()
    assert "2 point(s) left out for time (--seconds): 64x128 float16 M=1, 64x128 float16 M=5" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu")
def test_gemm_run_keeps_points_of_an_earlier_run(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "gemm.json"
    for m in ("1", "5"):
        assert gemm.main(["--shapes", "64x128", "--batches", m, "--impls", "w4a16_sp24", "--out", str(path)]) == 0
    assert {row["m"] for row in json.loads(path.read_text())["rows"]} == {1, 5}


def test_gemm_parts_are_the_default_ones_unless_asked_otherwise() -> None:
    parser = gemm._parser()
    assert gemm.parts(parser.parse_args([])) == presets.default_parts()
    assert gemm.parts(parser.parse_args(["--quick"])) == [presets.Part(presets.BLOCK, (1, 16, 64, 256))]
    both = gemm.parts(parser.parse_args(["--shapes", "8x32", "--dtypes", "float16,bf16"]))
    assert [(part.shapes, part.batches, part.dtype) for part in both] == [
        (((8, 32),), presets.BATCHES, "float16"),
        (((8, 32),), presets.BATCHES, "bfloat16"),
    ]


# Peers in processes of their own

_PEER = """
    import os
    import signal

    import torch

    from benchmarks.candidates import AbsentError, Prepared


    def factory(setting):
        print("noise of a library")
        if setting.n == 72:
            raise AbsentError("too odd")
        if setting.n == 80:
            raise RuntimeError("first line\\nsecond line")
        if setting.n == 88:
            os.kill(os.getpid(), signal.SIGKILL)
        weight = setting.random_dense()
        return Prepared("peer", "fp16", 2, lambda i, act, out: torch.mm(act, weight.T, out=out))
"""


@pytest.fixture
def process(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[isolated.Process]:
    (tmp_path / "made_up_peer.py").write_text(textwrap.dedent(_PEER))
    monkeypatch.syspath_prepend(str(tmp_path))
    started = isolated.Process(isolated.Peer("made_up_peer:factory", lambda: None), 300.0)
    monkeypatch.setattr(isolated, "ANSWER_S", 120.0)
    yield started
    started.stop()


def setting(n: int) -> Setting:
    return Setting(n, 32, torch.float16, 32, 1000, CPU)


def test_isolated_peer_is_timed_and_its_faults_stay_its_own(process: isolated.Process) -> None:
    one = process.build(setting(64))
    assert (one.key, one.copies) == ("peer:fp16", 2) and one.record is not None
    found = timing.time_interleaved({}, 0.1, None, {"peer": lambda: one.record(3)})  # type: ignore[misc]
    assert found["peer"].us > 0 and found["peer"].launches >= 4
    with pytest.raises(AbsentError, match=r"^too odd$"):
        process.build(setting(72))
    with pytest.raises(AbsentError, match=r"^RuntimeError: first line$"):
        process.build(setting(80))
    with pytest.raises(AbsentError, match=r"^its process ended with status -9$"):
        process.build(setting(88))
    assert process.build(setting(64)).key == "peer:fp16"


def test_isolated_peer_is_given_up_after_its_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    process = isolated.Process(isolated.Peer("none:none", lambda: None), 5.0)
    monkeypatch.setattr(process, "start", lambda: None)
    now = iter([0.0, 6.0])
    monkeypatch.setattr(isolated.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(process, "ask", lambda name, *rest: ("peer", "fp16", 2))
    process.build(setting(64))
    with pytest.raises(AbsentError, match=r"^preparing it took more than the 5 s allowed; raise --peer-seconds$"):
        process.build(setting(64))


def test_isolated_peer_that_is_not_there_starts_no_process() -> None:
    def absent() -> None:
        raise AbsentError("package gemlite is not installed")

    process = isolated.Process(isolated.Peer("none:none", absent), 5.0)
    with pytest.raises(AbsentError, match="not installed"):
        process.build(setting(64))
    assert process._process is None


# Sustained


@pytest.mark.usefixtures("on_cpu")
def test_sustained_run_writes_time_and_load_of_each_model(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = (presets.Layer("o", 64, 128), presets.Layer("down", 64, 256))
    monkeypatch.setitem(presets.PRESETS, "llama2-7b", tiny)
    path = tmp_path / "sustained-test.json"
    arguments = ["--models", "llama2-7b", "--seconds", "0.05", "--batch", "3", "--out", str(path)]
    monkeypatch.setattr(sustained, "WINDOW_S", 0.01)
    assert sustained.main(arguments) == 0
    record = json.loads(path.read_text())
    base, ours = record["rows"]
    assert (base["impl"], ours["op"]) == ("cublas", "w4a16_sp24")
    assert ours["weight_bytes"] == traffic.weight_bytes("w4a16_sp24", 64, 384, 128)
    assert 0 < ours["p10"] <= ours["us"] <= ours["p90"] and ours["seconds"] >= 0.05
    assert ours["load"]["power_w"]["mean"] == 400.0 and ours["load"]["limited_by"] == {"power cap": 1.0}
    text = capsys.readouterr().out
    assert "1500 MHz  400 W  60 C  power cap 100 % of the time" in text and "--lock-gpu-clocks" in text
    assert sustained.main([*arguments[:4], "--batch", "2", "--out", str(path)]) == 0
    assert [row["m"] for row in json.loads(path.read_text())["rows"]] == [2, 2, 3, 3]
    monkeypatch.setattr(records, "read_all", lambda kind: [{**record, "rows": [base, ours]}])
    table = report.TABLES["sustained"]()
    assert f"| Llama-2-7B | **2:4 INT4** | {ours['us']:.1f} |" in table
    assert "| 1500 | 400 | 60 | power cap 100 % |" in table


def test_sustained_bad_arguments_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert sustained.main(["--impls", "fast"]) == 2
    assert capsys.readouterr().err.startswith(
        "benchmarks.sustained: --impls must be of w4a16_sp24, w4a16_dense; got fast"
    )
    assert sustained.main(["--models", "gpt"]) == 2


def test_machine_summary_counts_what_was_read() -> None:
    readings = [dict(READING), {**READING, "sm_mhz": 1700, "limits": []}, {"limits": []}]
    found = machine.summarize("nvml", readings)
    assert found["samples"] == 3 and found["sm_mhz"] == {"mean": 1600.0, "min": 1500.0, "max": 1700.0}
    assert found["limited_by"] == {"power cap": 0.333}
    assert machine.summarize("nvidia-smi", [])["power_w"] is None


def test_machine_sampler_reads_until_the_block_ends() -> None:
    count = 0

    def read() -> machine.Reading:
        nonlocal count
        count += 1
        return dict(READING)

    with machine.Sampler(("nvml", read), 0.001) as sampler:
        while count < 3:
            pass
    assert sampler.summary()["samples"] >= 3
    after = count
    assert sampler.summary()["samples"] == after


# Decoding


def test_decoder_attention_is_that_of_the_formula() -> None:
    state = Decoder(TINY, 3, CPU, torch.float32)
    state.query.normal_()
    state.attend(1)
    head = TINY.head
    for h in range(TINY.heads):
        keys, values = state.keys[1][:, h % TINY.kv_heads], state.values[1][:, h % TINY.kv_heads]
        scores = torch.einsum("bd,btd->bt", state.query[:, h], keys) / head**0.5
        expected = torch.einsum("bt,btd->bd", scores.softmax(-1), values)
        torch.testing.assert_close(state.mixed[:, h * head : (h + 1) * head], expected, rtol=1e-5, atol=1e-6)


def test_decoder_rotation_turns_pairs_and_stores_keys_and_values() -> None:
    state = Decoder(TINY, 2, CPU, torch.float32)
    half, heads = TINY.head // 2, TINY.heads
    qkv = torch.randn(2, heads + 2 * TINY.kv_heads, 2, half)
    slots = state.keys[0][:, :, -1], state.values[0][:, :, -1]
    decoder.rotate_and_store(qkv, state.turn, state.query, *slots)
    turned = torch.complex(qkv[:, :, 0], qkv[:, :, 1]) * torch.complex(state.turn[0], state.turn[1])
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(state.query, expected[:, :heads])
    torch.testing.assert_close(state.keys[0][:, :, -1], expected[:, heads : heads + TINY.kv_heads])
    torch.testing.assert_close(state.values[0][:, :, -1], qkv[:, heads + TINY.kv_heads :].flatten(-2))


def test_decoder_steps_are_those_of_a_block() -> None:
    state = Decoder(TINY, 2, CPU)
    weights = decoder.dense(decoder.random_linears(TINY, CPU))
    steps = state.program(weights, decoder.GLUE)
    assert {step.part for step in steps} == set(decoder.PARTS)
    assert sum(step.part == "linear" for step in steps) == 4 * TINY.layers
    assert sum(step.part == "attention" for step in steps) == TINY.layers
    decoder.run(steps)
    first = state.logits.clone()
    state.tokens.zero_()
    decoder.run(steps)
    assert torch.equal(state.logits, first) and bool(first.isfinite().all())


def test_decoder_layers_have_memory_of_their_own() -> None:
    linears = decoder.random_linears(TINY, CPU)
    assert len({layer["qkv"].data_ptr() for layer in linears}) == TINY.layers
    assert torch.equal(linears[0]["o"], linears[4]["o"]) and not torch.equal(linears[0]["o"], linears[1]["o"])
    weights = decoder.compressed(linears, "w4a16_sp24", TINY.group_size)
    act = torch.randn(2, 64, dtype=torch.float16)
    outs = [torch.empty(2, 64, dtype=torch.float16) for _ in range(3)]
    for layer, out in zip((0, 4, 1), outs, strict=True):
        weights.product(layer, "o", act, out)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_decoder_check_finds_a_wrong_product() -> None:
    linears = decoder.random_linears(TINY, CPU)
    weights = decoder.compressed(linears, "w4a16_dense", TINY.group_size)
    decoder.check_linears(weights, [1, 3])
    wrong = decoder.Weights("marlin", "w4a16_dense", 0, lambda i, name, act, out: out.zero_(), weights.first)
    with pytest.raises(AssertionError, match=r"^w4a16_dense qkv M=1: .* outside the bound"):
        decoder.check_linears(wrong, [1])


def test_decoder_glue_that_cannot_be_compiled_runs_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    fused = decoder.fused_glue(no_compiler)["silu_mul"]
    gate_up, out = torch.randn(2, 8), torch.empty(2, 4)
    fused(gate_up, out)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate_up[:, :4]) * gate_up[:, 4:])
    assert "silu_mul runs unfused" in capsys.readouterr().out
    assert decoder.describe_glue({"silu_mul": fused}) == "torch, unfused"


def test_decoder_glue_compiled_is_the_glue() -> None:
    plain, fused = Decoder(TINY, 2, CPU), Decoder(TINY, 2, CPU)
    fused.__dict__.update({name: value.clone() for name, value in plain.__dict__.items() if hasattr(value, "clone")})
    fused.outs = {name: value.clone() for name, value in plain.outs.items()}
    weights = decoder.dense(decoder.random_linears(TINY, CPU))
    glue = decoder.fused_glue("aot_eager")
    with torch.no_grad():
        decoder.run(plain.program(weights, decoder.GLUE))
        decoder.run(fused.program(weights, glue))
    assert decoder.describe_glue(glue) == "compiled: add_norm, silu_mul, rotate"
    assert torch.equal(plain.logits, fused.logits) and torch.equal(plain.keys, fused.keys)


@pytest.mark.usefixtures("on_cpu")
def test_decode_run_writes_steps_and_their_parts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "Shape", lambda: TINY)
    path = tmp_path / "decode-test.json"
    arguments = ["--batches", "1,3", "--glue", "torch", "--context", "8", "--group-size", "32", "--layers", "2"]
    assert decode.main([*arguments, "--budget-ms", "1", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert [(row["batch"], row["op"]) for row in record["rows"]] == [
        (1, "fp16"),
        (1, "w4a16_sp24"),
        (3, "fp16"),
        (3, "w4a16_sp24"),
    ]
    for row in record["rows"]:
        assert row["layers"] == 2 and set(row["parts_ms"]) == {*decoder.PARTS, "between"}
        assert sum(row["parts_ms"].values()) == pytest.approx(row["ms_per_step"], abs=1e-3)
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms_per_step"] * 1e3, rel=0.01)
    monkeypatch.setattr(records, "read_all", lambda kind: [record])
    table = report.TABLES["decode"]()
    assert "2 layers, 8 tokens of context; small operations torch, unfused." in table
    assert "| 3 | **2:4 INT4** | " in table


@pytest.mark.usefixtures("on_cpu")
def test_decode_run_stops_in_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "Shape", lambda: TINY)
    path = tmp_path / "decode-test.json"
    arguments = ["--batches", "1", "--glue", "torch", "--context", "8", "--group-size", "32", "--layers", "1"]
    assert decode.main([*arguments, "--seconds", "0", "--out", str(path)]) == 0
    assert "batch 1: left out for time (--seconds)" in capsys.readouterr().out and not path.exists()


def test_decode_bad_arguments_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main(["--kinds", "int3"]) == 2
    assert capsys.readouterr().err == "benchmarks.decode: --kinds must be of w4a16_sp24, w4a16_dense; got int3.\n"
