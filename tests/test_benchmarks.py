"""The benchmarks without a GPU: arithmetic, records, rendering, and what a run does with right and wrong kernels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import pytest
import torch

from benchmarks import (
    candidates,
    cliffs,
    figures,
    gemm,
    gpu,
    isolated,
    machine,
    peers,
    presets,
    records,
    report,
    rows,
    tiles,
    timing,
    traffic,
)
from benchmarks.candidates import AbsentError, Setting
from marlin import settings
from marlin.runtime import all_configs
from marlin.runtime.driver import DeviceInfo

# The shapes, batch sizes and fields that the targets are stated in, written out a second time.
TARGET_BLOCK = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
TARGET_BATCHES = [1, 8, 16, 32, 64, 128, 256, 1024, 4096]
CEILINGS = traffic.Ceilings(read_bytes_per_s=3e12, copy_bytes_per_s=2.9e12, flops_per_s=8e14)


def make_row(impl: str, op: str, m: int, n: int, k: int, us: float, **other: Any) -> dict[str, Any]:
    moved = traffic.traffic(op, m, n, k, 128)
    floor_us = moved.floor_us(op, CEILINGS)
    row = {
        "impl": impl,
        "op": op,
        "dtype": "float16",
        "group_size": 128,
        "meta_bits": traffic.META_BITS.get(op),
        **{"m": m, "n": n, "k": k, "us": us, "p10": us * 0.99, "p90": us * 1.02},
        "bytes": moved.total_bytes,
        "gb_per_s": moved.total_bytes / us / 1e3,
        "tflops_dense_equivalent": moved.flops / us / 1e6,
        "floor_us": floor_us,
        "fraction_of_floor": floor_us / us,
        "config": "16x128x256" if impl == "marlin" else None,
    }
    return {**row, **other}


def make_record(rows: list[dict[str, Any]], kernel_hash: str | None = None) -> dict[str, Any]:
    return {
        "gpu": "NVIDIA H100 80GB HBM3",
        "driver": "580.1",
        "torch": "2.11.0",
        "cuda": "13.0",
        "nvrtc": "13.0",
        "python": "3.12.3",
        "date": "2026-01-02",
        "clocks": {"sm_mhz": 1980},
        "ceilings": vars(CEILINGS),
        "kernel_hash": records.kernel_hash() if kernel_hash is None else kernel_hash,
        "absent": {},
        "rows": rows,
    }


def block_rows(m: int = 16) -> list[dict[str, Any]]:
    rows = []
    for n, k in TARGET_BLOCK:
        rows.append(make_row("cublas", "fp16", m, n, k, 40.0))
        rows.append(make_row("marlin", "w4a16_sp24", m, n, k, 10.0))
        rows.append(make_row("sparse-marlin", "w4a16_sp24", m, n, k, 16.0))
    return rows


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty folder of records in place of the project's, and of figures."""
    original = records.read_all
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    monkeypatch.setattr(records, "read_all", lambda kind: original(kind, tmp_path))
    return tmp_path


# Presets


def test_presets_block_is_that_of_the_targets() -> None:
    assert list(presets.BLOCK) == TARGET_BLOCK
    assert list(presets.BATCHES) == TARGET_BATCHES


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("llama2-7b", [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]),
        ("llama2-13b", [(15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)]),
        ("llama2-70b", [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]),
        ("llama3.1-70b", [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]),
        ("qwen2.5-7b", [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]),
        ("qwen2.5-32b", [(7168, 5120), (5120, 5120), (55296, 5120), (5120, 27648)]),
        ("falcon-180b", [(15872, 14848), (14848, 14848), (59392, 14848), (14848, 59392)]),
    ],
)
def test_presets_shapes_are_those_of_the_model(name: str, shapes: list[tuple[int, int]]) -> None:
    assert presets.shapes(name) == shapes
    assert all(k % 128 == 0 and n % 64 == 0 for n, k in shapes)


def test_presets_lists_join_without_repeats() -> None:
    assert presets.shapes("4096x4096, block")[:2] == [(4096, 4096), (6144, 4096)]
    assert len(presets.shapes("llama2-70b,llama3.1-70b")) == 4
    assert presets.batches("17,standard,16") == sorted([*TARGET_BATCHES, 17])
    assert {17, 33, 65, 100, 129, 300} <= set(presets.batches("odd"))


