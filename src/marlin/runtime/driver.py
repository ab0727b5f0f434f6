"""The CUDA driver: its library, which GPU this is, whose context is current, and its errors in words.

Nothing is loaded before the first call. What is done with a kernel belongs to `loaded`.

Why ctypes and not the bindings: entry points of libcuda are the same under CUDA 12 and 13, where the bindings' return
values differ. Source: CUDA Driver API reference.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from marlin.errors import LaunchError, UnsupportedError, message, require

# CUdevice_attribute
_CLOCK_RATE_KHZ, _MULTIPROCESSORS, _MEMORY_CLOCK_KHZ, _BUS_WIDTH_BITS, _L2_BYTES = 13, 16, 36, 37, 38
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _SMEM_OPTIN_BYTES = 75, 76, 97
_CAPTURE_MODE_RELAXED = 2
_CAPTURE_ACTIVE = 1
# CUresult: errors left by an earlier kernel.
_EARLIER_ERRORS = (700, 702, 714, 715, 716, 717, 718, 719)
_NO_DEVICE, _NOT_INITIALIZED = 100, 3
# Bytes per second of GPUs whose driver reports no memory clock, by name; then the least of the architecture.
_BANDWIDTH_BY_NAME = {"H200": 4.8e12, "H100": 3.35e12, "A100": 1.55e12, "L40": 8.6e11, "L4": 3.0e11, "A10": 6.0e11}
_BANDWIDTH_BY_MAJOR = {8: 3.0e11, 9: 2.0e12, 10: 6.0e12, 12: 4.5e11}
_DRIVER_FIX = "Install or repair the NVIDIA driver (nvidia-smi must work); without a GPU the CPU implementation runs."
_thread = threading.local()  # memory of this thread's `current_capture_id`


@dataclass(frozen=True)
class DeviceInfo:
    """What planning needs to know of a GPU. index: as torch counts them; arch: the compute capability."""

    index: int
    name: str
    arch: tuple[int, int]
    num_sms: int
    smem_optin_bytes: int
    l2_bytes: int
    sm_clock_khz: int
    memory_bytes_per_s: float


@lru_cache(maxsize=1)
def _open() -> Any:
    """libcuda, not initialized. Raises: UnsupportedError."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        got = f"no libcuda.so.1 ({error})"
        raise UnsupportedError(message("driver", "an NVIDIA driver must be installed", got, _DRIVER_FIX)) from error
    try:
        library.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4
        library.cuStreamGetCaptureInfo_v2.argtypes = (ctypes.c_void_p,) * 6
    except AttributeError as error:
        got = f"one without {error.name or error}"
        raise UnsupportedError(message("driver", "the driver must support CUDA 12", got, _DRIVER_FIX)) from error
    return library


@lru_cache(maxsize=1)
def libcuda() -> Any:
    """libcuda, initialized. Raises: UnsupportedError."""
    library = _open()
    code = library.cuInit(0)
    if code:
        fix = _DRIVER_FIX
        if code == _NO_DEVICE:
            fix = "Check CUDA_VISIBLE_DEVICES and, in a container, that the GPU is passed in."
        elif code == _NOT_INITIALIZED:
            fix = "CUDA does not survive a fork: start worker processes by spawn."
        got = error_name(code)
        raise UnsupportedError(message("driver", "the NVIDIA driver must find a GPU", got, fix))
    return library


def error_name(code: int) -> str:
    """Such as "CUDA_ERROR_INVALID_VALUE (invalid argument)"."""
    words = []
    for function in (_open().cuGetErrorName, _open().cuGetErrorString):
        text = ctypes.c_char_p()
        if function(code, ctypes.byref(text)) == 0 and text.value:
            words.append(text.value.decode(errors="replace"))
    return f"{words[0]} ({words[1]})" if len(words) == 2 else f"CUDA error {code}"


def check(code: int, op: str, requirement: str, fix: str = "") -> None:
    if code:
        raise LaunchError(message(op, requirement, error_name(code), fix or way_out(code)))


def way_out(code: int) -> str:
    if code in _EARLIER_ERRORS:
        return "An earlier kernel on this GPU failed; run with CUDA_LAUNCH_BLOCKING=1 to see which."
    if code == 2:
        return "Free GPU memory."
    return "marlin doctor checks driver, compiler and GPU."


