"""The emitted file: its text, that nvcc builds it, and that its launcher does what `plan` and `launch` do."""

from __future__ import annotations

import ctypes
import importlib
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from marlin.runtime import expansion, tensor_map
from marlin.runtime.config import GROUP_SIZES, MAX_M, all_configs
from marlin.runtime.emit import NAMES, emit, hopper_tiles
from marlin.runtime.plan import Plan, make_plan
from marlin.runtime.problem import DTYPES, KINDS, Problem
from marlin.runtime.source import SIGNATURES
from tests.kernel_on_cpu.machine import GPU, HERE, encode_map

_launch = importlib.import_module("marlin.runtime.launch")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

INVALID_VALUE = 1  # cudaErrorInvalidValue
STREAM = 64
POINTERS = tuple(4096 * i for i in range(1, 9))  # act to tickets


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"name": "sm80"},
            "kernels emit: NAME must be one of ('sm80_w4a16_sp24', 'sm80_w4a16_dense', 'sm90_w4a16_sp24', "
            "'sm90_w4a16_dense', 'sm80_expand_w4a16_sp24', 'sm80_expand_w4a16_dense'); got 'sm80'.",
        ),
        (
            {"name": "sm90_w4a16_sp24", "dtype": "float32"},
            "kernels emit: dtype must be one of ('float16', 'bfloat16'); got 'float32'.",
        ),
        (
            {"name": "sm80_w4a16_sp24", "group_size": 16},
            "kernels emit: group_size must be one of (32, 64, 128, -1); got 16.",
        ),
    ],
)
def test_emit_refuses_what_it_does_not_know(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        emit(**arguments)
    assert str(error.value) == text


@pytest.mark.parametrize("name", NAMES)
def test_emitted_file_includes_base_cuda_alone(name: str) -> None:
    text = emit(name)
    headers = {"cuda_runtime.h", "algorithm"} | ({"cuda.h", "cstring"} if name.startswith("sm90") else set())
    assert set(re.findall(r"#include (.*)", text)) == {f"<{header}>" for header in headers}
    entries = re.findall(rf"^({name}_fp16_g128_\w+)\(", text, re.MULTILINE)
    assert len(entries) == len(set(entries)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_emitted_hopper_file_has_the_products_of_each_token_tile_once(kind: str) -> None:
    text = emit(f"sm90_{kind}", dtype="bfloat16", group_size=32)
    extents = {config.block_m for _, config in hopper_tiles(kind, "bfloat16", 32)}
    found = re.findall(r"wgmma\.mma_async(?:\.sp)?\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.bf16\.bf16", text)
    assert sorted(found) == sorted((str(n), k) for n in extents for k in ("16", "32"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_hopper_tiles_cover_all_tokens_with_larger_and_larger_tiles(kind: str, group_size: int) -> None:
    for dtype in DTYPES:
        tiles = hopper_tiles(kind, dtype, group_size)
        assert tiles[-1][0] == MAX_M
        assert all(before[0] < after[0] and before[1] != after[1] for before, after in pairwise(tiles))
        assert tiles[0][1].block_m < tiles[-1][1].block_m


class Launch(ctypes.Structure):
    """`Launch` of cuda_runtime.cpp."""

    _fields_ = (
        ("entry", ctypes.c_char * 128),
        *((name, ctypes.c_uint) for name in ("grid", "threads", "smem", "opted", "pdl", "cluster", "spread")),
        ("stream", ctypes.c_void_p),
        ("arguments", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Built:
    """An emitted file above a stand-in for the CUDA runtime."""

    library: ctypes.CDLL
    name: str
    dtype: str
    group_size: int

    def launch(self, m: int, n: int, k: int, act_stride: int, sms: int, misaligned: int = 0) -> int:
        family = self.name[:4]
        self.library.expect(SIGNATURES[family].encode(), sms)
        pointers = (POINTERS[0] + misaligned, *POINTERS[1:])
        code = self.library.marlin_launch(*map(ctypes.c_void_p, pointers), m, n, k, act_stride, ctypes.c_void_p(STREAM))
        return int(code)

    def last(self) -> tuple[Launch, tuple]:
        """The last launch and its arguments."""
        self.library.last_launch.restype = ctypes.POINTER(Launch)
        found = self.library.last_launch().contents
        form = "=" + "".join({"T": "128s", "P": "Q", "i": "i"}[code] for code in SIGNATURES[self.name[:4]])
        raw = ctypes.string_at(ctypes.addressof(found) + Launch.arguments.offset, struct.calcsize(form))
        return found, struct.unpack(form, raw)

    def plan(self, m: int, n: int, k: int, sms: int) -> Plan:
        """The plan for the configuration that was launched last."""
        problem = Problem(m, n, k, self.group_size, self.dtype, self.name[5:])
        entry = self.last()[0].entry.decode()
        config = next(c for c in all_configs(problem.kind) if entry.endswith(c.tag) and c.family == self.name[:4])
        return make_plan(problem, replace(GPU, num_sms=sms), config)


def _build(source: Path, library: Path, arch: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Builds an emitted file and the stand-in; no symbol is taken from the process, which may hold the true runtime."""
    command = [
        *("nvcc", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-shared", "--cudart=none", *flags),
        *("-Xcompiler=-Wall,-Wextra,-fPIC", "-Xlinker=-Bsymbolic", "-o", str(library)),
        *(str(source), str(HERE / "cuda_runtime.cpp")),
    ]
    return subprocess.run(command, capture_output=True, text=True)


class Recorder:
    """Takes the place of a loaded kernel under `launch`, and keeps what it is launched with."""

    def __init__(self) -> None:
        self.launched: tuple = ()
        self.options: dict = {}

    def launch(self, blocks: tuple[int, int, int], threads: int, stream: int, args: tuple, **options: object) -> None:
        self.launched, self.options = (blocks, threads, stream, args), options


FILES = (
    ("sm80_w4a16_sp24", "bfloat16", 64),
    ("sm90_w4a16_sp24", "float16", 128),
    ("sm90_w4a16_dense", "bfloat16", -1),
)


@pytest.fixture(scope="module", params=FILES, ids=lambda file: "-".join(map(str, file)))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """nvcc builds the file, without a warning, and links it to nothing of CUDA."""
    name, dtype, group_size = request.param
    folder = tmp_path_factory.mktemp("emitted")
    source, library = folder / "kernel.cu", folder / "kernel.so"
    source.write_text(emit(name, dtype=dtype, group_size=group_size))
    result = _build(source, library, "80" if name.startswith("sm80") else "90a")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout + result.stderr
    return Built(ctypes.CDLL(str(library)), name, dtype, group_size)


@needs_nvcc
@pytest.mark.parametrize("sms", [3, 132])
@pytest.mark.parametrize(("n", "k"), [(8, 128), (200, 640), (4096, 4096), (6152, 1152)])
def test_emitted_launcher_does_what_plan_and_launch_do(
    built: Built, n: int, k: int, sms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(tensor_map, "encode", encode_map)
    monkeypatch.setattr(_launch, "kernel", lambda *_: recorder)
    monkeypatch.setattr(_launch, "PDL", True)
    names = ("act", "codes", "meta", "scales", "bias", "out", "workspace", "tickets")
    for m in (1, 8, 9, 16, 17, 33, 100, 200, 300, 1000, 4096):
        assert built.launch(m, n, k, k + 8, sms) == 0
        found, arguments = built.last()
        plan = built.plan(m, n, k, sms)
        _launch.launch(plan, **dict(zip(names, POINTERS, strict=True)), lda=k + 8, stream=STREAM)
        assert found.entry.decode() == plan.variant.entry
        assert found.smem == found.opted == plan.variant.smem_bytes
        assert ((found.grid, 1, 1), found.threads, found.stream, arguments) == recorder.launched
        cluster = recorder.options.get("cluster", 0)
        assert (found.pdl, found.cluster) == (recorder.options.get("pdl", False), cluster if cluster > 1 else 0)
        assert found.spread == (cluster > 1)
        assert plan.num_tickets <= plan.config.ctas_per_sm * sms


@needs_nvcc
def test_emitted_launcher_takes_the_tile_of_its_range(built: Built) -> None:
    if built.name.startswith("sm80"):
        ranges = [(8, 8), (16, 16), (32, 32), (64, 64), (MAX_M, 128)]
    else:
        ranges = [(m, c.block_m) for m, c in hopper_tiles(built.name[5:], built.dtype, built.group_size)]
    for (below, _), (limit, block_m) in pairwise([(0, 0), *ranges]):
        for m in (below + 1, limit):
            assert built.launch(m, 256, 256, 256, 132) == 0
            assert f"_{block_m}x" in built.last()[0].entry.decode()


@needs_nvcc
def test_emitted_launcher_refuses_what_its_kernels_do_not_take(built: Built) -> None:
    hopper, group = built.name.startswith("sm90"), built.group_size
    good = (16, 64, 256, 256)
    assert built.launch(*good, 132) == 0
    for m, n, k, stride in ((0, 64, 256, 256), (MAX_M + 1, 64, 256, 256), (16, 4, 256, 256), (16, 12, 256, 256)):
        assert built.launch(m, n, k, stride, 132) == INVALID_VALUE
    for k, stride in ((256, 248), (256, 260), (0, 256), (48, 48)):
        assert built.launch(16, 64, k, stride, 132) == INVALID_VALUE
    # Half a tile of 64 columns, and half a group.
    assert built.launch(16, 64, 32, 32, 132) == (INVALID_VALUE if hopper or group > 32 else 0)
    assert built.launch(16, 64, 64, 64, 132) == (INVALID_VALUE if group > 64 else 0)
    if hopper:  # the driver's own word
        assert built.launch(*good, 132, misaligned=2) == INVALID_VALUE


@needs_nvcc
def test_emitted_workspace_holds_the_parts_of_every_tile(built: Built) -> None:
    built.library.marlin_workspace_bytes.restype = ctypes.c_size_t
    size = built.library.marlin_workspace_bytes()
    for m in (1, 16, 32, 64, 129, 1000):
        assert built.launch(m, 4104, 4096, 4096, 132) == 0
        assert built.plan(m, 4104, 4096, 132).workspace_bytes <= size


@needs_nvcc
def test_emitted_hopper_launch_waits_for_its_predecessor_when_asked(tmp_path: Path) -> None:
    source, library = tmp_path / "kernel.cu", tmp_path / "kernel.so"
    source.write_text(emit("sm90_w4a16_sp24"))
    assert _build(source, library, "90a", "-DMARLIN_PDL=0").returncode == 0
    built = Built(ctypes.CDLL(str(library)), "sm90_w4a16_sp24", "float16", 128)
    assert built.launch(1, 64, 128, 128, 132) == 0
    assert built.last()[0].pdl == 0


@needs_nvcc
@pytest.mark.parametrize(
    ("kind", "dtype", "group_size"), [("w4a16_sp24", "float16", 32), ("w4a16_dense", "bfloat16", -1)]
)
def test_emitted_expansion_does_what_expand_does(
    kind: str, dtype: str, group_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, library = tmp_path / "kernel.cu", tmp_path / "kernel.so"
    source.write_text(emit(f"sm80_expand_{kind}", dtype=dtype, group_size=group_size))
    result = _build(source, library, "80")
    assert result.returncode == 0 and "warning" not in result.stdout + result.stderr, result.stderr
    variant = expansion.ExpandVariant(kind, dtype, group_size)
    built, recorder = Built(ctypes.CDLL(str(library)), variant.entry, dtype, group_size), Recorder()
    monkeypatch.setattr(_launch, "_expand_kernel", lambda *_: recorder)
    form = "=" + "".join({"P": "Q", "i": "i"}[code] for code in variant.signature)
    codes, meta, scales, out = POINTERS[:4]
    meta = meta if kind == "w4a16_sp24" else 0

    def run(first: int, rows: int, k: int) -> int:
        built.library.expect(variant.signature.encode(), 1)
        pointers = map(ctypes.c_void_p, (codes, meta, scales, out))
        return int(built.library.marlin_expand(*pointers, first, rows, k, ctypes.c_void_p(STREAM)))

    for n, k in ((8, 32), (200, 160), (4096, 14336)):
        problem = Problem(4096, n, k, group_size, dtype, kind)
        plan = make_plan(problem, GPU)._replace(expansion=expansion.expansion(problem, GPU))
        for slab in expansion.cut(n, k, 8 << 20):
            assert run(*slab, k) == 0
            pointers = {"codes": codes, "meta": meta, "scales": scales, "out": out}
            _launch.expand(plan, slab, **pointers, stream=STREAM)
            built.library.last_launch.restype = ctypes.POINTER(Launch)
            found = built.library.last_launch().contents
            raw = ctypes.string_at(ctypes.addressof(found) + Launch.arguments.offset, struct.calcsize(form))
            assert (found.entry.decode(), found.smem) == (variant.entry, variant.smem_bytes)
            launched = ((found.grid, 1, 1), found.threads, found.stream, struct.unpack(form, raw))
            assert launched == recorder.launched
    for first, rows, k in ((32, 8, 64), (-64, 8, 64), (0, 0, 64), (0, 8, 0), (0, 8, 48)):
        assert run(first, rows, k) == INVALID_VALUE
