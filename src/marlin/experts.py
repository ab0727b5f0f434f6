"""The experts of a mixture as linear layers: what formats, compression and kernels take.

transformers holds the weights of all experts of a block in two tensors, [E, 2I, H] and [E, H, I]. `split` puts
`Experts` in the place of such a module: the same function with linear layers for each expert, two, or three as
published checkpoints have them. Owns how such modules are told from others; knows nothing of compression.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from marlin.errors import message, require

OP = "split experts"
LEAVES = ("gate_up_proj", "down_proj")
PUBLISHED_LEAVES = ("gate_proj", "up_proj", "down_proj")
# Of the largest output, between the two ways to compute it.
_CLOSE = 2e-2


class ExpertsWarning(UserWarning):
    """Experts stay as they are, since their module computes something that `Experts` does not."""


class Expert(nn.Module):
    """The linear layers of one expert, by the names of LEAVES or PUBLISHED_LEAVES: to 2I features and to H. What stands
    between them is the mixture's."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        super().__init__()
        self._first = tuple(layers)[:-1]
        for name, layer in layers.items():
            self.add_module(name, layer)

    def first(self, hidden: Tensor) -> Tensor:
        """[T, H] to [T, 2I]."""
        parts = [self.get_submodule(name)(hidden) for name in self._first]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer that has these tensors, not copies of them."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


class Experts(nn.Module):
    """Experts by number, called like the module of transformers that they stand for.

    gate: from the outputs of an expert's first layer, [T, 2I], to the inputs of its second, [T, I].
    """

    def __init__(self, experts: list[Expert], gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.num_experts, self._gate = len(experts), gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over each token's experts, by weight: hidden_states [T, H], the others [T, k]; returns [T, H]."""
        out = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= self.num_experts:  # a token that some routers send nowhere
                continue
            token, place = torch.where(top_k_index == index)
            expert: Any = self.get_submodule(str(index))
            one = expert.down_proj(self._gate(expert.first(hidden_states[token])))
            out.index_add_(0, token, (one * top_k_weights[token, place, None]).to(out.dtype))
        return out


def _chunked(fused: nn.Module) -> Callable[[Tensor], Tensor]:
    act: Any = fused.act_fn

    def gate(both: Tensor) -> Tensor:
        first, second = both.chunk(2, dim=-1)
        return torch.as_tensor(act(first) * second)

    return gate


def _is_fused(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return all(leaf in own and own[leaf].ndim == 3 for leaf in LEAVES)


def fused(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hold the weights of several experts in one tensor, by name."""
    return [(name, module) for name, module in model.named_modules() if _is_fused(module)]


def _lacks(fused: nn.Module, leaves: tuple[str, ...]) -> str | None:
    """What `Experts` does not do of what this module does, or None."""
    if leaves != LEAVES and not getattr(fused, "is_concatenated", True):
        return "gates between the other features"
    if getattr(fused, "has_post_expert_norm", False):
        return "a norm after each expert"
    if not getattr(fused, "has_gate", True):
        return "no gate"
    return None if hasattr(fused, "_apply_gate") or hasattr(fused, "act_fn") else "an activation that is not named"


def _built(fused: nn.Module, leaves: tuple[str, ...]) -> Experts:
    own, transposed = dict(fused.named_parameters(recurse=False)), getattr(fused, "is_transposed", False)

    def rows(leaf: str, index: int, part: slice = slice(None)) -> nn.Linear:
        weight, bias = own[leaf].data[index], own.get(f"{leaf}_bias")
        weight = weight.T.contiguous() if transposed else weight
        return _linear(weight[part], None if bias is None else bias.data[index][part])

    def expert(index: int) -> Expert:
        if leaves == LEAVES:
            return Expert({leaf: rows(leaf, index) for leaf in LEAVES})
        half = own[LEAVES[0]].shape[2 if transposed else 1] // 2
        gate, up = (rows(LEAVES[0], index, part) for part in (slice(half), slice(half, None)))
        return Expert(dict(zip(PUBLISHED_LEAVES, (gate, up, rows(LEAVES[1], index)), strict=True)))

    experts = [expert(index) for index in range(own[LEAVES[0]].shape[0])]
    found = Experts(experts, getattr(fused, "_apply_gate", None) or _chunked(fused))
    return found.train(fused.training)


@torch.no_grad()
def _differs(fused: nn.Module, built: Experts) -> bool:
    """Whether the two compute different things of random tokens."""
    weight: Any = next(built.parameters())
    if weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    tokens, width = 8, weight.shape[1]
    hidden = torch.randn(tokens, width, generator=generator).to(weight)
    index = torch.randint(0, built.num_experts, (tokens, 1), generator=generator).to(weight.device)
    shares = torch.rand(tokens, 1, generator=generator).to(weight)
    # Why unwrapped: what stands around it chooses among implementations of the same function.
    plain: Any = getattr(type(fused).forward, "__wrapped__", type(fused).forward)
    try:
        wanted, found = plain(fused, hidden, index, shares).float(), built(hidden, index, shares).float()
    except Exception:  # Why any: a module with other arguments or layouts fails in its own way, and is not this one.
        return True
    return bool((wanted - found).abs().max() > _CLOSE * wanted.abs().max())


def split(
    model: nn.Module, treats: Callable[[str], bool] = lambda name: True, leaves: tuple[str, ...] = LEAVES
) -> list[str]:
    """Put `Experts` in the place of fused experts, in place; returns the names of those modules.

    treats: whether a linear layer of this name, such as "model.layers.0.mlp.experts.3.down_proj", is to be compressed;
    a module of which no layer is stays as it is. leaves: LEAVES or PUBLISHED_LEAVES. Tensors are views of the
    fused ones. Modules that compute something else (a norm after each expert, no gate) stay, with an `ExpertsWarning`.
    Raises: ValueError (a part of the layers of one module).
    """
    done = []
    for name, module in fused(model):
        count = int(getattr(module, LEAVES[0]).shape[0])
        wanted = [treats(f"{name}.{index}.{leaf}") for index in range(count) for leaf in leaves]
        if not any(wanted):
            continue
        fix = "Let the recipe take all of them, or none."
        require(all(wanted), OP, f"all layers of {name} must be compressed", f"{sum(wanted)} of {len(wanted)}", fix)
        lack, built = _lacks(module, leaves), None
        if lack is None:
            built = _built(module, leaves)
            lack = "another function of its tensors" if _differs(module, built) else None
        if built is None or lack is not None:
            text = message(
                OP, f"{name} must compute gated experts and nothing else", f"{lack}", "They stay as they are."
            )
            warnings.warn(text, ExpertsWarning, stacklevel=2)
            continue
        for leaf in list(dict(module.named_parameters(recurse=False))):
            delattr(module, leaf)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, built)
        done.append(name)
    return done