def test_presets_default_parts_cover_the_targets_and_every_model_once() -> None:
    parts = presets.default_parts()
    points = [(part.dtype, m, shape) for part in parts for shape in part.shapes for m in part.batches]
    assert len(points) == len(set(points))
    for shape in TARGET_BLOCK:
        for dtype in ("float16", "bfloat16"):
            assert {(dtype, m, shape) for m in TARGET_BATCHES} <= set(points)
        assert {("float16", m, shape) for m in (17, 33, 65, 100, 129, 300, 512)} <= set(points)
    every = {(layer.n, layer.k) for layers in presets.PRESETS.values() for layer in layers}
    assert {("float16", 16, shape) for shape in every} <= set(points)
    assert presets.LARGE in every


def test_presets_models_are_named_once() -> None:
    assert presets.models("all") == [name for name in presets.PRESETS if name != "llama3.1-70b"]
    assert presets.models("llama3.1-70b, llama2-7b") == ["llama3.1-70b", "llama2-7b"]
    assert set(presets.LABELS) == set(presets.PRESETS)
    with pytest.raises(ValueError, match=r"^benchmarks\.presets: a model must be one of all, .*; got 'gpt'\.$"):
        presets.models("gpt")


def test_presets_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^benchmarks\.presets: a shape must be NxK or one of block, .*; got '4096'\.$"
    ):
        presets.shapes("block,4096")
    with pytest.raises(ValueError, match=r"a batch must be a positive number, standard or odd; got '0'\.$"):
        presets.batches("0")


# Traffic


@pytest.mark.parametrize(
    ("op", "bits"), [("fp16", 16.0), ("fp16_sp24", 9.0), ("w4a16_dense", 4.125), ("w4a16_sp24", 3.125)]
)
def test_traffic_weight_bits_at_group_128(op: str, bits: float) -> None:
    assert traffic.weight_bytes(op, 4096, 4096, 128) * 8 / 4096**2 == bits


def test_traffic_group_of_a_row_counts_one_scale() -> None:
    assert traffic.weight_bytes("w4a16_sp24", 64, 256, -1) == 64 * 256 * 3 // 8 + 2 * 64


def test_traffic_floor_is_bytes_at_small_m_and_operations_at_large() -> None:
    small = traffic.traffic("w4a16_sp24", 16, 4096, 4096, 128)
    assert small.total_bytes == 4096 * 4096 * 25 // 64 + 2 * 2 * 16 * 4096
    assert small.floor_us("w4a16_sp24", CEILINGS) == pytest.approx(small.total_bytes / 3e6)
    large = traffic.traffic("w4a16_sp24", 4096, 4096, 4096, 128)
    assert large.floor_us("w4a16_sp24", CEILINGS) == pytest.approx(2 * 4096**3 / (1.5 * 8e8))
    assert large.floor_us("w4a16_dense", CEILINGS) == pytest.approx(2 * 4096**3 / 8e8)


def test_traffic_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op must be one of .*; got 'int3'\.$"):
        traffic.weight_bytes("int3", 64, 64, 128)


def test_traffic_bytes_equal_those_of_packed_weights() -> None:
    setting = Setting(128, 256, torch.float16, 128, 0, torch.device("cpu"))
    for kind in ("w4a16_sp24", "w4a16_dense"):
        packed = candidates.pack(candidates.random_weight(kind, setting), torch.float16)
        assert packed.nbytes == traffic.weight_bytes(kind, 128, 256, 128)


def test_traffic_metadata_in_three_bits_is_fewer_bytes() -> None:
    assert traffic.weight_bytes("w4a16_sp24", 4096, 4096, 128, 3) * 8 / 4096**2 == 2.875
    assert traffic.weight_bytes("w4a16_dense", 4096, 4096, 128, None) * 8 / 4096**2 == 4.125


