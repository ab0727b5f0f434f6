"""GPUs that a choice of kernel can be explained for where they are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from marlin.errors import message

if TYPE_CHECKING:
    from marlin.runtime.driver import DeviceInfo

# Data sheets and CUDA device properties of GPUs that `explain` can be asked about where they are not:
# name, capability, SMs, shared memory a block (bytes), L2 (bytes), boost clock (kHz), memory (bytes/s).
GPUS: dict[str, tuple[str, tuple[int, int], int, int, int, int, float]] = {
    "h100": ("NVIDIA H100 SXM", (9, 0), 132, 232448, 50 << 20, 1980000, 3.35e12),
    "a100": ("NVIDIA A100 80GB SXM", (8, 0), 108, 166912, 40 << 20, 1410000, 2.039e12),
    "rtx4090": ("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376, 72 << 20, 2520000, 1.008e12),
    "rtx3090": ("NVIDIA GeForce RTX 3090", (8, 6), 82, 101376, 6 << 20, 1695000, 0.936e12),
}


def gpu_here_or(gpu: str | None) -> DeviceInfo:
    """The GPU asked for by name, else the first one here, else an H100. Raises: ValueError (unknown name)."""
    from marlin.runtime import driver

    if gpu is None and driver.device_count():
        return driver.device_info(0)
    key = (gpu or "h100").lower()
    if key not in GPUS:
        raise ValueError(message("marlin", f"--gpu must be one of {', '.join(GPUS)}", repr(gpu)))
    return driver.DeviceInfo(0, *GPUS[key])
