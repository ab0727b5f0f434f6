"""Compile every kernel for this machine's GPU: `python -m benchmarks.kernels [--archs 80,90]`.

Owns nothing but a table: `marlin.runtime.build` compiles, fills the cache and judges.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from marlin.runtime import build, catalog, compiler, driver


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 1 where a kernel does not compile, spills or needs a stack."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--archs", help="comma-separated, default: that of GPU 0")
    parser.add_argument("--only", default="", help="kernels whose entry contains this")
    parser.add_argument("--jobs", type=int, help="processes, default one for each CPU")
    args = parser.parse_args(argv)
    archs = args.archs.split(",") if args.archs else [compiler.arch_for(driver.device_info(0).arch)]
    variants = [variant for variant in catalog.all_kernels() if args.only in variant.entry]
    began = time.monotonic()
    rows = build.build_all(variants, archs, args.jobs)
    bad = [row for row in rows if row.problems]
    for row in bad:
        print(f"{row.entry} sm_{row.arch}: {'; '.join(row.problems)}")
    registers = [row.registers for row in rows if row.registers is not None]
    most = f", at most {max(registers)} registers" if registers else ""
    seconds = time.monotonic() - began
    print(f"{len(rows)} kernels for {', '.join(f'sm_{arch}' for arch in archs)}: {len(bad)} bad{most}, {seconds:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