@pytest.mark.parametrize("shape", [(64, 128), (72, 96)])
def test_candidates_metadata_bits_are_those_of_the_tensor(shape: tuple[int, int]) -> None:
    setting = Setting(*shape, torch.float16, 32, 0, torch.device("cpu"))
    packed = candidates.pack(candidates.random_weight("w4a16_sp24", setting), torch.float16)
    assert packed.meta is not None and candidates.meta_bits(packed) == 4
    three = dataclasses.replace(packed, meta=packed.meta.flatten()[: packed.meta.numel() * 3 // 4])
    assert candidates.meta_bits(three) == 3
    assert candidates.meta_bits(dataclasses.replace(packed, meta=None)) is None


# Timing


@pytest.mark.parametrize("size", [1 << 10, 6_553_600, 45_875_200, 939_524_096])
def test_timing_copies_exceed_four_caches(size: int) -> None:
    count = timing.copies_for(size, 60 << 20)
    assert count >= 2 and count * size > 4 * (60 << 20)


@pytest.mark.parametrize("call_us", [1.0, 5.0, 30.0, 100.0])
@pytest.mark.parametrize("copies", [2, 7, 37])
def test_timing_short_calls_walk_over_all_copies(copies: int, call_us: float) -> None:
    launches = timing.launches_for(copies, call_us)
    assert launches >= timing.MIN_LAUNCHES and launches % copies == 0
    assert launches * call_us >= min(600.0, 0.5 * timing.REPLAY_US)


@pytest.mark.parametrize(("call_us", "launches"), [(130.0, 19), (600.0, 4), (5000.0, 4)])
def test_timing_long_calls_are_few(call_us: float, launches: int) -> None:
    assert timing.launches_for(37, call_us) == launches


def test_timing_percentiles_are_ordered() -> None:
    assert timing.percentiles([float(x) for x in range(100, -1, -1)]) == (50.0, 10.0, 90.0)
    assert timing.percentiles([3.0]) == (3.0, 3.0, 3.0)


def test_timing_gives_every_part_its_turn_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_ROUNDS", 8)
    turns: list[str] = []

    class Elsewhere:
        launches = 3

        def queue(self) -> None:
            turns.append("there")

        def collect(self) -> list[float]:
            return [2.0] * turns.count("there")

        def reset(self) -> None:
            turns.append("reset")

    found = timing.time_interleaved({"here": (lambda i: turns.append("here"), 2)}, 1.0, None, {"there": Elsewhere})
    assert set(found) == {"here", "there"} and found["there"].us == 2.0 and found["there"].launches == 3
    assert turns.count("there") == 1 + 8 and turns[-1] == "reset"
    first, second = [i for i, turn in enumerate(turns) if turn == "there"][:2]
    assert set(turns[first + 1 : second]) == {"here"}


def test_timing_what_fails_is_left_out_and_told() -> None:
    def fails(i: int) -> None:
        raise RuntimeError("no")

    told: list[str] = []
    found = timing.time_interleaved(
        {"good": (lambda i: None, 2), "bad": (fails, 2)}, 0.1, lambda name, error: told.append(f"{name}: {error}")
    )
    assert set(found) == {"good"} and told == ["bad: no"]
    with pytest.raises(RuntimeError, match=r"^no$"):
        timing.time_interleaved({"bad": (fails, 2)}, 0.1)


# Cliffs


def test_cliffs_name_what_is_slow_and_nothing_else() -> None:
    rows = []
    for m, us in ((16, 10.0), (17, 14.0), (32, 12.0), (64, 45.0)):
        rows.append(make_row("cublas", "fp16", m, 4096, 4096, 40.0))
        rows.append(make_row("marlin", "w4a16_sp24", m, 4096, 4096, us))
        rows.append(make_row("humming", "w4a16_dense", m, 4096, 4096, 100.0))
    assert list(cliffs.lines(rows)) == [
        "w4a16_sp24 slower than cuBLAS: 4096x4096 float16 M=64 0.89x",
        "w4a16_sp24 cliffs: 4096x4096 float16 M=17 1.17 times M=32",
    ]
    small = [make_row("cublas", "fp16", 64, 1024, 4096, 40.0), make_row("marlin", "w4a16_sp24", 64, 1024, 4096, 45.0)]
    assert list(cliffs.lines(small)) == ["w4a16_sp24 slower than cuBLAS: nowhere", "w4a16_sp24 cliffs: none"]


# Tiles


@dataclasses.dataclass(frozen=True)
class FakeTile:
    block_m: int
    family: str = "sm80"


def test_tiles_near_m_are_timed_and_the_largest_of_each_family_always() -> None:
    configs = [FakeTile(8), FakeTile(16), FakeTile(64), FakeTile(128), FakeTile(8, "sm90"), FakeTile(256, "sm90")]

    def timed(m: int) -> list[int]:
        return [config.block_m for config in configs if tiles.worth_timing(config, m, configs)]

    assert timed(1) == [8, 8]
    assert timed(16) == [8, 16, 8]
    assert timed(4096) == [128, 256]
    assert timed(16384) == [128, 256]


def test_tiles_say_so_when_there_is_nothing_to_time() -> None:
    assert tiles.describe_best([]) == "no configuration to time"
    rows = [{"config": "a", "us": 3.0}, {"config": "b", "us": 2.0}]
    assert tiles.describe_best(rows) == "b 2.0 us, the best of 2"


# Records


def test_records_kernel_hash_is_the_documented_definition(tmp_path: pathlib.Path) -> None:
    files = {"b.cuh": b"two", "a/z.cuh": b"one", "a.cuh": b"zero\0", "__pycache__/x.pyc": b"no"}
    for name, content in files.items():
        path = tmp_path / "src/marlin/kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    expected = hashlib.sha256(b"a/z.cuh\0one\0" + b"a.cuh\0zero\0\0" + b"b.cuh\0two\0").hexdigest()
    assert records.kernel_hash(tmp_path) == expected


def test_records_kernel_hash_covers_the_kernels_of_the_tree() -> None:
    folder = records.ROOT / "src/marlin/kernels"
    text = b"".join(
        path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    )
    assert records.kernel_hash() == hashlib.sha256(text).hexdigest()


def test_records_of_the_tree_are_sound() -> None:
    for record in records.read_all("gemm"):
        records.check(record)


def test_records_written_rows_answer_the_questions_of_the_targets(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "gemm-nvidia-h100-80gb-hbm3.json"
    records.write(path, records.check(make_record(block_rows())))
    loaded = json.loads(path.read_text())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert "H100" in loaded["gpu"] and loaded["kernel_hash"] == records.kernel_hash()
    for impl, want in {"cublas": 160.0, "marlin": 40.0}.items():
        hits = [
            row["us"]
            for row in loaded["rows"]
            if row["impl"] == impl
            and (row["n"], row["k"]) in TARGET_BLOCK
            and (row["m"], row["dtype"]) == (16, "float16")
        ]
        assert sum(hits) == want
    ours = [row for row in loaded["rows"] if row["impl"] == "marlin"]
    assert all((row["op"], row["group_size"], row["meta_bits"]) == ("w4a16_sp24", 128, 4) for row in ours)


def test_records_without_rows_are_written_too(tmp_path: pathlib.Path) -> None:
    records.write(tmp_path / "ceilings-x.json", {"gpu": "x", "ceilings": vars(CEILINGS)})
    assert json.loads((tmp_path / "ceilings-x.json").read_text())["gpu"] == "x"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"us": 5}, "record row: us must be float; got 5."),
        ({"m": None}, "record row: m must be int; got None."),
        ({"dtype": "fp16"}, "record row: dtype must be one of ('float16', 'bfloat16'); got 'fp16'."),
        ({"p10": 11.0}, "record row: times must satisfy 0 < p10 <= us <= p90; got 11.0, 10.0, 10.2."),
        ({"note": "x"}, "record row: fields must be those of the schema; got note."),
    ],
    ids=["type", "missing", "dtype", "order", "unknown"],
)
def test_records_bad_rows_are_refused(change: dict[str, Any], text: str) -> None:
    row = {**make_row("marlin", "w4a16_sp24", 16, 4096, 4096, 10.0), **change}
    with pytest.raises(ValueError) as caught:
        records.check_row(row)
    assert str(caught.value) == text


