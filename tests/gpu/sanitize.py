"""compute-sanitizer over a reduced set of kernels: `python tests/gpu/sanitize.py [--tools memcheck,racecheck]`.

Owns which kernels and problems are tried (every family and kind, every way of sharing a tile, few tiles each, odd
extents; all that expand, and all that work row by row), and the verdict: each tool's own count of errors. What runs
under the tool is this file with --child, which uses the driver alone, every tensor an allocation of its own, so that a
read beyond one is seen; results are checked.

racecheck follows barriers of a block; of what the copy engine and other blocks of a cluster write it knows in part, so
a hazard that it reports there is a question, and one that it does not report is no proof.
Exits with 0 when every tool ran and found nothing, 1 when one found something, 2 when one is absent or did not run.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from marlin.runtime import Problem, all_configs, compiler, driver, expand, launch, make_plan, why_illegal
from marlin.runtime.build import build_all
from marlin.runtime.config import GROUP_SIZES, Config, TileConfig
from marlin.runtime.expansion import Slab, all_expand_variants, expansion
from marlin.runtime.plan import Plan
from marlin.runtime.problem import DTYPES, KINDS
from marlin.runtime.rowwise import RowwisePlan, make_rowwise_plan, rowwise_kernel

TOOLS = ("memcheck", "racecheck", "synccheck")
ALL_M = (1, 17, 65)
_OPTIONS = {"memcheck": ["--padding", "64"], "racecheck": ["--racecheck-report", "all"], "synccheck": []}
_NORMS = ("rms_norm", "fused_add_rms_norm")
_ROWS = [(op, 3, width) for op in _NORMS for width in (1032, 4120, 8200)]
_ROWS += [("silu_and_mul", rows, 8200) for rows in (3, 280)]
_SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: .*$", re.MULTILINE)
_FOUND = re.compile(r"SUMMARY: (\d+)")
_LAUNCHED = "launches, all results within the bound"


class Outcome(NamedTuple):
    """How a tool's run ended: status ("clean", "found", "did not run"), and its own words."""

    tool: str
    status: str
    seconds: float
    text: str


def chosen(device: driver.DeviceInfo) -> list[tuple[str, Config]]:
    """(kind, configuration): of each kind, the smallest legal one of every family and way to share and add."""
    found: dict[tuple[Any, ...], tuple[str, Config]] = {}
    for kind in KINDS:
        for config in sorted(all_configs(kind), key=lambda config: config.block_m * config.block_n):
            if why_illegal(config, Problem(1, 64, 1024, 32, DTYPES[0], kind), device) is not None:
                continue
            groups = config.warps_k if isinstance(config, TileConfig) else config.wgs_k
            way = (kind, config.family, config.cluster, groups > 1, config.block_m >= 128)
            found.setdefault(way, (kind, config))
    return list(found.values())


