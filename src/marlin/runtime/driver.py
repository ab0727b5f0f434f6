"""The CUDA driver: which GPU this is, loading machine code, launching it on a stream.

Owns contexts, attributes, errors of the driver in words, and the launch path, which every call of every layer takes.
Knows pointers and ints, never tensors, and nothing of what a kernel computes. Nothing is loaded before the first call.

Why ctypes and not the bindings' launch: the arguments of a launch are packed by one `struct` call into memory that each
thread keeps, so that a call allocates next to nothing; and entry points of libcuda are the same under CUDA 12 and 13,
where the bindings' return values differ. Source: CUDA Driver API reference.
"""

from __future__ import annotations

import ctypes
import re
import struct
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
_MAX_DYNAMIC_SMEM, _PREFERRED_CARVEOUT = 8, 9  # CUfunction_attribute
_CAPTURE_MODE_RELAXED = 2
_CAPTURE_ACTIVE = 1
# CUlaunchAttribute (id, padding, 64-byte value): programmatic stream serialization, allowed.
_PDL_ATTRIBUTE = struct.pack("@IIi60x", 6, 0, 1)
# The same: cluster dimension; blocks of a cluster spread over multiprocessors.
_CLUSTER_ATTRIBUTES = struct.Struct("@IIIII52xIII60x")
# CUlaunchConfig: grid, block, dynamic shared memory, stream, attributes, their number.
_CONFIG = struct.Struct("@7IPPI")
_ARGUMENT_TYPES = {"P": "P", "i": "i", "l": "q", "f": "f", "T": "128s"}
# CUresult: refusals of an image, which an image newer than the driver also gets; errors left by an earlier kernel.
_IMAGE_ERRORS = (200, 209, 218, 222, 300, 801)
_EARLIER_ERRORS = (700, 702, 714, 715, 716, 717, 718, 719)
_NO_DEVICE, _NOT_INITIALIZED = 100, 3
# Bytes per second of GPUs whose driver reports no memory clock, by name; then the least of the architecture.
_BANDWIDTH_BY_NAME = {"H200": 4.8e12, "H100": 3.35e12, "A100": 1.55e12, "L40": 8.6e11, "L4": 3.0e11, "A10": 6.0e11}
_BANDWIDTH_BY_MAJOR = {8: 3.0e11, 9: 2.0e12, 10: 6.0e12, 12: 4.5e11}
_DRIVER_FIX = "Install or repair the NVIDIA driver (nvidia-smi must work); without a GPU the CPU implementation runs."
_thread = threading.local()  # memory of this thread's `current_capture_id`
_TOOLKIT = re.compile(rb"Cuda compilation tools, release (\d+)\.(\d+)")


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


def _check(code: int, op: str, requirement: str, fix: str = "") -> None:
    if code:
        raise LaunchError(message(op, requirement, error_name(code), fix or _fix(code)))


def _fix(code: int) -> str:
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
    _check(library.cuDeviceGet(ctypes.byref(device), index), "device_info", f"GPU {index} must answer")
    buffer = ctypes.create_string_buffer(256)
    _check(library.cuDeviceGetName(buffer, len(buffer), device), "device_info", f"GPU {index} must answer")

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
def _primary_context(index: int) -> int:
    """Handle of the context that torch uses too; kept for the life of the process."""
    library = libcuda()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(library.cuDeviceGet(ctypes.byref(device), index), "load_kernel", f"GPU {index} must exist")
    code = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    _check(code, "load_kernel", f"GPU {index} must give a context")
    return context.value or 0


@contextmanager
def _current(context: int) -> Iterator[None]:
    """Make a context current and put the caller's back, so that torch's current device stays what it was."""
    library, before = libcuda(), ctypes.c_void_p()
    _check(library.cuCtxGetCurrent(ctypes.byref(before)), "driver", "the current context must be known")
    if before.value == context:
        yield
        return
    _check(library.cuCtxSetCurrent(ctypes.c_void_p(context)), "driver", "the GPU's context must be usable")
    try:
        yield
    finally:
        if before.value:  # a thread that had none keeps this one, as after any first call of the CUDA runtime
            library.cuCtxSetCurrent(before)