def test_records_merge_replaces_whole_points_and_keeps_the_rest() -> None:
    old = make_record(block_rows(16) + block_rows(64))
    new = make_record([make_row("cublas", "fp16", 16, n, k, 50.0) for n, k in TARGET_BLOCK])
    merged = records.merge(old, new)["rows"]
    assert {(row["impl"], row["us"]) for row in merged if row["m"] == 16} == {("cublas", 50.0)}
    assert len([row for row in merged if row["m"] == 64]) == 12


@pytest.mark.parametrize("change", [{"kernel_hash": "0"}, {"driver": "1"}, {"torch": "2.0"}, {"gpu": "other"}])
def test_records_merge_drops_rows_measured_with_something_else(change: dict[str, str]) -> None:
    old = {**make_record(block_rows(64)), **change}
    new = make_record(block_rows(16))
    assert records.merge(old, new) == new
    assert records.merge(None, new) == new


def test_machine_slug_is_a_file_name() -> None:
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# Report


def test_report_block_table_shows_sums_speedups_and_floor(folder: pathlib.Path) -> None:
    records.write(folder / "gemm-h100.json", make_record(block_rows()))
    text = report.TABLES["block"]()
    sums = rows.block_sums(block_rows(), TARGET_BLOCK, 16)[rows.OURS]
    share = f"{100 * sums['floor_us'] / 40.0:.0f} %"
    assert f"| 16 | 160.0 | 4.00x | 2.50x | 40.0 | {share} |" in text
    assert "| M | cuBLAS, µs | **2:4 INT4** | published Sparse-Marlin, 2:4 INT4 | 2:4 INT4, µs | of the floor |" in text
    assert text.startswith("NVIDIA H100 80GB HBM3, driver 580.1, CUDA 13.0, torch 2.11.0, 2026-01-02.")
    assert "Stale" not in text
    assert report.TABLES["block-bfloat16"]().endswith("No record yet. Measure with `make gpu`.")


