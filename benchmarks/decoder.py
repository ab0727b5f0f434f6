"""A decoder of Llama-3.1-8B's shape with random weights, as a program of steps on static buffers.

Owns what one decoding step is: which products, which attention, which small operations between them, and to which part
of the time each belongs. Weights have the statistics of a trained model's (normal, the residual writers scaled down by
depth), values do not matter to time. Positions of heads are in whatever order saves a copy, which random weights allow.
Knows nothing of clocks: `benchmarks.decode` times it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from marlin import ops
from marlin.formats.layouts import PackedWeight
from marlin.nn import SparseLinear
from marlin.testing import tolerance

# Parts of a step, in the order in which tables list them.
PARTS = ("linear", "lm_head", "attention", "glue")
# Different layers; the others are copies of these in memory of their own. Quantizing all would only take longer.
DISTINCT_LAYERS = 4


@dataclass(frozen=True)
class Shape:
    """Extents of the model and of the state it decodes from."""

    layers: int = 32
    hidden: int = 4096
    inter: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256
    context: int = 1024
    group_size: int = 128

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the products of a layer, in order."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.inter, self.hidden),
            "down": (self.hidden, self.inter),
        }


class Step(NamedTuple):
    """One operation on static buffers; part: of `PARTS`."""

    part: str
    run: Callable[[], object]


# product(layer, name, act, out): out = act @ weight.T
Product = Callable[[int, str, torch.Tensor, torch.Tensor], object]


@dataclass(frozen=True)
class Weights:
    """The linears of all layers in one implementation. first: those of the first layer, where they can be checked."""

    impl: str
    op: str
    nbytes: int
    product: Product
    first: Mapping[str, SparseLinear] = field(default_factory=dict)


def random_linears(shape: Shape, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """fp16 weights of every layer: normal, std 0.02, those that write to the residual over sqrt(2 * layers)."""
    distinct: list[dict[str, torch.Tensor]] = []
    for _ in range(min(DISTINCT_LAYERS, shape.layers)):
        layer = {}
        for name, (n, k) in shape.linears.items():
            std = 0.02 / math.sqrt(2 * shape.layers) if name in ("o", "down") else 0.02
            layer[name] = torch.randn(n, k, device=device, dtype=torch.float16).mul_(std)
        distinct.append(layer)
    rest = range(len(distinct), shape.layers)
    copies = [{name: weight.clone() for name, weight in distinct[i % len(distinct)].items()} for i in rest]
    return distinct + copies


def dense(linears: list[dict[str, torch.Tensor]]) -> Weights:
    """fp16 through torch.mm."""
    transposed = [{name: weight.T for name, weight in layer.items()} for layer in linears]
    nbytes = sum(weight.nbytes for layer in linears for weight in layer.values())
    return Weights("cublas", "fp16", nbytes, lambda i, name, act, out: torch.mm(act, transposed[i][name], out=out))


def _copy(packed: PackedWeight) -> PackedWeight:
    meta = None if packed.meta is None else packed.meta.clone()
    return replace(packed, codes=packed.codes.clone(), meta=meta, scales=packed.scales.clone())


def compressed(linears: list[dict[str, torch.Tensor]], kind: str, group_size: int) -> Weights:
    """The same layers in INT4, 2:4-sparse by magnitude where kind says so."""
    distinct = [
        {name: SparseLinear.from_dense(weight, group_size=group_size, kind=kind) for name, weight in layer.items()}
        for layer in linears[:DISTINCT_LAYERS]
    ]
    packed = [
        {
            name: layer.packed if i < len(distinct) else _copy(layer.packed)
            for name, layer in distinct[i % len(distinct)].items()
        }
        for i in range(len(linears))
    ]
    nbytes = sum(weight.nbytes for layer in packed for weight in layer.values())

    def product(layer: int, name: str, act: torch.Tensor, out: torch.Tensor) -> None:
        ops.linear_out(act, packed[layer][name], out)

    return Weights("marlin", kind, nbytes, product, distinct[0])


def check_linears(weights: Weights, batches: Sequence[int]) -> None:
    """Hold the products of the first layer against the exact ones. Raises: AssertionError."""
    for name, layer in weights.first.items():
        canonical, device, dtype = layer.to_weight(), layer.scales.device, layer.scales.dtype
        for batch in batches:
            act = torch.randn(batch, layer.in_features, device=device, dtype=dtype)
            out = torch.full((batch, layer.out_features), torch.nan, device=device, dtype=dtype)
            weights.product(0, name, act, out)
            tolerance.check(out, act, canonical, name=f"{weights.op} {name} M={batch}")


def add_norm(residual: torch.Tensor, update: torch.Tensor, gain: torch.Tensor, out: torch.Tensor) -> None:
    """residual += update; out = RMSNorm(residual) * gain."""
    residual.add_(update)
    out.copy_(F.rms_norm(residual, (residual.shape[-1],), gain, 1e-5))


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up, both halves of gate_up."""
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


def rotate_and_store(
    qkv: torch.Tensor, turn: torch.Tensor, query: torch.Tensor, key_slot: torch.Tensor, value_slot: torch.Tensor
) -> None:
    """Rotary embedding of queries and keys; keys and values into the cache.

    qkv [B, heads + 2 * kv_heads, 2, head / 2]; turn [2, head / 2]: cos and sin; query [B, heads, head];
    slots [B, kv_heads, head]: the current position of the cache.
    """
    batch, kv_heads, head = key_slot.shape
    heads = qkv.shape[1] - 2 * kv_heads
    first, second = qkv[:, : heads + kv_heads, 0], qkv[:, : heads + kv_heads, 1]
    cos, sin = turn[0], turn[1]
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=2)
    query.copy_(rotated[:, :heads].reshape(batch, heads, head))
    key_slot.copy_(rotated[:, heads:].reshape(batch, kv_heads, head))
    value_slot.copy_(qkv[:, heads + kv_heads :].reshape(batch, kv_heads, head))