def plans(device: driver.DeviceInfo) -> Iterator[Plan]:
    """Every chosen configuration at every M, on two tiles along N and a cut K; dtypes and group sizes take turns."""
    for i, (kind, config) in enumerate(chosen(device)):
        group_size, dtype = GROUP_SIZES[i % len(GROUP_SIZES)], DTYPES[i // 2 % 2]
        k = 2 * config.block_k + max(group_size, 64)
        for m in ALL_M:
            problem = Problem(m, config.block_n + 8, k, group_size, dtype, kind)
            if why_illegal(config, problem, device) is None:
                yield make_plan(problem, device, config)


def expanded(device: driver.DeviceInfo) -> Iterator[Plan]:
    """Every kernel that expands, on a weight of odd extents."""
    for variant in all_expand_variants():
        problem = Problem(256, 136, 5 * max(variant.group_size, 32), variant.group_size, variant.dtype, variant.kind)
        yield make_plan(problem, device, portable=True)._replace(expansion=expansion(problem, device))


def between(device: driver.DeviceInfo) -> Iterator[tuple[RowwisePlan, int]]:
    """Every kernel that works row by row, and a number of rows; the last threads of a row have nothing to do."""
    for early in dict.fromkeys((False, device.arch == (9, 0))):
        for dtype in DTYPES:
            for op, rows, width in _ROWS:
                yield make_rowwise_plan(op, rows, width, dtype, device, early=early), rows


class _Memory:
    """Device memory of the current context, a driver allocation for each tensor."""

    def __init__(self) -> None:
        self._library, self._held = driver.libcuda(), list[ctypes.c_uint64]()

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        assert code == 0, f"{name}: {driver.error_name(code)}"

    def put(self, data: bytes) -> int:
        """A copy of data on the device; returns its address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(len(data), 16)))
        self._call("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(len(data)))
        self._held.append(address)
        return address.value

    def get(self, address: int, size: int) -> bytearray:
        """The bytes there, after all work before."""
        data = bytearray(size)
        target = (ctypes.c_char * size).from_buffer(data)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(size))
        return data

    def free(self) -> None:
        while self._held:
            self._call("cuMemFree_v2", self._held.pop())


def _run(plan: Plan, memory: _Memory) -> None:
    """Two launches of a plan, whose tickets the first leaves for the second, and the check of their result."""
    import torch

    from marlin.formats.layouts import pack
    from marlin.testing import tolerance
    from marlin.testing.cases import random_act, random_weight

    problem = plan.problem
    m, n, k, group_size, kind = problem.m, problem.n, problem.k, problem.group_size, problem.kind
    dtype = getattr(torch, problem.dtype)
    weight, act = random_weight(n, k, group_size, kind, dtype=dtype), random_act(m, k, dtype=dtype)
    bias, packed = random_act(1, n, dtype=dtype, seed=3)[0], pack(weight)

    def put(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else memory.put(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    out, zeros = memory.put(b"\xff" * (2 * m * n)), memory.put(bytes(4 * plan.num_tickets))
    operands = {"act": act, "codes": packed.codes, "meta": packed.meta, "scales": packed.scales, "bias": bias}
    pointers = {key: put(tensor) for key, tensor in operands.items()}
    pointers["workspace"] = memory.put(b"\xff" * plan.workspace_bytes)
    for _ in range(2):
        launch(plan, **pointers, out=out, tickets=zeros, lda=k, stream=0)
    driver.synchronize(plan.device.index)
    result = torch.frombuffer(memory.get(out, 2 * m * n), dtype=dtype).view(m, n)
    tolerance.check(result, act, weight, bias, name=f"{plan.variant.entry} M={m} N={n} K={k}")
    memory.free()


def _expand(plan: Plan, memory: _Memory) -> None:
    """The second slab of two, and the check of its rows."""
    import torch

    from marlin.formats.layouts import pack
    from marlin.testing.cases import random_weight

    problem, slab = plan.problem, Slab(64, plan.problem.n - 64)
    dtype = getattr(torch, problem.dtype)
    weight = random_weight(problem.n, problem.k, problem.group_size, problem.kind, dtype=dtype)
    packed = pack(weight)
    tensors = {"codes": packed.codes, "meta": packed.meta, "scales": packed.scales}
    pointers = {
        key: 0 if tensor is None else memory.put(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for key, tensor in tensors.items()
    }
    size = 2 * slab.rows * problem.k
    out = memory.put(b"\xff" * size)
    expand(plan, slab, **pointers, out=out, stream=0)
    driver.synchronize(plan.device.index)
    found = torch.frombuffer(memory.get(out, size), dtype=dtype).view(slab.rows, problem.k)
    assert torch.equal(found, weight.to_dense(dtype)[slab.first :]), plan.runs
    memory.free()


def _row_by_row(plan: RowwisePlan, rows: int, memory: _Memory) -> None:
    """One launch on rows with a stride wider than they are, and a check of its results.

    Why a wide bound: tests/gpu/test_rowwise_gpu.py holds the numbers; here a wrong address must show.
    """
    import torch

    from marlin.testing.cases import random_act

    op, width, dtype = plan.variant.kind, plan.width, getattr(torch, plan.variant.dtype)
    wide, eps, kernel = width * (2 if op == "silu_and_mul" else 1), 1e-5, rowwise_kernel(plan.variant, 0)
    values = [random_act(rows, wide, dtype=dtype, seed=seed) for seed in (0, 1)]
    weight, results = random_act(1, width, dtype=dtype, seed=2)[0], 2 if op == "fused_add_rms_norm" else 1

    def put(tensor: torch.Tensor) -> int:
        return memory.put(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    size, strided = 2 * rows * width, [torch.nn.functional.pad(each, (0, 8)) for each in values]
    outs = [memory.put(b"\xff" * size) for _ in range(results)]
    if op == "silu_and_mul":
        plan.silu_and_mul(kernel, put(strided[0]), outs[0], wide + 8, 0)
        wanted: tuple[torch.Tensor, ...] = (torch.ops.marlin.silu_and_mul(values[0]),)
    elif op == "rms_norm":
        plan.norm(kernel, (put(strided[0]), 0, put(weight), outs[0], 0), (wide + 8, 0), eps, 0)
        wanted = (torch.ops.marlin.rms_norm(values[0], weight, eps),)
    else:
        pointers = (*map(put, strided), put(weight), *outs)
        plan.norm(kernel, pointers, (wide + 8, wide + 8), eps, 0)
        wanted = torch.ops.marlin.fused_add_rms_norm(*values, weight, eps)
    driver.synchronize(0)
    for out, each in zip(outs, wanted, strict=True):
        found = torch.frombuffer(memory.get(out, size), dtype=dtype).view(rows, width)
        torch.testing.assert_close(found, each, rtol=2.0**-6, atol=1e-3)
    memory.free()


def child() -> int:
    """What runs under the tool."""
    import torch

    torch.set_num_threads(1)
    count, device = 0, driver.device_info(0)
    with driver._current(driver.primary_context(0)):
        memory = _Memory()
        for plan in plans(device):
            _run(plan, memory)
            count += 2
        for plan in expanded(device):
            _expand(plan, memory)
            count += 1
        for row_plan, rows in between(device):
            _row_by_row(row_plan, rows, memory)
            count += 1
    print(f"{count} {_LAUNCHED}", flush=True)
    return 0


def find_tool() -> str | None:
    """compute-sanitizer: COMPUTE_SANITIZER, PATH, a toolkit, or the wheel nvidia-cuda-sanitizer-api."""
    named = os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer")
    if named:
        return named
    roots = [pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *pathlib.Path("/usr/local").glob("cuda-*")]
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        roots += pathlib.Path(location).glob("*")
    for root in roots:
        # Why the folder first: what lies in bin may be a script without the parts that it needs.
        for path in (root / "compute-sanitizer" / "compute-sanitizer", root / "bin" / "compute-sanitizer"):
            if os.access(path, os.X_OK):
                return str(path)
    return None


def check(tool: str, program: str, seconds: float, folder: pathlib.Path) -> Outcome:
    """One tool over the child; its whole output goes to folder."""
    line = [program, "--tool", tool, "--kernel-name", "kernel_substring=sm", "--print-limit", "40"]
    line += ["--target-processes", "application-only", *_OPTIONS[tool], sys.executable, __file__, "--child"]
    began, log = time.monotonic(), folder / f"sanitize-{tool}.log"
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Outcome(tool, "did not run", time.monotonic() - began, f"cut off after {seconds:.0f} s, see {log}")
    return judge(tool, log.read_text(errors="replace"), time.monotonic() - began)


def judge(tool: str, text: str, seconds: float) -> Outcome:
    """What a tool's output says. No summary, or a child that did not come to its end, is no run."""
    summary = _SUMMARY.findall(text)
    if not summary:
        last = (text.strip().splitlines() or ["no output"])[-1]
        return Outcome(tool, "did not run", seconds, last)
    found = sum(int(match[1]) for match in map(_FOUND.search, summary) if match)
    words = summary[-1].removeprefix("========= ")
    if found:
        return Outcome(tool, "found", seconds, words)
    done = re.search(rf"^\d+ {_LAUNCHED}$", text, re.MULTILINE)
    return (
        Outcome(tool, "clean", seconds, f"{words}; {done[0]}") if done else Outcome(tool, "did not run", seconds, words)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 or 2 as above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--child", action="store_true", help="launch the kernels, without a tool")
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which a tool is cut off")
    args = parser.parse_args(argv)
    if args.child:
        return child()
    program = find_tool()
    if program is None:
        print("compute-sanitizer: absent. Install the CUDA toolkit, or pip install nvidia-cuda-sanitizer-api.")
        return 2
    if not driver.device_count():
        print("sanitize: a CUDA GPU is needed; got none. Run `marlin doctor`.")
        return 2
    device = driver.device_info(0)
    variants = [*dict.fromkeys(plan.variant for plan in plans(device)), *all_expand_variants()]
    variants += dict.fromkeys(plan.variant for plan, _ in between(device))
    began = time.monotonic()
    rows = build_all(variants, [compiler.arch_for(device.arch)])
    print(f"{program}\n{device.name}: {len(rows)} kernels compiled in {time.monotonic() - began:.0f} s", flush=True)
    folder = pathlib.Path(os.environ.get("OUT") or "build/gpu")
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for tool in args.tools.split(","):
        outcomes.append(check(tool, program, args.seconds, folder))
        print("{:<10} {:<12} {:6.1f} s  {}".format(*outcomes[-1]), flush=True)
    states = {outcome.status for outcome in outcomes}
    return 1 if "found" in states else 2 if "did not run" in states else 0


if __name__ == "__main__":
    sys.exit(main())
