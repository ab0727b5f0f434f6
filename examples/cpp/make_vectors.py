"""Writes a random INT4 product as raw files for main.cu: operands in packed order, float64 reference, bound."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from marlin.formats.layouts import pack
from marlin.testing import cases, oracle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("m", 16), ("n", 4096), ("k", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kind", choices=cases.KINDS, default="w4a16_sp24")
    args = parser.parse_args()
    weight = cases.random_weight(args.n, args.k, 128, args.kind, dtype=torch.float16)
    packed, act = pack(weight), cases.random_act(args.m, args.k)
    reference = oracle.linear(act, weight)
    dense = weight.to_dense(torch.float64)
    bound = 2.0**-11 * reference.abs() + 6 * 2.0**-12 * (act.double().square() @ dense.square().T).sqrt()
    meta = packed.codes[:0] if packed.meta is None else packed.meta
    files = {"act": act, "codes": packed.codes, "meta": meta, "scales": packed.scales}
    files |= {"reference": reference, "bound": bound}
    args.folder.mkdir(parents=True, exist_ok=True)
    np.array([args.m, args.n, args.k], dtype=np.int32).tofile(args.folder / "shape")
    for name, tensor in files.items():
        tensor.numpy().tofile(args.folder / name)


if __name__ == "__main__":
    main()