@contextmanager
def _relaxed_capture() -> Iterator[None]:
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
    with _current(_primary_context(device_index)):
        _check(libcuda().cuCtxSynchronize(), "synchronize", f"the work on GPU {device_index} must succeed")


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


def toolkit_version(cubin: bytes) -> tuple[int, int] | None:
    """(major, minor) of the toolkit that made the machine code; None where it does not say."""
    match = _TOOLKIT.search(cubin)
    return (int(match[1]), int(match[2])) if match else None


def load_kernel(
    cubin: bytes, entry: str, *, device_index: int, smem_bytes: int, signature: str, most_smem: bool = False
) -> Kernel:
    """Load machine code on a GPU and find a kernel in it; allowed during a stream capture.

    entry: the extern "C" symbol; smem_bytes: dynamic shared memory of a launch, at most; signature: one character per
    argument, "P" pointer, "i" int32, "l" int64, "f" float32, "T" tensor map. most_smem: give the kernel's
    multiprocessors all the shared memory that they have.
    Raises: UnsupportedError (made by a newer toolkit than the driver takes, or for another GPU), LaunchError (the
    driver's word), ValueError (signature).
    """
    unknown = sorted(set(signature) - set(_ARGUMENT_TYPES))
    require(not unknown, "load_kernel", "signature may hold P, i, l, f and T", "".join(unknown))
    library, context = libcuda(), _primary_context(device_index)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with _current(context), _relaxed_capture():
        code = library.cuModuleLoadData(ctypes.byref(module), cubin)
        if code in _IMAGE_ERRORS:
            raise _refused_image(code, cubin, entry, device_index)
        _check(code, f"load_kernel[{entry}]", f"GPU {device_index} must load the kernel")
        code = library.cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
        _check(code, f"load_kernel[{entry}]", "the machine code must define the kernel")
        # Why always: what a block gets without asking counts the kernel's static memory too.
        code = library.cuFuncSetAttribute(function, _MAX_DYNAMIC_SMEM, smem_bytes)
        _check(code, f"load_kernel[{entry}]", f"GPU {device_index} must grant {smem_bytes} bytes of shared memory")
        if most_smem:
            code = library.cuFuncSetAttribute(function, _PREFERRED_CARVEOUT, 100)
            _check(code, f"load_kernel[{entry}]", f"GPU {device_index} must take the carve-out")
    return Kernel(entry, function.value or 0, context, device_index, smem_bytes, signature)


def _refused_image(code: int, cubin: bytes, entry: str, device_index: int) -> UnsupportedError:
    toolkit, driver, device = toolkit_version(cubin), driver_version() or (0, 0), device_info(device_index)
    if toolkit is None:
        from marlin.runtime import compiler

        toolkit = compiler.nvrtc_version()
    got = f"{error_name(code)} from driver CUDA {driver[0]}.{driver[1]} for code of CUDA {toolkit[0]}.{toolkit[1]}"
    extra, package = ("cuda12", "nvidia-cuda-nvrtc-cu12") if driver[0] == 12 else ("cuda", "nvidia-cuda-nvrtc")
    fix = (
        "Update the driver, or install the compiler of its version: "
        f"pip install 'sparse-marlin[{extra}]' '{package}=={driver[0]}.{driver[1]}.*'."
    )
    if toolkit <= driver:
        fix = (
            f"{device.name} runs code for compute capability {device.arch[0]}.{device.arch[1]} only: compile for that."
        )
    return UnsupportedError(message(f"load_kernel[{entry}]", "the driver must take the machine code", got, fix))


