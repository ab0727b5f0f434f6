"""From kernel text to a cubin: NVRTC, straight to machine code, with the resources that the assembler reports.

Owns the flags, the meaning of the compiler's log, and which architectures the installed NVRTC knows. Knows nothing of
GPUs, files and caches; needs no GPU, no driver and no CUDA toolkit. Kernel text includes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from marlin.errors import CompileError, UnsupportedError, message, require

# Every architecture that the portable kernels are compiled for ahead of time, the oldest first.
ARCHS = ("80", "86", "89", "90", "90a", "100a", "120")
INSTALL = (
    "Install it: pip install 'sparse-marlin[cuda]' (drivers of CUDA 13: cuda-bindings, nvidia-cuda-nvrtc) or "
    "'sparse-marlin[cuda12]' (drivers of CUDA 12: cuda-bindings 12, nvidia-cuda-nvrtc-cu12)."
)
_FIXED_FLAGS = ("-std=c++17", "--ptxas-options=-v")
_ARCH = re.compile(r"[1-9]\d{1,2}[af]?")
_REGISTERS = re.compile(r"Used (\d+) registers")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_SERIALIZED = re.compile(r"^.*\(C75\d\d\).*wgmma\.mma_async instructions are serialized.*$", re.MULTILINE)


@dataclass(frozen=True)
class Cubin:
    """Machine code of one translation unit, and what the assembler said about it.

    registers: of the largest function; spill_bytes: stores plus loads, summed; stack_bytes: the largest frame; each
    None where the log does not say. serialized_wgmma: ptxas notes C7510 and following, which cost most of a
    kernel's speed.
    """

    image: bytes = field(repr=False)
    log: str
    registers: int | None
    spill_bytes: int | None
    stack_bytes: int | None = None
    serialized_wgmma: tuple[str, ...] = ()


def parse_log(image: bytes, log: str) -> Cubin:
    """The cubin with the resources read from the output of `ptxas -v`."""
    registers = [int(match) for match in _REGISTERS.findall(log)]
    frames = [tuple(map(int, match)) for match in _FRAME.findall(log)]
    return Cubin(
        image=image,
        log=log,
        registers=max(registers, default=None),
        spill_bytes=sum(stores + loads for _, stores, loads in frames) if frames else None,
        stack_bytes=max((stack for stack, _, _ in frames), default=None),
        serialized_wgmma=tuple(line.strip() for line in _SERIALIZED.findall(log)),
    )


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    """The bindings' module, once its library is known to load. Raises: UnsupportedError."""
    requirement = "NVRTC must be installed to compile kernels"
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise UnsupportedError(message("compile_cubin", requirement, f"no cuda.bindings ({error})", INSTALL)) from error
    try:
        result = nvrtc.nvrtcVersion()[0]
    except (RuntimeError, OSError) as error:  # what the bindings raise for a library that is not there
        from cuda.bindings import __version__ as version

        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UnsupportedError(
            message(
                "compile_cubin",
                requirement,
                f"no libnvrtc for cuda-bindings {version} ({first_line})",
                f"Both must be of one CUDA major version. {INSTALL}",
            )
        ) from error
    require(int(result) == 0, "compile_cubin", "NVRTC must answer", result.name, INSTALL, UnsupportedError)
    return nvrtc


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that compiles here. Raises: UnsupportedError (not installed)."""
    _, major, minor = _nvrtc().nvrtcVersion()
    return int(major), int(minor)


@lru_cache(maxsize=1)
def supported_archs() -> tuple[int, ...]:
    """Numbers of the architectures that this NVRTC knows, ascending. Raises: UnsupportedError (not installed)."""
    _, archs = _nvrtc().nvrtcGetSupportedArchs()
    return tuple(sorted(int(arch) for arch in archs))


def check_arch(arch: str) -> None:
    """Refuse what this NVRTC cannot compile for. Raises: ValueError (form), UnsupportedError (unknown to NVRTC)."""
    require(
        _ARCH.fullmatch(arch) is not None,
        "compile_cubin",
        "arch must be digits with an optional a or f, like '80' or '90a'",
        repr(arch),
    )
    known = supported_archs()
    if int(arch.rstrip("af")) not in known:
        raise _unknown_arch(arch)


def arch_for(capability: tuple[int, int]) -> str:
    """The architecture to compile for on a GPU of this compute capability.

    Its own where NVRTC knows it, else the next lower one of the same major version, whose machine code it also runs.
    Raises: UnsupportedError (no such architecture, or no NVRTC).
    """
    major, minor = capability
    fitting = [arch for arch in supported_archs() if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        raise _unknown_arch(f"{major}{minor}")
    return str(fitting[-1])


def _unknown_arch(arch: str) -> UnsupportedError:
    major, minor = nvrtc_version()
    known = ", ".join(map(str, supported_archs()))
    package = "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc"
    return UnsupportedError(
        message(
            "compile_cubin",
            f"NVRTC must know the architecture sm_{arch}",
            f"NVRTC {major}.{minor}, which knows {known}",
            f"Install a newer one that the driver still takes: pip install -U {package}.",
        )
    )


def flags(arch: str, options: tuple[str, ...] = ()) -> tuple[str, ...]:
    """All arguments that NVRTC gets; a part of every cache key.

    options: further ones, such as "-lineinfo" or "--ptxas-options=-O2" (one option of ptxas per flag: NVRTC rejects
    several joined by commas).
    """
    return (f"--gpu-architecture=sm_{arch}", *_FIXED_FLAGS, *options)


def _read(nvrtc: Any, program: Any, what: str) -> bytes:
    """A sized output of a program: "ProgramLog" or "CUBIN"."""
    _, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    buffer = b" " * int(size)
    if buffer:
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer


def compile_cubin(text: str, *, name: str, arch: str, options: tuple[str, ...] = ()) -> Cubin:
    """Compile a translation unit to machine code for one architecture.

    name: the kernel's, shown in messages and as the file in the compiler's log; arch: "80", "86", "90a", ...; options:
    see `flags`.
    Raises: CompileError (with kernel, arguments, architecture and the whole log), ValueError (arch's form),
    UnsupportedError (no NVRTC, or one that does not know the architecture).
    """
    check_arch(arch)
    nvrtc = _nvrtc()
    # Why: from 12.9 on NVRTC keeps what it compiled where there is a driver, and then reports no resources.
    uncached = ("--no-cache",) if nvrtc_version() >= (12, 9) else ()
    arguments = flags(arch, options)
    given = [flag.encode() for flag in (*arguments, *uncached)]
    error, program = nvrtc.nvrtcCreateProgram(text.encode(), f"{name}.cu".encode(), 0, [], [])
    if int(error) != 0:
        raise CompileError(message(f"compile_cubin[{name}]", "NVRTC must accept the text", f"{error.name}"))
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        log = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        image = _read(nvrtc, program, "CUBIN") if int(error) == 0 else b""
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    if int(error) == 0 and image:
        return parse_log(image, log)
    if "--gpu-architecture" in log or "--nv_arch" in log:
        raise _unknown_arch(arch)
    major, minor = nvrtc_version()
    raise CompileError(
        message(
            f"compile_cubin[{name}]",
            f"the kernel must compile for sm_{arch}",
            f"{error.name} from NVRTC {major}.{minor} with {' '.join(arguments)}",
            f"The whole log:\n{log}",
        )
    )
