"""The host-time benchmark on the CPU: what it calls, and the record that it writes."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from benchmarks import host, machine, records


def test_host_calls_of_both_compute_their_products() -> None:
    for calls in (host.own_calls(torch.device("cpu")), host.torch_calls(torch.device("cpu"))):
        outs = [call() for call in calls.values()]
        assert len(outs) == 3 and all(out.shape == (1, host.SIZE) and bool(out.isfinite().all()) for out in outs)
        assert all(torch.allclose(out.float(), outs[0].float(), atol=1e-2) for out in outs)


def test_host_us_is_the_time_of_a_call() -> None:
    ran: list[int] = []
    found = host.host_us({"one": lambda: ran.append(1)}, rounds=5, per_round=10)
    assert len(ran) == 3 + 50
    median, p10, p90 = found["one"]
    assert 0 < p10 <= median <= p90 < 1000


def test_host_writes_a_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert host.main([]) == 2
    assert "benchmarks.host: a CUDA GPU is needed; got none." in capsys.readouterr().err
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(machine, "facts", lambda: {"gpu": "Host"})
    assert host.main(["--rounds", "2"]) == 0
    record = json.loads((tmp_path / "host-host.json").read_text())
    assert {row["mode"] for row in record["rows"]} == {"no_grad", "inference_mode"}
    assert {(row["impl"], row["call"]) for row in record["rows"]} >= {("marlin", "SparseLinear"), ("torch", "F.linear")}
    assert all(0 < row["p10"] <= row["us"] <= row["p90"] for row in record["rows"])
