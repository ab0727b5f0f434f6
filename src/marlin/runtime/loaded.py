"""A kernel on one GPU: from machine code to launches, once or again and again.

Owns what the driver is handed: the image, the function's attributes, and the launch path, which every call of every
layer takes. Knows pointers and ints, never tensors, and nothing of what a kernel computes.

Why ctypes and not the bindings' launch: arguments are packed by one `struct` call into memory that each thread keeps,
so that a call allocates next to nothing. Source: CUDA Driver API reference.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from marlin.errors import LaunchError, UnsupportedError, message, require
from marlin.runtime.driver import (
    check,
    device_info,
    driver_version,
    error_name,
    libcuda,
    primary_context,
    relaxed_capture,
    way_out,
    within,
)

_MAX_DYNAMIC_SMEM, _PREFERRED_CARVEOUT = 8, 9  # CUfunction_attribute
# CUlaunchAttribute (id, padding, 64-byte value): programmatic stream serialization, allowed.
_PDL_ATTRIBUTE = struct.pack("@IIi60x", 6, 0, 1)
# The same: cluster dimension; blocks of a cluster spread over multiprocessors.
_CLUSTER_ATTRIBUTES = struct.Struct("@IIIII52xIII60x")
# CUlaunchConfig: grid, block, dynamic shared memory, stream, attributes, their number.
_CONFIG = struct.Struct("@7IPPI")
_ARGUMENT_TYPES = {"P": "P", "i": "i", "l": "q", "f": "f", "T": "128s"}
# CUresult: refusals of an image, which an image newer than the driver also gets.
_IMAGE_ERRORS = (200, 209, 218, 222, 300, 801)
_TOOLKIT = re.compile(rb"Cuda compilation tools, release (\d+)\.(\d+)")


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
    library, context = libcuda(), primary_context(device_index)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with within(context), relaxed_capture():
        code = library.cuModuleLoadData(ctypes.byref(module), cubin)
        if code in _IMAGE_ERRORS:
            raise _refused_image(code, cubin, entry, device_index)
        check(code, f"load_kernel[{entry}]", f"GPU {device_index} must load the kernel")
        code = library.cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
        check(code, f"load_kernel[{entry}]", "the machine code must define the kernel")
        # Why always: what a block gets without asking counts the kernel's static memory too.
        code = library.cuFuncSetAttribute(function, _MAX_DYNAMIC_SMEM, smem_bytes)
        check(code, f"load_kernel[{entry}]", f"GPU {device_index} must grant {smem_bytes} bytes of shared memory")
        if most_smem:
            code = library.cuFuncSetAttribute(function, _PREFERRED_CARVEOUT, 100)
            check(code, f"load_kernel[{entry}]", f"GPU {device_index} must take the carve-out")
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


class _Frame(NamedTuple):
    """Memory of a launch: arguments, configuration, attributes, where each argument lies; and their addresses."""

    values: Any
    config: Any
    attributes: Any
    places: Any
    config_at: int
    attributes_at: int
    places_at: int


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

    def _new_frame(self) -> _Frame:
        values = ctypes.create_string_buffer(max(self._layout.size, 1))
        config = ctypes.create_string_buffer(_CONFIG.size)
        attributes = ctypes.create_string_buffer(_PDL_ATTRIBUTE, len(_PDL_ATTRIBUTE) + _CLUSTER_ATTRIBUTES.size)
        base, types = ctypes.addressof(values), [_ARGUMENT_TYPES[code] for code in self.signature]
        offsets = [struct.calcsize("@" + "".join(types[: i + 1])) - struct.calcsize(t) for i, t in enumerate(types)]
        places = (ctypes.c_void_p * max(len(types), 1))(*(base + offset for offset in offsets))
        at = ctypes.addressof
        return _Frame(values, config, attributes, places, at(config), at(attributes), at(places))

    def _pack(
        self,
        frame: _Frame,
        grid: tuple[int, int, int],
        threads: int,
        stream: int,
        args: tuple[Any, ...],
        pdl: bool = False,
        cluster: int = 1,
        smem_bytes: int = 0,
    ) -> None:
        """Write a launch into a frame. Raises: LaunchError."""
        values, config, attributes, _, _, attribute, _ = frame
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

    def _is_current(self) -> bool:
        """Whether the kernel's context is that of the calling thread."""
        try:
            current, reference, get_current = self._local.current
        except AttributeError:
            current = ctypes.c_void_p()
            reference, get_current = ctypes.byref(current), libcuda().cuCtxGetCurrent
            self._local.current = current, reference, get_current
        get_current(reference)
        return bool(current.value == self._context)

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
            frame = self._local.frame = self._new_frame()
        self._pack(frame, grid, threads, stream, args, pdl, cluster, smem_bytes)
        work = libcuda().cuLaunchKernelEx
        if self._is_current():
            code = work(frame.config_at, self._function, frame.places_at, None)
        else:
            with within(self._context):
                code = work(frame.config_at, self._function, frame.places_at, None)
        if code:
            raise self._refused(code, grid, threads)

    def freeze(self, *launch: Any, **options: Any) -> Callable[[], bool]:
        """The same `launch`, of these arguments, again and again, packed once: what is returned does it.

        It returns whether it did: not where another context is current, nor where the driver refuses; `launch` then
        does it, or says why not. Raises: LaunchError (arguments that do not fit the signature).
        """
        frame, is_current = self._new_frame(), self._is_current
        self._pack(frame, *launch, **options)
        work = functools.partial(libcuda().cuLaunchKernelEx, frame.config_at, self._function, frame.places_at, None)

        def again() -> bool:
            return is_current() and not work()

        again.memory = frame  # type: ignore[attr-defined]  # what the addresses point to
        return again

    def _refused(self, code: int, grid: tuple[int, int, int], threads: int) -> LaunchError:
        got = f"{error_name(code)} for grid {grid}, {threads} threads, {self.smem_bytes} bytes of shared memory"
        requirement = f"GPU {self.device_index} must accept the launch"
        return LaunchError(message(f"launch[{self.entry}]", requirement, got, way_out(code)))

    def _bad_arguments(
        self, args: tuple[Any, ...], grid: tuple[int, int, int], threads: int, stream: int, error: Exception
    ) -> LaunchError:
        requirement = f"arguments must fit the signature {self.signature!r}"
        got = f"{len(args)} arguments {args}, grid {grid}, {threads} threads, stream {stream} ({error})"
        return LaunchError(message(f"launch[{self.entry}]", requirement, got))