def test_report_portable_table_counts_expanded_layers_and_is_shown_with_its_rows_alone(folder: pathlib.Path) -> None:
    records.write(folder / "gemm-h100.json", make_record(block_rows()))
    assert report.TABLES["portable"]() == ""
    found = [
        {**make_row("marlin-portable", op, 16, n, k, us), "config": config}
        for op, us, config in (
            ("w4a16_sp24", 20.0, "sm80_w4a16_sp24 8x64x512_s4_w114_c2"),
            ("w4a16_dense", 50.0, "sm80_expand_w4a16_dense + cuBLAS 1x4096"),
        )
        for n, k in TARGET_BLOCK
    ]
    records.write(folder / "gemm-h100.json", make_record(block_rows() + found))
    text = report.TABLES["portable"]()
    assert "| M | cuBLAS, µs | 2:4 INT4, portable kernels | expanded layers | INT4, portable kernels |" in text
    assert "| 16 | 160.0 | 2.00x | 0 of 4 | 0.80x | 4 of 4 |" in text
    assert "portable" not in report.TABLES["block"]() + report.TABLES["layers"]() + report.TABLES["models"]()


def test_report_marks_records_of_other_kernels_as_stale(folder: pathlib.Path) -> None:
    records.write(folder / "gemm-h100.json", make_record(block_rows(), kernel_hash="0" * 64))
    for name in ("block", "layers", "models"):
        assert "> **Stale**: measured with earlier kernels" in report.TABLES[name]()


def test_caption_counts_times_of_tiles_that_are_no_longer_built() -> None:
    built = all_configs("w4a16_sp24")[-1].tag
    rows = [
        make_row("marlin", "w4a16_sp24", 16, 4096, 4096, 5.0, config=f"sm90_w4a16_sp24 {tag}")
        for tag in (built, "1x1x1")
    ]
    rows.append(make_row("cublas", "fp16", 16, 4096, 4096, 9.0, config=None))
    assert report.caption(make_record(rows)).endswith(
        "1 of 2 times of our kernels are of tiles that are no longer built."
    )
    assert "no longer built" not in report.caption(make_record([rows[0], rows[2]]))


def test_report_sum_is_left_out_when_a_layer_is_missing() -> None:
    some = [row for row in block_rows() if (row["impl"], row["n"]) != ("sparse-marlin", 28672)]
    assert set(rows.block_sums(some, TARGET_BLOCK, 16)) == {rows.BASELINE, rows.OURS}


def test_report_layers_and_models_have_a_line_each(folder: pathlib.Path) -> None:
    records.write(folder / "gemm-h100.json", make_record(block_rows()))
    assert "| 28672 x 4096 | 40.0 | 4.00x | 2.50x | 10.0 |" in report.TABLES["layers"]()
    assert "| llama3.1-8b, M=16 | 160.0 | 4.00x |" in report.TABLES["models"]()
    assert "| NVIDIA H100 80GB HBM3 | 3000 | 2900 | 800 |" in report.TABLES["ceilings"]()


def test_report_quality_table_has_a_line_per_row(folder: pathlib.Path) -> None:
    row = {
        "model": "demo",
        "method": "sparsegpt",
        "recipe": "2:4 INT4",
        "wiki": 21.456,
        "news": 30.0,
        "bits_per_weight": 3.25,
        "seconds": 61.2,
        "device": "cpu",
        "peak_memory_gib": None,
    }
    records.write(folder / "quality-demo.json", {"rows": [row]})
    assert "| demo | sparsegpt | 2:4 INT4 | 21.46 | 30.00 | 3.25 | 61 | cpu | - |" in report.TABLES["quality-others"]()
    assert "| demo |" not in report.TABLES["quality"]()