class Kernel:
    """A kernel on one GPU, ready to launch from any thread. Made by `load_kernel`."""

    __slots__ = ("_context", "_function", "_layout", "_local", "device_index", "entry", "signature", "smem_bytes")

    def __init__(
        self, entry: str, function: int, context: int, device_index: int, smem_bytes: int, signature: str
    ) -> None:
        self.entry, self.device_index, self.smem_bytes, self.signature = entry, device_index, smem_bytes, signature
        self._function, self._context = function, context
        # Native alignment places every argument where a C struct would.
        self._layout = struct.Struct("@" + "".join(_ARGUMENT_TYPES[code] for code in signature))
        self._local = threading.local()

    def _new_frame(self) -> tuple[Any, ...]:
        """Memory of this thread's launches: values and their addresses, config, current context."""
        values = ctypes.create_string_buffer(max(self._layout.size, 1))
        config = ctypes.create_string_buffer(_CONFIG.size)
        attribute = ctypes.create_string_buffer(_PDL_ATTRIBUTE, len(_PDL_ATTRIBUTE) + _CLUSTER_ATTRIBUTES.size)
        base, types = ctypes.addressof(values), [_ARGUMENT_TYPES[code] for code in self.signature]
        offsets = [struct.calcsize("@" + "".join(types[: i + 1])) - struct.calcsize(t) for i, t in enumerate(types)]
        addresses = (ctypes.c_void_p * max(len(types), 1))(*(base + offset for offset in offsets))
        current, library = ctypes.c_void_p(), libcuda()
        self._local.frame = frame = (
            *(values, config, ctypes.addressof(config), ctypes.addressof(addresses)),
            *(attribute, ctypes.addressof(attribute)),
            *(current, ctypes.byref(current), library.cuCtxGetCurrent, library.cuLaunchKernelEx),
        )
        self._local.keep = addresses
        return frame

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        stream: int,
        args: tuple[Any, ...],
        *,
        pdl: bool = False,
        cluster: int = 1,
        smem_bytes: int = 0,
    ) -> None:
        """Put one launch on a stream (0: the default stream); legal during capture; does not wait.

        args: one value per character of the signature, pointers as ints. pdl: programmatic dependent launch, for a
        kernel that itself waits for its predecessor's results. cluster: blocks of a cluster, along x. smem_bytes: fewer
        bytes of shared memory than `load_kernel` was told; 0: as many.
        Raises: LaunchError (the driver's word, or arguments that do not fit the signature).
        """
        try:
            frame = self._local.frame
        except AttributeError:
            frame = self._new_frame()
        values, config, config_address, addresses, attributes, attribute, current, current_ref, get_current, launch = (
            frame
        )
        try:
            self._layout.pack_into(values, 0, *args)
            first, count = (attribute, 1) if pdl else (attribute + len(_PDL_ATTRIBUTE), 0)
            if cluster > 1:
                _CLUSTER_ATTRIBUTES.pack_into(attributes, len(_PDL_ATTRIBUTE), 4, 0, cluster, 1, 1, 5, 0, 1)
                count += 2
            _CONFIG.pack_into(
                config, 0, *grid, threads, 1, 1, smem_bytes or self.smem_bytes, stream, first if count else 0, count
            )
        except (struct.error, TypeError) as error:
            raise self._bad_arguments(args, grid, threads, stream, error) from error
        get_current(current_ref)
        if current.value == self._context:
            code = launch(config_address, self._function, addresses, None)
        else:
            with _current(self._context):
                code = launch(config_address, self._function, addresses, None)
        if code:
            raise self._refused(code, grid, threads)

    def _refused(self, code: int, grid: tuple[int, int, int], threads: int) -> LaunchError:
        got = f"{error_name(code)} for grid {grid}, {threads} threads, {self.smem_bytes} bytes of shared memory"
        requirement = f"GPU {self.device_index} must accept the launch"
        return LaunchError(message(f"launch[{self.entry}]", requirement, got, _fix(code)))

    def _bad_arguments(
        self, args: tuple[Any, ...], grid: tuple[int, int, int], threads: int, stream: int, error: Exception
    ) -> LaunchError:
        requirement = f"arguments must fit the signature {self.signature!r}"
        got = f"{len(args)} arguments {args}, grid {grid}, {threads} threads, stream {stream} ({error})"
        return LaunchError(message(f"launch[{self.entry}]", requirement, got))
