"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu` (`make gpu`).

Owns the order of the steps and the closing table: compile the kernels, run the GPU tests, and, only when these pass,
measure ceilings, host time and GEMMs and print the tables. `--also decode,sustained` adds the longer measurements. Each
step is a process of its own with PYTHONPATH set, so the system's Python is enough. Where the environment variable OUT
names a folder, logs and records are copied there too.
Imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu"
RECORDS = ROOT / "benchmarks" / "records"
STEPS = ("compile", "tests", "ceilings", "host", "gemm", "decode", "sustained", "report")
# Run only when they are asked for: a minute, and about five.
EXTRA = ("decode", "sustained")
KINDS = ("gemm", "ceilings", "host", "decode", "sustained")
# Measuring a kernel that is wrong is a waste: these stop what follows.
_GATES = ("compile", "tests")


@dataclass(frozen=True)
class Result:
    """How a step went."""

    step: str
    status: str
    seconds: float
    detail: str


def environment() -> dict[str, str]:
    """This process's environment, with the checkout in front of PYTHONPATH and output unbuffered."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def command(step: str, args: argparse.Namespace) -> list[str]:
    """The process of a step."""
    python = [sys.executable, "-m"]
    if step == "tests":
        report = ["--require-gpu", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={LOGS / 'tests.xml'}"]
        return [*python, "pytest", "-m", "gpu", *report, *(args.tests or ["tests/gpu"])]
    if step == "gemm":
        quick = ["--quick"] if args.quick else []
        return [*python, "benchmarks.gemm", *quick, *args.gemm_args]
    return [*python, {"compile": "benchmarks.kernels"}.get(step, f"benchmarks.{step}")]


def run_logged(line: Sequence[str], log: pathlib.Path) -> tuple[int, str]:
    """Run with output to this terminal and to log; returns the exit status and the last line that says something."""
    log.parent.mkdir(parents=True, exist_ok=True)
    last = ""
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except OSError as error:
            return 127, str(error)
        assert process.stdout is not None
        for text in process.stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
            file.write(text)
            last = text.strip() or last
        return process.wait(), last


def count_tests(path: pathlib.Path) -> str | None:
    """`12 passed, 1 failed, 2 skipped` of a junit file, or None."""
    if not path.exists():
        return None
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped"


def run_step(step: str, args: argparse.Namespace) -> Result:
    """One step. No test collected counts as failed, for then nothing was checked."""
    print(f"\n== {step}", flush=True)
    began = time.monotonic()
    junit = LOGS / "tests.xml"
    if step == "tests":
        junit.unlink(missing_ok=True)
    code, last = run_logged(command(step, args), LOGS / f"{step}.log")
    detail = (count_tests(junit) if step == "tests" else None) or re.sub(r"\s+", " ", last)[:100]
    if step == "report" and not code:
        detail = f"tables in {(LOGS / 'report.log').relative_to(ROOT)}"
    return Result(step, "passed" if code == 0 else f"failed ({code})", time.monotonic() - began, detail)


def run_all(steps: Iterable[str], args: argparse.Namespace) -> list[Result]:
    """Steps in order; after a failed gate the rest is skipped."""
    results: list[Result] = []
    blocked = ""
    for step in steps:
        if blocked:
            results.append(Result(step, "skipped", 0.0, f"{blocked} failed"))
            continue
        results.append(run_step(step, args))
        if step in _GATES and results[-1].status != "passed" and not args.keep_going:
            blocked = step
    return results


def summary(results: Iterable[Result]) -> str:
    """The closing table."""
    return "\n".join(f"{r.step:<9} {r.status:<12} {r.seconds:7.1f} s  {r.detail}" for r in results)


def copy_out(folder: str | None) -> list[str]:
    """Records, test results and one joined log into folder, flat; returns the names."""
    if not folder:
        return []
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = [path for kind in KINDS for path in sorted(RECORDS.glob(f"{kind}-*.json"))]
    files += [path for path in (LOGS / "tests.xml",) if path.exists()]
    for path in files:
        shutil.copy2(path, target / path.name)
    logs = [path for path in (LOGS / f"{step}.log" for step in STEPS) if path.exists()]
    (target / "gpu.log").write_text("\n".join(f"== {path.stem}\n{path.read_text()}" for path in logs))
    return [path.name for path in files] + ["gpu.log"]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments; those after `--` go to benchmarks.gemm. Exits with 2 on a bad one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", help=f"comma-separated steps of {', '.join(STEPS)}")
    parser.add_argument("--skip", default="", help="comma-separated steps")
    parser.add_argument("--also", default="", help=f"comma-separated steps of {', '.join(EXTRA)}")
    parser.add_argument("--quick", action="store_true", help="few batch sizes, no record of GEMMs")
    parser.add_argument("--keep-going", action="store_true", help="measure even when a test fails")
    parser.add_argument("--tests", nargs="*", help="arguments of pytest in place of tests/gpu")
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.gemm_args = words[cut + 1 :]
    chosen = args.only.split(",") if args.only else [step for step in STEPS if step not in EXTRA]
    chosen = [*chosen, *filter(None, args.also.split(","))]
    unknown = [step for step in [*chosen, *filter(None, args.skip.split(","))] if step not in STEPS]
    if unknown:
        parser.error(f"steps must be of {', '.join(STEPS)}; got {', '.join(unknown)}")
    args.steps = [step for step in STEPS if step in chosen and step not in args.skip.split(",")]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0 when every step passed, else 1."""
    args = parse(argv)
    shutil.rmtree(LOGS, ignore_errors=True)
    results = run_all(args.steps, args)
    copied = copy_out(os.environ.get("OUT"))
    print(f"\n== summary\n{summary(results)}")
    if copied:
        print(f"copied: {', '.join(copied)}")
    return 0 if all(result.status == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