def test_report_update_then_check_agree(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    records.write(folder / "gemm-h100.json", make_record(block_rows()))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:block -->\nold\n<!-- /bench:block -->\nafter\n")
    assert report.main(["--check", str(page)]) == 1
    assert "old" in page.read_text()
    assert report.main(["--update", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:block -->\nNVIDIA H100") and text.endswith(
        "<!-- /bench:block -->\nafter\n"
    )
    assert report.main(["--check", str(page)]) == 0
    records.write(folder / "gemm-h100.json", make_record(block_rows(), kernel_hash="0"))
    assert report.main(["--check", str(page)]) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- bench:speed -->\n<!-- /bench:speed -->\n", "a marker must be one of block, "),
        ("<!-- bench:block -->\n", "every marker must have its end; got one without."),
    ],
)
def test_report_bad_markers_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        report.render(text, "README.md")
    assert str(caught.value).startswith("benchmarks.report: README.md: ") and said in str(caught.value)


# Candidates, and a whole run on the CPU


def cpu_setting(group_size: int = 128) -> Setting:
    return Setting(64, 128, torch.float16, group_size, 10_000, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["w4a16_sp24", "w4a16_dense"])
def test_candidates_own_kernels_pass_their_check(kind: str) -> None:
    setting = cpu_setting()
    one = candidates.marlin(kind)(setting)
    act, out = setting.random_act(3), torch.empty(3, 64, dtype=torch.float16)
    assert one.check is not None
    one.check(act, out)
    first = out.clone()
    one.call(one.copies - 1, act, out)
    assert torch.equal(first, out)
    assert one.copies == setting.copies(kind) >= 2


def test_candidates_check_sees_an_entry_that_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = cpu_setting()
    one = candidates.marlin("w4a16_sp24")(setting)
    right = candidates.ops.linear_out

    def forgets_a_column(act: torch.Tensor, packed: Any, out: torch.Tensor) -> torch.Tensor:
        kept = out[:, 5].clone()
        right(act, packed, out)
        out[:, 5] = kept
        return out

    monkeypatch.setattr(candidates.ops, "linear_out", forgets_a_column)
    with pytest.raises(AssertionError, match="3 of 192 entries are not finite or not written"):
        one.check(setting.random_act(3), torch.empty(3, 64, dtype=torch.float16))  # type: ignore[misc]


def run_on_cpu(monkeypatch: pytest.MonkeyPatch, names: dict[str, candidates.Factory]) -> gemm.Run:
    def fake_times(calls: Any, budget_ms: float, failed: Any, others: Any) -> dict[str, timing.Timing]:
        assert not others
        times = {}
        for name, (call, copies) in calls.items():
            try:
                call(copies - 1)
                times[name] = timing.Timing(10.0, 9.0, 11.0, 20, 8)
            except Exception as error:
                failed(name, error)
        return times

    monkeypatch.setattr(timing, "time_interleaved", fake_times)
    run = gemm.Run(names, 128, 1.0, CEILINGS)
    run.measure(cpu_setting(), [1, 17])
    return run


def test_gemm_rows_satisfy_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_on_cpu(monkeypatch, {"cublas": candidates.cublas, **gemm.OWN})
    assert not run.faults and len(run.rows) == 6
    records.check(make_record(run.rows))
    assert {(row["impl"], row["op"], row["meta_bits"]) for row in run.rows} == {
        ("cublas", "fp16", None),
        ("marlin", "w4a16_sp24", 4),
        ("marlin", "w4a16_dense", None),
    }


def test_gemm_measures_batch_invariant_mode_at_the_points_of_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def build(setting: Setting) -> candidates.Prepared:
        one = candidates.marlin("w4a16_sp24", batch_invariant=True)(setting)

        def call(i: int, act: torch.Tensor, out: torch.Tensor) -> object:
            result = one.call(i, act, out)
            seen.append(settings.batch_invariant())
            return result

        return dataclasses.replace(one, call=call)

    names = {"cublas": candidates.cublas, gemm.INVARIANT: build}
    assert {row["impl"] for row in run_on_cpu(monkeypatch, names).rows} == {"cublas"}
    monkeypatch.setitem(gemm._FEW, candidates.BATCH_INVARIANT, {"float16": (((64, 128),), (17,))})
    run = run_on_cpu(monkeypatch, names)
    found = [(row["impl"], row["op"], row["m"]) for row in run.rows if row["impl"] != "cublas"]
    assert found == [(*rows.INVARIANT, 17)] and not run.faults
    assert seen and not any(seen), "the mode ends with the call"


