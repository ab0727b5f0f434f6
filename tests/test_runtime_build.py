"""Compiling many kernels ahead of time: rows, verdicts, the cache, and worker processes."""

from __future__ import annotations

import json
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, replace

import pytest

from marlin.errors import CompileError, UnsupportedError
from marlin.runtime import build, cache, compiler, source


@dataclass(frozen=True)
class Variant:
    """A variant of one line."""

    entry: str
    body: str = "x[threadIdx.x] = 1;"
    name: str = "family"
    smem_bytes: int = 4096
    threads: int = 128

    def target(self, arch: str) -> str | None:
        return arch

    def render(self) -> str:
        return f'extern "C" __global__ void __launch_bounds__({self.threads}) {self.entry}(int* x) {{ {self.body} }}\n'


STACK = "volatile int a[100]; a[x[0]] = 1; x[1] = a[x[2]];"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    chosen = tmp_path / "kernels"
    monkeypatch.setenv("MARLIN_CACHE_DIR", str(chosen))
    monkeypatch.setattr(cache, "_memo", {})
    monkeypatch.setattr(cache, "_warned", set())
    return chosen


def test_build_all_gives_rows_in_order_with_resources():
    rows = build.build_all([Variant("one"), Variant("two", smem_bytes=7)], ["80", "90a"], 1)
    assert [(row.entry, row.arch) for row in rows] == [("one", "80"), ("one", "90a"), ("two", "80"), ("two", "90a")]
    for row in rows:
        assert (row.name, row.threads, row.spill_bytes, row.stack_bytes, row.error) == ("family", 128, 0, 0, None)
        assert row.registers and row.image_bytes > 1000 and 0 < row.seconds < 60
        assert row.problems == () and row.stored
    assert [row.smem_bytes for row in rows] == [4096, 4096, 7, 7]


def test_build_all_gives_the_same_with_processes():
    def without_time(rows):
        return [replace(row, seconds=0.0) for row in rows]

    variants, archs = [Variant("one"), Variant("two"), Variant("broken", "nothing();")], ["80", "89"]
    assert without_time(build.build_all(variants, archs, 2)) == without_time(build.build_all(variants, archs, 1))


def test_build_all_fills_the_cache_that_get_cubin_reads(folder, monkeypatch):
    variant = Variant("one")
    build.build_all([variant], ["80", "90"], 1, options=("-lineinfo",))
    monkeypatch.setattr(compiler, "compile_cubin", None)
    for arch in ("80", "90"):
        image = cache.get_cubin(variant.render(), name="one", arch=arch, options=("-lineinfo",))
        assert image.startswith(b"\x7fELF")
    assert cache.info().entries == 2


def test_build_all_leaves_the_cache_alone_when_told(folder):
    (row,) = build.build_all([Variant("one")], ["80"], 1, store=False)
    assert not row.stored and not folder.exists()


def test_build_all_says_when_nothing_could_be_stored(folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="must not be writable by everyone"):
        rows = build.build_all([Variant("one"), Variant("two")], ["80"], 1)
    assert [row.stored for row in rows] == [False, False]


def test_build_all_makes_a_row_of_a_kernel_that_does_not_compile(folder):
    bad, good = build.build_all([Variant("bad", "nothing();"), Variant("good")], ["80"], 1)
    assert bad.error is not None and 'identifier "nothing" is undefined' in bad.error
    assert bad.error.startswith("compile_cubin[bad]: the kernel must compile for sm_80; got ")
    assert bad.problems == (bad.error,)
    assert (bad.registers, bad.spill_bytes, bad.image_bytes, bad.stored) == (None, None, 0, False)
    assert good.problems == ()


def test_build_row_finds_a_stack_frame():
    (row,) = build.build_all([Variant("stack", STACK)], ["80"], 1, store=False)
    assert row.stack_bytes == 400 and row.problems == ("needs a stack frame of 400 bytes",)


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ({}, ()),
        ({"spill_bytes": 12}, ("spills 12 bytes",)),
        ({"serialized_wgmma": ("note C7510",)}, ("note C7510",)),
        ({"registers": None}, ("the assembler reported no resources",)),
        ({"spill_bytes": 4, "stack_bytes": 8}, ("spills 4 bytes", "needs a stack frame of 8 bytes")),
        ({"error": "no", "spill_bytes": 4}, ("no",)),
    ],
)
def test_build_row_problems_name_each_fault(changed, problems):
    row = build.BuildRow("family", "one", "80", 32, 0, 0, 4096, 128, 1000, 0.5)
    assert replace(row, **changed).problems == problems


def test_build_row_survives_json():
    (row,) = build.build_all([Variant("one")], ["80"], 1, store=False)
    read = json.loads(json.dumps(row.as_dict()))
    assert read == row.as_dict()
    assert read["entry"] == "one" and read["problems"] == [] and read["serialized_wgmma"] == []


def test_build_all_reports_progress_in_order():
    seen: list[str] = []
    build.build_all(
        [Variant("one"), Variant("two")], ["80"], 1, store=False, progress=lambda row: seen.append(row.entry)
    )
    assert seen == ["one", "two"]


def test_build_all_of_nothing_is_nothing():
    assert build.build_all([], ["80"]) == [] == build.build_all([Variant("one")], [])


def test_build_all_refuses_an_unknown_arch_before_it_compiles(monkeypatch):
    monkeypatch.setattr(compiler, "compile_cubin", None)
    with pytest.raises(UnsupportedError, match="NVRTC must know the architecture sm_999"):
        build.build_all([Variant("one")], ["80", "999"], 1)


def test_build_all_refuses_less_than_one_job():
    with pytest.raises(ValueError, match=r"^build: jobs must be at least 1; got jobs=0\.$"):
        build.build_all([Variant("one")], ["80"], 0)


def test_build_all_says_so_when_a_compiler_process_dies(monkeypatch):
    class Dying:
        def __init__(self, *args, **kwargs):
            pass

        def map(self, *args):
            raise BrokenExecutor

        def shutdown(self, **kwargs):
            pass

    monkeypatch.setattr(build, "ProcessPoolExecutor", Dying)
    with pytest.raises(CompileError) as caught:
        build.build_all([Variant("one"), Variant("two")], ["80"], 2)
    assert str(caught.value) == (
        "build: every compiler process must live; got one that died. Memory may have run out: use fewer jobs."
    )


def test_default_jobs_is_at_least_one_and_at_most_sixteen():
    assert 1 <= build.default_jobs() <= 16


def test_build_all_takes_the_variants_of_the_runtime():
    variants = source.all_variants()
    chosen = [
        next(variant for variant in variants if variant.kind == kind) for kind in {v.kind: None for v in variants}
    ]
    for row, variant in zip(build.build_all(chosen, ["80"], 1, store=False), chosen, strict=True):
        assert (row.name, row.entry, row.error) == (variant.name, variant.entry, None)
        assert row.registers and (row.smem_bytes, row.threads) == (variant.smem_bytes, variant.threads)