GLUE: dict[str, Callable[..., None]] = {"add_norm": add_norm, "silu_mul": silu_mul, "rotate": rotate_and_store}


class Fused:
    """A small operation through torch.compile; as it stands where that fails, which costs time, not the measurement."""

    def __init__(self, name: str, plain: Callable[..., None], backend: Any = "inductor") -> None:
        self.name, self.compiled = name, True
        self._plain = plain
        self._fast = torch.compile(plain, dynamic=False, fullgraph=True, backend=backend)

    def __call__(self, *arguments: torch.Tensor) -> None:
        if self.compiled:
            try:
                self._fast(*arguments)
                return
            except Exception as error:
                self.compiled = False
                first = (str(error).strip().splitlines() or [""])[0][:160]
                print(f"{self.name} runs unfused ({type(error).__name__}: {first})", flush=True)
        self._plain(*arguments)


def fused_glue(backend: Any = "inductor") -> dict[str, Callable[..., None]]:
    """The small operations, each compiled by itself, as serving engines fuse them."""
    for limit in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, limit):  # Why: one specialization for each batch size.
            setattr(torch._dynamo.config, limit, 64)
    return {name: Fused(name, function, backend) for name, function in GLUE.items()}


def describe_glue(glue: Mapping[str, Callable[..., None]]) -> str:
    """Which of them are compiled, in words."""
    fused = [name for name, function in glue.items() if isinstance(function, Fused) and function.compiled]
    return f"compiled: {', '.join(fused)}" if fused else "torch, unfused"


class Decoder:
    """State of a batch: caches filled to `context`, and the buffers that a step writes."""

    def __init__(self, shape: Shape, batch: int, device: torch.device, dtype: torch.dtype = torch.float16) -> None:
        self.shape, self.batch = shape, batch
        make = functools.partial(torch.empty, device=device, dtype=dtype)
        gain = torch.ones(shape.hidden, device=device, dtype=dtype)
        self.gain = gain
        cache = (shape.layers, batch, shape.kv_heads, shape.context, shape.head)
        self.keys, self.values = (torch.randn(cache, device=device, dtype=dtype) for _ in range(2))
        self.embedding = torch.randn(shape.vocab, shape.hidden, device=device, dtype=dtype).mul_(0.02)
        self.lm_head = torch.randn(shape.vocab, shape.hidden, device=device, dtype=dtype).mul_(0.02)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.residual, self.normed = make(batch, shape.hidden), make(batch, shape.hidden)
        self.update = torch.zeros(batch, shape.hidden, device=device, dtype=dtype)
        self.outs = {name: make(batch, n) for name, (n, _) in shape.linears.items()}
        self.query, self.mixed = make(batch, shape.heads, shape.head), make(batch, shape.hidden)
        self.acted, self.logits = make(batch, shape.inter), make(batch, shape.vocab)
        angle = (shape.context - 1) / 500000.0 ** (torch.arange(shape.head // 2, device=device) * 2 / shape.head)
        self.turn = torch.stack((angle.cos(), angle.sin())).to(dtype)

    def attend(self, layer: int) -> None:
        """Attention of one new token per sequence over its cache, without a mask: all of it is in the past.

        The heads that share keys are the queries' second dimension, so that the cache is read once for all of them.
        """
        shape = self.shape
        groups = shape.heads // shape.kv_heads
        query = self.query.view(self.batch, groups, shape.kv_heads, shape.head).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, self.keys[layer], self.values[layer])
        self.mixed.view(self.batch, groups, shape.kv_heads, shape.head).copy_(mixed.transpose(1, 2))

    def program(self, weights: Weights, glue: dict[str, Callable[..., None]]) -> list[Step]:
        """The steps of one token: embedding, layers, logits, the likeliest token as the next input."""
        shape, outs = self.shape, self.outs
        qkv = outs["qkv"].view(self.batch, shape.heads + 2 * shape.kv_heads, 2, shape.head // 2)

        def linear(layer: int, name: str, act: torch.Tensor) -> Step:
            return Step("linear", functools.partial(weights.product, layer, name, act, outs[name]))

        def small(name: str, *arguments: Any) -> Step:
            return Step("glue", functools.partial(glue[name], *arguments))

        def embed() -> None:
            torch.index_select(self.embedding, 0, self.tokens, out=self.residual)

        steps = [Step("glue", embed), small("add_norm", self.residual, self.update, self.gain, self.normed)]
        for layer in range(shape.layers):
            slots = (self.keys[layer][:, :, -1], self.values[layer][:, :, -1])
            steps += [
                linear(layer, "qkv", self.normed),
                small("rotate", qkv, self.turn, self.query, *slots),
                Step("attention", functools.partial(self.attend, layer)),
                linear(layer, "o", self.mixed),
                small("add_norm", self.residual, outs["o"], self.gain, self.normed),
                linear(layer, "gate_up", self.normed),
                small("silu_mul", outs["gate_up"], self.acted),
                linear(layer, "down", self.acted),
                small("add_norm", self.residual, outs["down"], self.gain, self.normed),
            ]
        steps += [
            Step("lm_head", lambda: torch.mm(self.normed, self.lm_head.T, out=self.logits)),
            Step("glue", lambda: torch.argmax(self.logits, dim=-1, out=self.tokens)),
        ]
        return steps


def run(steps: Sequence[Step], part: str | None = None) -> None:
    """All steps in order, or those of one part."""
    for step in steps:
        if part is None or step.part == part:
            step.run()