def test_candidates_batch_invariant_check_sees_a_row_that_depends_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = cpu_setting()
    one, right = candidates.marlin("w4a16_sp24", batch_invariant=True)(setting), candidates.ops.linear_out

    def depends(act: torch.Tensor, packed: Any, out: torch.Tensor) -> torch.Tensor:
        right(act, packed, out)
        out[-1, 3] *= 1 + 2**-10 * (act.shape[0] > 1)
        return out

    assert one.check is not None
    one.check(setting.random_act(3), torch.empty(3, 64, dtype=torch.float16))
    monkeypatch.setattr(candidates.ops, "linear_out", depends)
    with pytest.raises(AssertionError, match="a row alone differs from the same row in a batch"):
        one.check(setting.random_act(3), torch.empty(3, 64, dtype=torch.float16))


def test_candidates_portable_runs_portable_plans_and_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = dataclasses.replace(cpu_setting(), device=torch.device("cuda"))
    on_cpu = dataclasses.replace(cpu_setting())
    asked: list[Any] = []

    def plan(problem: Any, index: int, *, portable: bool) -> Any:
        asked.append((problem, index, portable))
        config = dataclasses.make_dataclass("Config", ["family"])("sm80" if portable else "sm90")
        return dataclasses.make_dataclass("Plan", ["config", "runs"])(config, f"kernel of M={problem.m}")

    def by_plan(plan: Any, act: torch.Tensor, operands: Any, out: torch.Tensor) -> torch.Tensor:
        assert plan.config.family == "sm80" and len(operands) == 4 and operands[3] is None
        return out.zero_()

    monkeypatch.setattr(candidates.runtime, "plan", plan)
    monkeypatch.setattr(candidates, "by_plan", by_plan)
    packed = candidates._packed("w4a16_sp24", on_cpu)
    monkeypatch.setattr(candidates, "_packed", lambda kind, setting: packed)
    one = candidates.portable("w4a16_sp24")(setting)
    assert (one.impl, one.op, one.copies, one.config(300)) == (
        "marlin-portable",
        "w4a16_sp24",
        len(packed[1]),
        "kernel of M=300",
    )
    with pytest.raises(AssertionError, match="outside the bound"):
        one.check(on_cpu.random_act(3), torch.empty(3, 64, dtype=torch.float16))  # type: ignore[misc]
    assert asked[-1] == ((3, 64, 128, 128, "float16", "w4a16_sp24", False), 0, True)


def test_candidates_portable_is_absent_where_it_is_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AbsentError, match="kernels need a GPU"):
        candidates.portable("w4a16_sp24")(cpu_setting())
    a100 = DeviceInfo(0, "A100", (8, 0), 108, 166912, 40 << 20, 1_410_000, 1.9e12)

    def plan(problem: Any, index: int, *, portable: bool) -> Any:
        return candidates.runtime.make_plan(problem, a100, portable=portable)

    monkeypatch.setattr(candidates.runtime, "plan", plan)
    with pytest.raises(AbsentError, match="the portable kernels are this GPU's own"):
        candidates.portable("w4a16_sp24")(dataclasses.replace(cpu_setting(), device=torch.device("cuda")))


def test_gemm_missing_peer_is_absent_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MARLIN_PEERS_DIR", raising=False)
    peer = peers.PEERS["sparse-marlin"]
    assert isinstance(peer, isolated.Peer)
    process = isolated.Process(peer, 1.0)
    run = run_on_cpu(monkeypatch, {"cublas": candidates.cublas, "sparse-marlin": process.build})
    assert run.absent == {"sparse-marlin float16": "MARLIN_PEERS_DIR is not set"}
    assert "sparse-marlin (float16): absent (MARLIN_PEERS_DIR is not set)" in capsys.readouterr().out
    assert {row["impl"] for row in run.rows} == {"cublas"} and not run.faults


def test_gemm_peer_that_fails_when_called_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(setting: Setting) -> candidates.Prepared:
        def call(i: int, act: torch.Tensor, out: torch.Tensor) -> None:
            raise AbsentError("refused the problem")

        return candidates.Prepared("humming", "w4a16_dense", 2, call)

    run = run_on_cpu(monkeypatch, {"cublas": candidates.cublas, "humming": refuses})
    assert run.absent == {"humming float16": "refused the problem"} and not run.faults


