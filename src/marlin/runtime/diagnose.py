"""What this machine has and lacks: the checks behind `marlin doctor`, each with what to do.

Owns the list of checks. Reads the versions of other packages from their metadata and imports none of them; a check of
the whole path (tensors through the op) comes in from the caller.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from marlin.errors import MarlinError
from marlin.runtime import cache, compiler, driver, loaded

MINIMUM_PYTHON = (3, 10)
MINIMUM_VERSIONS = {"torch": "2.4", "safetensors": "0.4.3", "transformers": "5.0"}
MINIMUM_CAPABILITY = (8, 0)
_CUDA_OF_TORCH = re.compile(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
_TRIVIAL_KERNEL = 'extern "C" __global__ void marlin_doctor() {}\n'
_CPU_REMAINS = "Without it the CPU implementation runs."


@dataclass(frozen=True)
class Check:
    """One finding.

    detail: what is there; fix: what to do, empty when ok; needed_for: "all", "gpu" or "transformers".
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""
    needed_for: str = "all"


def diagnose(self_test: Callable[[], str] | None = None) -> list[Check]:
    """Every check, in the order in which to mend what fails. Raises nothing.

    self_test: runs the op and returns one line on what it did, or raises.
    """
    checks = [_python(), _torch(), _package("safetensors", "all"), _package("transformers", "transformers"), _driver()]
    for index in range(driver.device_count()):
        checks.append(_guarded(f"gpu {index}", "gpu", lambda index=index: _gpu(index)))  # type: ignore[misc]
    checks += [_guarded("nvrtc", "gpu", _nvrtc), _guarded("compile", "gpu", _compile)]
    if driver.device_count():
        checks.append(_guarded("launch", "gpu", _launch))
    checks.append(_cache())
    if self_test is not None:
        checks.append(_guarded("self-test", "all", lambda: Check("self-test", True, self_test())))
    return checks


def _guarded(name: str, needed_for: str, check: Callable[[], Check]) -> Check:
    """A check whose exception is its finding; a `MarlinError` says itself what to do."""
    try:
        return check()
    except Exception as error:
        lines = str(error).strip() or type(error).__name__
        known = isinstance(error, MarlinError)
        detail = lines if known else f"{type(error).__name__}: {lines}"
        head, dot, fix = detail.partition(". ") if known else (detail, "", "")
        fallback = "Run with the environment variable CUDA_LAUNCH_BLOCKING=1 and report the message."
        return Check(name, False, head, fix if dot else fallback, needed_for)


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    ok = sys.version_info >= MINIMUM_PYTHON
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    return Check("python", ok, sys.version.split()[0], "" if ok else f"Install Python {wanted} or newer.")


def _package(package: str, needed_for: str) -> Check:
    version, minimum = _installed(package), MINIMUM_VERSIONS[package]
    source = f"sparse-marlin[{needed_for}]" if needed_for != "all" else f"{package}>={minimum}"
    if version is None:
        return Check(package, False, "not installed", f"Install it: pip install '{source}'.", needed_for)
    ok = _numbers(version) >= _numbers(minimum)
    fix = "" if ok else f"Version {minimum} or newer is needed: pip install -U '{source}'."
    return Check(package, ok, version, fix, needed_for)


def cuda_of_torch() -> str | None:
    """The CUDA version that the installed torch was built with, such as "12.8"; None for a CPU build or no torch."""
    try:
        path = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
        match = _CUDA_OF_TORCH.search(path.read_text(encoding="utf-8"))
    except (metadata.PackageNotFoundError, OSError):
        return None
    return match[1] if match else None


def _torch() -> Check:
    check = _package("torch", "all")
    if not check.ok:
        return check
    cuda = cuda_of_torch()
    detail = f"{check.detail}, built with CUDA {cuda}" if cuda else f"{check.detail}, without CUDA"
    if cuda is None and driver.device_count():
        return Check("torch", False, detail, "There is a GPU: install a build of torch with CUDA.", "gpu")
    return Check("torch", True, detail)


def _driver() -> Check:
    version = driver.driver_version()
    if version is None:
        fix = f"Install the NVIDIA driver if there is a GPU. {_CPU_REMAINS}"
        return Check("driver", False, "no NVIDIA driver", fix, "gpu")
    detail = f"CUDA {version[0]}.{version[1]}"
    if version < (12, 0):
        return Check("driver", False, detail, "Update the driver to one for CUDA 12 or newer.", "gpu")
    if not driver.device_count():
        fix = f"Check nvidia-smi, CUDA_VISIBLE_DEVICES, and whether a container is given the GPU. {_CPU_REMAINS}"
        return Check("driver", False, f"{detail}, but no GPU is visible", fix, "gpu")
    return Check("driver", True, detail, needed_for="gpu")


def _gpu(index: int) -> Check:
    device = driver.device_info(index)
    detail = (
        f"{device.name}, compute capability {device.arch[0]}.{device.arch[1]}, {device.num_sms} multiprocessors, "
        f"{device.memory_bytes_per_s / 1e9:.0f} GB/s"
    )
    ok = device.arch >= MINIMUM_CAPABILITY
    fix = "" if ok else f"The kernels need compute capability 8.0 (Ampere) or newer. {_CPU_REMAINS}"
    return Check(f"gpu {index}", ok, detail, fix, "gpu")


def _nvrtc() -> Check:
    nvrtc, supported = compiler.nvrtc_version(), driver.driver_version()
    detail = f"{nvrtc[0]}.{nvrtc[1]}"
    if supported is None:
        return Check("nvrtc", True, f"{detail} (no driver to compare with)", needed_for="gpu")
    detail += f", driver CUDA {supported[0]}.{supported[1]}"
    if nvrtc[0] > supported[0]:
        extra = "cuda12" if supported[0] == 12 else "cuda"
        fix = f"Update the driver, or install the compiler of its version: pip install 'sparse-marlin[{extra}]'."
        return Check("nvrtc", False, detail, fix, "gpu")
    return Check("nvrtc", True, detail, needed_for="gpu")


def _arch() -> str:
    return compiler.arch_for(driver.device_info(0).arch) if driver.device_count() else compiler.ARCHS[0]


def _compile() -> Check:
    arch = _arch()
    cubin = compiler.compile_cubin(_TRIVIAL_KERNEL, name="marlin_doctor", arch=arch)
    return Check("compile", True, f"sm_{arch}, {len(cubin.image)} bytes", needed_for="gpu")


def _launch() -> Check:
    cubin = compiler.compile_cubin(_TRIVIAL_KERNEL, name="marlin_doctor", arch=_arch()).image
    kernel = loaded.load_kernel(cubin, "marlin_doctor", device_index=0, smem_bytes=0, signature="")
    kernel.launch((1, 1, 1), 32, 0, ())
    driver.synchronize(0)
    return Check("launch", True, "a kernel ran on GPU 0", needed_for="gpu")


def _cache() -> Check:
    found = cache.info()
    detail = f"{found.directory}: {found.entries} kernels, {found.bytes / 1e6:.1f} MB"
    if found.problem is None:
        return Check("cache", True, detail, needed_for="gpu")
    head, _, fix = found.problem.partition(". ")
    return Check("cache", False, head, fix, "gpu")
