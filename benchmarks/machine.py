"""What ran a measurement: GPU, driver, versions, clocks.

Owns reading these facts; changes nothing on the machine.
"""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from typing import Any

import torch


def slug(gpu: str) -> str:
    """File-name form of a GPU's name: `NVIDIA H100 80GB HBM3` to `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def _smi(*fields: str) -> list[str]:
    """Fields of the current device; by its id, since CUDA_VISIBLE_DEVICES renumbers."""
    device = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ["unknown"] * len(fields)
    return [part.strip() for part in text.strip().split(",")]


def clocks() -> dict[str, int | None]:
    """Clocks as they stand now, MHz; read while work is queued, or right after it."""
    names = ("sm_mhz", "memory_mhz", "sm_max_mhz")
    values = _smi("clocks.sm", "clocks.mem", "clocks.max.sm")
    return {name: int(value) if value.isdecimal() else None for name, value in zip(names, values, strict=True)}


def nvrtc_version() -> str | None:
    """Version of the run-time compiler, or None where there is none."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except Exception:
        # Why any error: an absent or broken compiler is a fact to record, not a fault of the benchmark.
        return None
    return f"{major}.{minor}"


def facts() -> dict[str, Any]:
    """GPU, driver, versions and date of this machine, in the form of a record."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _smi("driver_version")[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvrtc": nvrtc_version(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def l2_bytes() -> int:
    """Size of the level-2 cache of the current device."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