def driver_version() -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA that the installed driver supports; None without a driver."""
    version = ctypes.c_int()
    try:
        code = _open().cuDriverGetVersion(ctypes.byref(version))
    except UnsupportedError:
        return None
    return (version.value // 1000, version.value % 1000 // 10) if code == 0 and version.value else None


def device_count() -> int:
    """GPUs that this process can see; 0 without a driver. Respects CUDA_VISIBLE_DEVICES."""
    count = ctypes.c_int()
    try:
        code = libcuda().cuDeviceGetCount(ctypes.byref(count))
    except UnsupportedError:
        return 0
    return count.value if code == 0 else 0


def _bandwidth(name: str, arch: tuple[int, int], clock_khz: int, bus_bits: int) -> float:
    """Bytes per second of the memory: two transfers a clock over the bus, or from the tables."""
    if clock_khz > 0 and bus_bits > 0:
        return 2.0 * clock_khz * 1e3 * bus_bits / 8
    words = re.split(r"[^A-Za-z0-9]+", name)
    for key, value in _BANDWIDTH_BY_NAME.items():
        if any(word == key or re.fullmatch(rf"{key}[A-Z]+", word) for word in words):
            return value
    return _BANDWIDTH_BY_MAJOR.get(arch[0], 3.0e11)


@cache
def device_info(index: int) -> DeviceInfo:
    """Describe a GPU. Raises: UnsupportedError (no driver, no GPU), ValueError (no such index)."""
    library = libcuda()
    count = device_count()
    require(0 <= index < count, "device_info", f"index must be below the number of GPUs, {count}", f"index={index}")
    device = ctypes.c_int()
    check(library.cuDeviceGet(ctypes.byref(device), index), "device_info", f"GPU {index} must answer")
    buffer = ctypes.create_string_buffer(256)
    check(library.cuDeviceGetName(buffer, len(buffer), device), "device_info", f"GPU {index} must answer")

    def attribute(code: int) -> int:
        value = ctypes.c_int()
        failed = library.cuDeviceGetAttribute(ctypes.byref(value), code, device)
        return 0 if failed else value.value

    name = buffer.value.decode(errors="replace")
    arch = (attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR))
    return DeviceInfo(
        index=index,
        name=name,
        arch=arch,
        num_sms=attribute(_MULTIPROCESSORS),
        smem_optin_bytes=attribute(_SMEM_OPTIN_BYTES),
        l2_bytes=attribute(_L2_BYTES),
        sm_clock_khz=attribute(_CLOCK_RATE_KHZ),
        memory_bytes_per_s=_bandwidth(name, arch, attribute(_MEMORY_CLOCK_KHZ), attribute(_BUS_WIDTH_BITS)),
    )


@cache
def primary_context(index: int) -> int:
    """Handle of the context that torch uses too; kept for the life of the process."""
    library = libcuda()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    check(library.cuDeviceGet(ctypes.byref(device), index), "load_kernel", f"GPU {index} must exist")
    code = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    check(code, "load_kernel", f"GPU {index} must give a context")
    return context.value or 0


@contextmanager
def within(context: int) -> Iterator[None]:
    """Make a context current and put the caller's back, so that torch's current device stays what it was."""
    library, before = libcuda(), ctypes.c_void_p()
    check(library.cuCtxGetCurrent(ctypes.byref(before)), "driver", "the current context must be known")
    if before.value == context:
        yield
        return
    check(library.cuCtxSetCurrent(ctypes.c_void_p(context)), "driver", "the GPU's context must be usable")
    try:
        yield
    finally:
        if before.value:  # a thread that had none keeps this one, as after any first call of the CUDA runtime
            library.cuCtxSetCurrent(before)


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Allow what a stream capture forbids by default (loading code), for this thread only."""
    library, mode = libcuda(), ctypes.c_int(_CAPTURE_MODE_RELAXED)
    switched = library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
    try:
        yield
    finally:
        if switched:
            library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def synchronize(device_index: int) -> None:
    """Wait for all work of a GPU. Raises: LaunchError (an error that a kernel left)."""
    with within(primary_context(device_index)):
        check(libcuda().cuCtxSynchronize(), "synchronize", f"the work on GPU {device_index} must succeed")


def current_capture_id(stream: int) -> int:
    """Number of the capture that the stream is part of, unique in the process; 0 when it is not capturing."""
    try:
        query, status, number, status_ref, number_ref = _thread.capture
    except AttributeError:
        status, number = ctypes.c_int(), ctypes.c_uint64()
        query, status_ref, number_ref = libcuda().cuStreamGetCaptureInfo_v2, ctypes.byref(status), ctypes.byref(number)
        _thread.capture = (query, status, number, status_ref, number_ref)
    code = query(stream, status_ref, number_ref, None, None, None)
    return int(number.value) if code == 0 and status.value == _CAPTURE_ACTIVE else 0
