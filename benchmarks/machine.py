"""What ran a measurement: GPU, driver, versions, clocks, power.

Owns reading these facts; changes nothing on the machine. NVML where `nvidia-ml-py` is installed, else nvidia-smi.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# One reading: sm_mhz, memory_mhz, power_w, temperature_c, limits (names of what holds the clock down).
Reading = dict[str, Any]
_FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}
# Bits of NVML's clock event reasons that mean less than the clock asked for.
_LIMITS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature",
    0x40: "hardware temperature",
    0x80: "power brake",
}
_PEERS = {"gemlite": "gemlite", "humming": "humming-kernels"}


def slug(gpu: str) -> str:
    """File-name form of a GPU's name: `NVIDIA H100 80GB HBM3` to `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def has_gpu() -> bool:
    """Whether torch finds one."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The current GPU."""
    return torch.device("cuda", torch.cuda.current_device())


def _uuid() -> str:
    """Id of the current device; indices will not do, since CUDA_VISIBLE_DEVICES renumbers."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _smi(*fields: str) -> list[str]:
    command = ["nvidia-smi", f"--id={_uuid()}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
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


def peer_versions() -> dict[str, str]:
    """Versions of the other implementations that are installed."""
    found = {}
    for name, distribution in _PEERS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    cusparselt = getattr(torch.backends, "cusparselt", None)  # absent from torch 2.4
    if cusparselt is not None and cusparselt.is_available():
        found["cusparselt"] = str(cusparselt.version())
    return found


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


def _nvml_reader() -> Callable[[], Reading]:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid())

    def read() -> Reading:
        bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "limits": [name for bit, name in _LIMITS.items() if bits & bit],
        }

    read()
    return read


def _smi_reader() -> Callable[[], Reading]:
    def read() -> Reading:
        reading: Reading = {"limits": []}
        for name, text in zip(_FIELDS, _smi(*_FIELDS.values()), strict=True):
            if re.fullmatch(r"\d+(\.\d+)?", text):
                reading[name] = float(text)
        return reading

    return read


def reader() -> tuple[str, Callable[[], Reading]]:
    """("nvml" or "nvidia-smi", function that takes a reading of the current GPU)."""
    try:
        return "nvml", _nvml_reader()
    except Exception:
        # Why any error: NVML may be absent, older, or not allowed here; nvidia-smi says what it can.
        return "nvidia-smi", _smi_reader()


def summarize(source: str, readings: list[Reading]) -> dict[str, Any]:
    """Mean, lowest and highest of each quantity, and the share of readings in which something held the clock down."""
    found: dict[str, Any] = {"source": source, "samples": len(readings)}
    for name in _FIELDS:
        values = [float(reading[name]) for reading in readings if name in reading]
        mean = sum(values) / len(values) if values else None
        found[name] = None if mean is None else {"mean": round(mean, 1), "min": min(values), "max": max(values)}
    counts: dict[str, int] = {}
    for name in (limit for reading in readings for limit in reading["limits"]):
        counts[name] = counts.get(name, 0) + 1
    found["limited_by"] = {name: round(count / len(readings), 3) for name, count in counts.items()}
    return found


class Sampler:
    """Readings of the current GPU, taken by a thread every `interval_s` within a `with` block."""

    def __init__(self, source: tuple[str, Callable[[], Reading]], interval_s: float = 0.1) -> None:
        self._name, self._read = source
        self._interval_s, self._stop = interval_s, threading.Event()
        self._readings: list[Reading] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._readings.append(self._read())
            self._stop.wait(self._interval_s)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def summary(self) -> Mapping[str, Any]:
        """`summarize` of what was read."""
        return summarize(self._name, list(self._readings))


def wait_cool(seconds: float) -> None:
    """Leave the GPU idle for a moment, so that one measurement does not start on the heat of another."""
    time.sleep(seconds)
