"""The figures: what is drawn from records, that it is readable on light and dark pages, and when a file is behind."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from benchmarks import figures, presets, records, report
from benchmarks.rows import FEW, OURS

BLACK_PAGE, WHITE_PAGE = "#0d1117", "#ffffff"


def gemm_row(impl: str, op: str, m: int, shape: tuple[int, int], us: float) -> dict[str, Any]:
    head = {"impl": impl, "op": op, "dtype": "float16", "group_size": 128, "m": m, "n": shape[0], "k": shape[1]}
    return {**head, "us": us, "floor_us": us / 2}


def gemm_record(batches: tuple[int, ...] = (1, 16)) -> dict[str, Any]:
    rows = []
    for m in batches:
        for shape in (*presets.BLOCK, presets.LARGE):
            rows.append(gemm_row("cublas", "fp16", m, shape, 40.0))
            rows.append(gemm_row("marlin", "w4a16_sp24", m, shape, 10.0))
            rows.append(gemm_row("humming", "w4a16_dense", m, shape, 16.0))
    big = presets.PRESETS["falcon-180b"][2]
    rows.append(gemm_row("cublas", "fp16", 16, (big.n, big.k), 80.0))
    head = {"gpu": "NVIDIA H200", "date": "2026-01-02", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0"}
    return {**head, "kernel_hash": records.kernel_hash(), "ceilings": {}, "rows": rows}


def sustained_record() -> dict[str, Any]:
    rows = []
    for impl, op, us, mhz in (("cublas", "fp16", 200.0, 1700.0), ("marlin", "w4a16_sp24", 50.0, 1900.0)):
        load = {"sm_mhz": {"mean": mhz, "min": mhz, "max": mhz}, "limited_by": {}}
        head = {"model": "llama2-7b", "impl": impl, "op": op, "m": 16, "group_size": 128}
        rows.append({**head, "us": us, "seconds": 20.4, "load": load})
    return {**gemm_record(), "rows": rows}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """Records by kind, in place of the project's."""
    kept = {"gemm": [gemm_record()], "sustained": [sustained_record()]}
    monkeypatch.setattr(records, "read_all", lambda kind: kept.get(kind, []))
    return kept


def test_figures_large_matrix_is_one_measured_at_every_batch(found: dict[str, Any]) -> None:
    assert figures.largest(found["gemm"][0]["rows"]) == presets.LARGE
    data = figures.batch_data()
    assert data is not None
    assert [panel["title"] for panel in data["panels"]] == [
        "decoder block of Llama-3.1-8B, sum of four layers",
        "one large matrix, N=57344 K=8192",
    ]
    assert data["panels"][0]["lines"][0] == {"impl": "marlin/w4a16_sp24", "points": [[1, 4.0], [16, 4.0]]}
    assert data["panels"][1]["lines"][1] == {"impl": "humming/w4a16_dense", "points": [[1, 2.5], [16, 2.5]]}


@pytest.mark.usefixtures("found")
def test_figures_models_are_sums_of_their_layers() -> None:
    data = figures.models_data()
    assert data is not None
    assert data["groups"] == [{"name": "Llama-3.1-8B", "bars": {"marlin/w4a16_sp24": 4.0, "humming/w4a16_dense": 2.5}}]
    assert data["title"] == "NVIDIA H200, batch 16, cold weights, group size 128, 2026-01-02"


@pytest.mark.usefixtures("found")
def test_figures_sustained_bars_carry_their_clocks() -> None:
    data = figures.sustained_data()
    assert data is not None
    assert data["groups"] == [{"name": "Llama-2-7B\n1700 / 1900 MHz", "bars": {"marlin/w4a16_sp24": 4.0}}]
    assert "back to back for 20 s each" in data["title"]


def test_figures_newest_record_is_drawn(found: dict[str, Any]) -> None:
    found["gemm"].append({**gemm_record(), "gpu": "NVIDIA H100", "date": "2026-02-01"})
    titles = [(figures.batch_data(gpu) or {"title": ""})["title"] for gpu in (None, "h200", "a100")]
    assert [title.split(",")[0] for title in titles] == ["NVIDIA H100", "NVIDIA H200", ""]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [figures.INK, *(look[0] for look in figures.LOOKS.values())])
@pytest.mark.parametrize("page", [BLACK_PAGE, WHITE_PAGE])
def test_figures_colours_stand_out_on_light_and_dark_pages(colour: str, page: str) -> None:
    low, high = sorted((luminance(colour), luminance(page)))
    assert (high + 0.05) / (low + 0.05) >= (4.0 if colour == figures.INK else 3.0)


def test_figures_every_known_implementation_has_a_look_of_its_own() -> None:
    assert set(figures.LOOKS) == set(figures.LABELS) - set(FEW) and OURS in figures.LOOKS
    assert len({look[0] for look in figures.LOOKS.values()}) == len(figures.LOOKS)
    assert len({look[1] for look in figures.LOOKS.values()}) == len(figures.LOOKS)


@pytest.mark.usefixtures("found")
def test_figures_are_drawn_and_the_same_twice(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    assert figures.main(["--folder", str(tmp_path / "one")]) == 0
    assert figures.main(["--folder", str(tmp_path / "two")]) == 0
    for name in figures.FIGURES:
        text = (tmp_path / "one" / f"{name}.svg").read_text()
        assert text == (tmp_path / "two" / f"{name}.svg").read_text()
        assert "<svg" in text and "#e8590c" in text
    assert figures.main(["--folder", str(tmp_path), "--format", "png", "--gpu", "h200"]) == 0
    assert (tmp_path / "speedup-batch.png").read_bytes().startswith(b"\x89PNG")


def test_figures_without_a_record_say_what_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(records, "read_all", lambda kind: [])
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    assert figures.main(["--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "speedup-batch: no gemm record to draw from; measure with `marlin bench gemm`" in said
    assert "speedup-sustained: no sustained record to draw from; measure with `marlin bench sustained`" in said
    assert figures.behind() == {} and not list(tmp_path.iterdir())


def test_report_draws_figures_that_are_behind_and_checks_find_them(
    found: dict[str, Any],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:figures -->\n<!-- /bench:figures -->\n")
    assert report.main(["--check", str(page)]) == 1
    assert "speedup-models.svg: out of date; run make bench-report" in capsys.readouterr().out
    assert report.main(["--update", str(page)]) == 0
    assert "![Speedup over cuBLAS fp16 against batch size](docs/figures/speedup-batch.svg)" in page.read_text()
    assert report.main(["--check", str(page)]) == 0
    capsys.readouterr()
    found["gemm"][0]["rows"][1]["us"] = 5.0
    assert report.main(["--check", str(page)]) == 1
    said = capsys.readouterr().out
    assert "speedup-batch.svg: out of date" in said and "speedup-sustained.svg" not in said
    found["gemm"][0]["kernel_hash"] = "0"
    assert report.TABLES["figures-docs"]().count("> **Stale**") == 1


def test_report_of_the_tree_has_its_figures() -> None:
    assert list(figures.behind()) == []
