"""Layer shapes of known models, the batch sizes that are measured, and what a run measures by default.

Owns the numbers (N, K, M) only; knows nothing of kernels or timing. The linears of a decoder block are taken as servers
run them: query, key and value in one matrix (`qkv`), gate and up in one (`gate_up`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from marlin.errors import message


@dataclass(frozen=True)
class Layer:
    """One linear layer: out features n, in features k."""

    name: str
    n: int
    k: int


def _decoder(hidden: int, inter: int, heads: int, kv_heads: int, gated: bool = True) -> tuple[Layer, ...]:
    head = hidden // heads
    up = Layer("gate_up", 2 * inter, hidden) if gated else Layer("up", inter, hidden)
    return (
        Layer("qkv", (heads + 2 * kv_heads) * head, hidden),
        Layer("o", hidden, hidden),
        up,
        Layer("down", hidden, inter),
    )


PRESETS: dict[str, tuple[Layer, ...]] = {
    "llama2-7b": _decoder(4096, 11008, 32, 32),
    "llama2-13b": _decoder(5120, 13824, 40, 40),
    "llama2-70b": _decoder(8192, 28672, 64, 8),
    "llama3.1-8b": _decoder(4096, 14336, 32, 8),
    "llama3.1-70b": _decoder(8192, 28672, 64, 8),
    "qwen2.5-7b": _decoder(3584, 18944, 28, 4),
    "qwen2.5-32b": _decoder(5120, 27648, 40, 8),
    "falcon-180b": _decoder(14848, 59392, 232, 8, gated=False),
}
LABELS = {
    "llama2-7b": "Llama-2-7B",
    "llama2-13b": "Llama-2-13B",
    "llama2-70b": "Llama-2-70B",
    "llama3.1-8b": "Llama-3.1-8B",
    "llama3.1-70b": "Llama-3.1-70B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "qwen2.5-32b": "Qwen2.5-32B",
    "falcon-180b": "Falcon-180B",
}
# Why this one: the block whose sums the tables and targets are about is the decoder block of Llama-3.1-8B.
BLOCK_NAME = "llama3.1-8b"
BLOCK: tuple[tuple[int, int], ...] = tuple((layer.n, layer.k) for layer in PRESETS[BLOCK_NAME])
# The large matrix of the figures: gate and up of a 70B model.
LARGE: tuple[int, int] = (57344, 8192)
BATCHES = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
# Between tile sizes, where a kernel with a cliff would show it.
ODD_BATCHES = (2, 4, 12, 17, 24, 33, 48, 65, 96, 100, 129, 192, 300, 512, 2048, 8192, 16384)
ALL_BATCHES = tuple(sorted({*BATCHES, *ODD_BATCHES}))
LAYER_BATCH = 16


@dataclass(frozen=True)
class Part:
    """A piece of a run: every shape at every batch size in one dtype. peers: None takes all, else those named."""

    shapes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    dtype: str = "float16"
    peers: tuple[str, ...] | None = None


def distinct(names: Iterable[str]) -> list[str]:
    """The presets named, without those whose layers another one before them has."""
    found: dict[tuple[Layer, ...], str] = {}
    for name in names:
        found.setdefault(PRESETS[name], name)
    return list(found.values())


def _others() -> tuple[tuple[int, int], ...]:
    return tuple(shape for shape in shapes("all") if shape not in (*BLOCK, LARGE))


def default_parts() -> list[Part]:
    """What a run measures unless told otherwise, the most asked-for first: about 100 s on one GPU without GemLite.

    The block at every batch size of the targets and at odd ones; in bf16 at those of the targets; one large matrix;
    every layer of the other models at one batch size.
    """
    between = (17, 33, 65, 100, 129, 300, 512)
    return [
        Part(BLOCK, tuple(sorted((*BATCHES, *between)))),
        Part(BLOCK, BATCHES, "bfloat16", peers=("cusparselt",)),
        Part((LARGE,), BATCHES),
        Part(_others(), (LAYER_BATCH,)),
    ]


def _one(name: str) -> Iterable[tuple[int, int]]:
    if name == "block":
        return BLOCK
    if name == "large":
        return [LARGE]
    if name == "all":
        return [(layer.n, layer.k) for layers in PRESETS.values() for layer in layers]
    if name in PRESETS:
        return [(layer.n, layer.k) for layer in PRESETS[name]]
    n, _, k = name.partition("x")
    if n.isdecimal() and k.isdecimal():
        return [(int(n), int(k))]
    known = ", ".join(("block", "large", "all", *PRESETS))
    raise ValueError(message("benchmarks.presets", f"a shape must be NxK or one of {known}", repr(name)))


def shapes(names: str) -> list[tuple[int, int]]:
    """(N, K) of a comma-separated list of presets and NxK, without repeats. Raises: ValueError (unknown name)."""
    return list(dict.fromkeys(shape for name in names.split(",") for shape in _one(name.strip())))


def models(names: str) -> list[str]:
    """Presets of a comma-separated list; `all` stands for those that differ. Raises: ValueError (unknown name)."""
    found: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name != "all" and name not in PRESETS:
            known = ", ".join(("all", *PRESETS))
            raise ValueError(message("benchmarks.presets", f"a model must be one of {known}", repr(name)))
        found.extend(distinct(PRESETS) if name == "all" else (name,))
    return list(dict.fromkeys(found))


def batches(names: str) -> list[int]:
    """Batch sizes of a comma-separated list; `standard` and `odd` stand for their sets. Raises: ValueError."""
    sets = {"standard": BATCHES, "odd": ODD_BATCHES}
    found: list[int] = []
    for name in (part.strip() for part in names.split(",")):
        if name not in sets and not (name.isdecimal() and int(name) > 0):
            raise ValueError(
                message("benchmarks.presets", "a batch must be a positive number, standard or odd", repr(name))
            )
        found.extend(sets.get(name) or (int(name),))
    return sorted(dict.fromkeys(found))