def test_gemm_wrong_kernel_is_a_fault_and_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(setting: Setting) -> candidates.Prepared:
        def check(act: torch.Tensor, out: torch.Tensor) -> None:
            if act.shape[0] == 17:
                raise AssertionError("1 entry outside the bound")

        good = candidates.marlin("w4a16_sp24")(setting)
        return dataclasses.replace(good, check=check)

    run = run_on_cpu(monkeypatch, {"w4a16_sp24": wrong})
    assert run.faults == ["marlin:w4a16_sp24 m=17 n=64 k=128: AssertionError: 1 entry outside the bound"]
    assert [row["m"] for row in run.rows] == [1]


def test_gemm_prints_block_sums_of_whole_blocks_only() -> None:
    rows = block_rows(16) + block_rows(64)[:-1]
    lines = list(gemm.block_lines(rows, 128))
    assert lines[0] == " float16 M=16    cublas    160.0 us  marlin:w4a16_sp24 4.00x sparse-marlin:w4a16_sp24 2.50x"
    assert "sparse-marlin" not in lines[1] and "M=64" in lines[1]


def test_gemm_bad_arguments_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gemm.main(["--impls", "fast"]) == 2
    assert "benchmarks.gemm: --impls must be of w4a16_sp24, " in capsys.readouterr().err
    assert gemm.main(["--dtypes", "float32"]) == 2
    assert "--dtypes must be of float16, bfloat16; got 'float32'." in capsys.readouterr().err


# The one command


def fake_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, failing: set[str]) -> list[str]:
    ran: list[str] = []
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)

    def fake(line: list[str], log: pathlib.Path) -> tuple[int, str]:
        ran.append(log.stem)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"ran {log.stem}\n")
        return int(log.stem in failing), "last line"

    monkeypatch.setattr(gpu, "run_logged", fake)
    return ran


def test_report_host_table_has_a_column_for_each_mode(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    monkeypatch.setattr(report.records.read_all, "__defaults__", (tmp_path,))
    assert report.TABLES["host"]() == "No record yet. Measure with `marlin bench host`."
    one = {"impl": "marlin", "call": "SparseLinear", "us": 9.14, "p10": 9.0, "p90": 10.0}
    found = [{**one, "mode": "no_grad"}, {**one, "mode": "inference_mode", "us": 8.0}]
    head = {"gpu": "G", "torch": "2", "python": "3", "date": "today"}
    records.write(tmp_path / "host-g.json", {**head, "rows": found})
    text = report.TABLES["host"]()
    assert text.startswith("G, torch 2, Python 3, today. Microseconds.")
    assert "| call | of | no_grad | inference_mode |" in text and "| SparseLinear | marlin | 9.1 | 8.0 |" in text


def test_gpu_measures_only_when_tests_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    ran = fake_steps(monkeypatch, tmp_path, {"tests"})
    assert gpu.main([]) == 1
    assert ran == ["compile", "tests"]
    assert "gemm      skipped" in capsys.readouterr().out
    assert gpu.main(["--keep-going"]) == 1
    assert ran[2:] == ["compile", "tests", "ceilings", "host", "gemm", "report"]
    assert gpu.main(["--keep-going", "--also", "decode,sustained"]) == 1
    assert ran[8:] == list(gpu.STEPS)


def test_gpu_copies_records_and_logs_to_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_steps(monkeypatch, tmp_path, set())
    monkeypatch.setattr(gpu, "RECORDS", tmp_path / "records")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    records.write(tmp_path / "records" / "gemm-x.json", make_record([]))
    assert gpu.main(["--only", "gemm,report"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gemm-x.json", "gpu.log"]
    assert "== gemm\nran gemm" in (tmp_path / "out" / "gpu.log").read_text()


def test_gpu_arguments_after_dashes_go_to_the_benchmark() -> None:
    args = gpu.parse(["--only", "gemm", "--quick", "--", "--shapes", "llama2-7b"])
    assert args.steps == ["gemm"]
    assert gpu.command("gemm", args)[2:] == ["benchmarks.gemm", "--quick", "--shapes", "llama2-7b"]


def test_gpu_counts_tests_from_the_junit_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert gpu.count_tests(path) == "5 passed, 2 failed, 2 skipped"
    assert gpu.count_tests(tmp_path / "none.xml") is None


def test_gpu_step_runs_with_the_checkout_on_the_path(tmp_path: pathlib.Path) -> None:
    line = [gpu.sys.executable, "-c", "import marlin.errors, benchmarks.records; print('found both')"]
    assert gpu.run_logged(line, tmp_path / "step.log") == (0, "found both")
    assert (tmp_path / "step.log").read_text() == "found both\n"
