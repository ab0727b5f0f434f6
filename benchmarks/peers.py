"""Other implementations, timed beside ours where they are present.

Owns how each is built and called; a peer that is not there raises `AbsentError` with the reason. Their results are not
checked: random bytes take the place of packed weights where only the time matters.

    cusparselt        2:4 fp16 through torch, in this process
    sparse-marlin     the published 2:4 INT4 kernel, libsparse_marlin.so in MARLIN_PEERS_DIR
    marlin-published  the published dense INT4 kernel, libmarlin.so in MARLIN_PEERS_DIR
    gemlite, humming  dense INT4, Python packages

Each of the last four runs in a process of its own (`benchmarks.isolated`): the two libraries crash each other in one.

The shared objects export, with C linkage and an int result that is 0 on success:

    sparse_marlin_linear(act, codes, meta, out, scales, n, m, k, workspace, group_size, device, stream, max_par)
    marlin_linear(act, codes, out, scales, m, n, k, workspace, group_size, device, stream, max_par)

which forward to the published launchers with default tiles.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.candidates import AbsentError, Factory, Prepared, Setting, random_positions
from benchmarks.isolated import Peer

_MAX_PAR = 16


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AbsentError(f"package {name.partition('.')[0]} is not installed") from error


def _installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise AbsentError(f"package {package} is not installed")


def _library_path(file: str) -> pathlib.Path:
    folder = os.environ.get("MARLIN_PEERS_DIR")
    if not folder:
        raise AbsentError("MARLIN_PEERS_DIR is not set")
    path = pathlib.Path(folder).resolve() / file
    if not path.exists():
        raise AbsentError(f"{file} is not in MARLIN_PEERS_DIR")
    return path


def _shared_object(file: str, symbol: str, pointers: int) -> Callable[..., int]:
    """The C function; its arguments are `pointers` pointers, three ints, a pointer, two ints, a pointer, an int."""
    path = _library_path(file)
    try:
        function = getattr(ctypes.CDLL(str(path)), symbol)
    except (OSError, AttributeError) as error:
        raise AbsentError(f"{file} cannot be loaded: {error}") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [*[pointer] * pointers, *[integer] * 3, pointer, integer, integer, pointer, integer]
    function.restype = integer
    return function


def _published_limits(setting: Setting) -> None:
    if setting.dtype != torch.float16:
        raise AbsentError("the kernel is fp16 only")
    if setting.group_size not in (128, -1):
        raise AbsentError("the kernel has groups of 128 or whole columns only")
    # Why 256: the tile along N is 128 up to 16 tokens and 256 beyond.
    if setting.n % 256 or setting.k % 128:
        raise AbsentError("the kernel needs N a multiple of 256 and K of 128")
    if torch.cuda.get_device_capability(setting.device)[0] < 8:
        raise AbsentError("the kernel needs compute capability 8.0")


def _random_words(setting: Setting, words: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, device=setting.device)


def _random_scales(setting: Setting) -> torch.Tensor:
    groups = 1 if setting.group_size == -1 else setting.k // setting.group_size
    return ((torch.rand(groups, setting.n, device=setting.device) + 0.5) * 0.01).to(torch.float16)


def _locks(setting: Setting) -> torch.Tensor:
    return torch.zeros(setting.n // 128 * _MAX_PAR, dtype=torch.int32, device=setting.device)


def _succeeded(status: int, name: str) -> None:
    if status:
        raise AbsentError(f"{name} refused the problem with status {status}")


def sparse_marlin(setting: Setting) -> Prepared:
    """The published 2:4 kernel. It counts its groups in kept values, so a dense 128 is its 64."""
    function = _shared_object("libsparse_marlin.so", "sparse_marlin_linear", 5)
    _published_limits(setting)
    n, k, device = setting.n, setting.k, setting.device
    # Why random: time does not depend on the packing order. Metadata must still be legal 2:4 nibbles, since others
    # are undefined for the instruction.
    copies = []
    for _ in range(setting.copies("w4a16_sp24")):
        nibbles = random_positions(n * k // 8, 2, device)
        meta = nibbles[:, 0] | nibbles[:, 1] << 4
        copies.append((_random_words(setting, n * k // 16), meta, _random_scales(setting)))
    locks = _locks(setting)
    group = setting.group_size if setting.group_size == -1 else setting.group_size // 2

    def call(i: int, act: torch.Tensor, out: torch.Tensor) -> None:
        codes, meta, scales = copies[i]
        pointers = [tensor.data_ptr() for tensor in (act, codes, meta, out, scales)]
        stream = torch.cuda.current_stream().cuda_stream
        status = function(*pointers, n, act.shape[0], k, locks.data_ptr(), group, device.index or 0, stream, _MAX_PAR)
        _succeeded(status, "sparse-marlin")

    return Prepared("sparse-marlin", "w4a16_sp24", len(copies), call)


def marlin_published(setting: Setting) -> Prepared:
    """The published dense INT4 kernel."""
    function = _shared_object("libmarlin.so", "marlin_linear", 4)
    _published_limits(setting)
    n, k, device = setting.n, setting.k, setting.device
    count = setting.copies("w4a16_dense")
    copies = [(_random_words(setting, n * k // 8), _random_scales(setting)) for _ in range(count)]
    locks = _locks(setting)

    def call(i: int, act: torch.Tensor, out: torch.Tensor) -> None:
        codes, scales = copies[i]
        pointers = [tensor.data_ptr() for tensor in (act, codes, out, scales)]
        stream = torch.cuda.current_stream().cuda_stream
        status = function(
            *pointers, act.shape[0], n, k, locks.data_ptr(), setting.group_size, device.index or 0, stream, _MAX_PAR
        )
        _succeeded(status, "marlin-published")

    return Prepared("marlin-published", "w4a16_dense", len(copies), call)


def cusparselt(setting: Setting) -> Prepared:
    """2:4 fp16 values through torch's semi-structured tensors."""
    if not (hasattr(torch.backends, "cusparselt") and torch.backends.cusparselt.is_available()):
        raise AbsentError("this torch has no cuSPARSELt")
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    SparseSemiStructuredTensor._FORCE_CUTLASS = False
    mask = torch.tensor([1, 0, 0, 1], device=setting.device, dtype=setting.dtype).tile(setting.n, setting.k // 4)
    count = setting.copies("fp16_sp24")
    weights = [to_sparse_semi_structured(setting.random_dense() * mask) for _ in range(count)]
    return Prepared("cusparselt", "fp16_sp24", count, lambda i, act, out: torch.nn.functional.linear(act, weights[i]))


def _gemlite_configurations(setting: Setting) -> None:
    """GemLite's tuned configurations of the H100, which it looks up by name, on the other GPUs of that architecture."""
    core = _package("gemlite.core")
    if torch.cuda.get_device_capability(setting.device) == (9, 0) and core.get_default_cache_config() is None:
        core.GemLiteLinear.load_config(str(pathlib.Path(core.__file__).parent / "configs" / "h100.json"))


def gemlite(setting: Setting) -> Prepared:
    """Dense INT4 in Triton."""
    helper = _package("gemlite.helper")
    _gemlite_configurations(setting)
    groups = 1 if setting.group_size == -1 else setting.k // setting.group_size
    shape = (setting.n, groups)
    codes = torch.randint(0, 16, (setting.n, setting.k), dtype=torch.uint8, device=setting.device)
    scales = ((torch.rand(shape, device=setting.device) + 0.5) * 0.01).to(setting.dtype)
    zeros = torch.full(shape, 8, device=setting.device, dtype=setting.dtype)
    builder = helper.A16W4_HQQ_INT(device=str(setting.device), dtype=setting.dtype)
    first = builder.from_weights(codes, scales, zeros)
    layers = [first, *(copy.deepcopy(first) for _ in range(setting.copies("w4a16_dense") - 1))]
    return Prepared("gemlite", "w4a16_dense", len(layers), lambda i, act, out: layers[i](act))


def humming(setting: Setting) -> Prepared:
    """Dense INT4, compiled at run time."""
    module = _package("humming.layer")
    group = 0 if setting.group_size == -1 else setting.group_size
    first = module.HummingLayer(
        shape_n=setting.n,
        shape_k=setting.k,
        weight_config={"dtype": "int4", "group_size": group},
        torch_dtype=setting.dtype,
    ).to(setting.device)
    first.load_from_unquantized(setting.random_dense())
    first.transform()
    layers = [first, *(copy.deepcopy(first) for _ in range(setting.copies("w4a16_dense") - 1))]
    return Prepared("humming", "w4a16_dense", len(layers), lambda i, act, out: layers[i](act, outputs=out))


def _library(file: str, factory: str) -> Peer:
    return Peer(f"benchmarks.peers:{factory}", functools.partial(_library_path, file))


def _python(package: str) -> Peer:
    return Peer(f"benchmarks.peers:{package}", functools.partial(_installed, package))


PEERS: dict[str, Factory | Peer] = {
    "sparse-marlin": _library("libsparse_marlin.so", "sparse_marlin"),
    "marlin-published": _library("libmarlin.so", "marlin_published"),
    "cusparselt": cusparselt,
    "gemlite": _python("gemlite"),
    "humming": _python("humming"),
}
