"""The distance that recovery minimizes: KL divergence of the compressed model's predictions from the dense model's.

Owns the loss over final hidden states, computed chunk by chunk with its gradient, so that logits of a long batch never
exist at once; and finding out whether a model's logits are its head applied to its final hidden states. Knows nothing
of weights, data and schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROWS = 4096


def chunk_kl(
    student: torch.Tensor, teacher: torch.Tensor, heads: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over rows of T^2 KL(teacher || student) at temperature T, its gradient for student).

    Shapes: student, teacher [R, d] final hidden states; heads: their output matrices [V, d] each.
    """
    own = nn.functional.linear(student, heads[0]).float() / temperature
    other = nn.functional.linear(teacher, heads[1]).float() / temperature
    own_log, other_log = own.log_softmax(-1), other.log_softmax(-1)
    wanted = other_log.exp()
    loss = (wanted * (other_log - own_log)).sum() * temperature**2
    gradient = (own_log.exp() - wanted) * temperature
    # Why the cast: outside autocast, the product would otherwise mix dtypes.
    return loss, torch.mm(gradient.to(heads[0].dtype), heads[0]).to(student.dtype)


Chunk = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _HiddenKL(torch.autograd.Function):
    """Mean over rows of `chunk_kl`; the gradient is computed with the value and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        heads: tuple[torch.Tensor, torch.Tensor],
        temperature: float,
        chunk: Chunk,
    ) -> torch.Tensor:
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        for start in range(0, student.shape[0], ROWS):
            part = slice(start, start + ROWS)
            loss, gradient[part] = chunk(student[part], teacher[part], heads, temperature)
            total = total + loss
        ctx.save_for_backward(gradient.div_(student.shape[0]))
        return total / student.shape[0]

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None, None, None


def logits_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over positions of T^2 KL(teacher || student): logits [..., V]."""
    own_log, other_log = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher))
    return (other_log.exp() * (other_log - own_log)).sum(-1).mean() * temperature**2


@torch.no_grad()
def head_of(model: Any, ids: torch.Tensor) -> nn.Linear | None:
    """The output head, if the model's logits for ids [B, T] are its head applied to its final hidden states.

    Found out by computing both: models that scale or cap their logits get None.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    base = getattr(model, "base_model", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or base is None or base is model:
        return None
    hidden = getattr(base(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        return None
    logits = model(input_ids=ids, use_cache=False).logits.float()
    own = head(hidden).float()
    close = own.shape == logits.shape and bool((own - logits).abs().max() <= 1e-2 * logits.abs().max())
    return head if close else None


@dataclass
class Distance:
    """How far student's predictions are from teacher's on a batch of tokens.

    heads: the two output heads, or None where logits must be computed by the models. chunk: `chunk_kl`, perhaps
    compiled.
    """

    student: Any
    teacher: Any
    heads: tuple[nn.Linear, nn.Linear] | None
    temperature: float = 1.0
    chunk: Chunk = chunk_kl

    @classmethod
    def between(cls, student: Any, teacher: Any, ids: torch.Tensor, temperature: float) -> Distance:
        """The distance, with the models' heads looked up on ids [B, T]."""
        own, other = head_of(student, ids), head_of(teacher, ids)
        heads = (own, other) if own is not None and other is not None else None
        return cls(student, teacher, heads, temperature)

    @staticmethod
    def _cast(weight: torch.Tensor) -> torch.Tensor:
        """In autocast's dtype where it is on, so that it is cast once a batch and not once a chunk."""
        device = weight.device.type
        return weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean divergence in nats a token for ids [B, T], with gradients to the student's parameters."""
        if self.heads is None:
            with torch.no_grad():
                wanted = self.teacher(input_ids=ids, use_cache=False).logits
            return logits_kl(self.student(input_ids=ids, use_cache=False).logits, wanted, self.temperature)
        with torch.no_grad():
            wanted = self.teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = self.student.base_model(input_ids=ids, use_cache=False).last_hidden_state
        weights = tuple(self._cast(head.weight.detach()) for head in self.heads)
        loss: torch.Tensor = _HiddenKL.apply(
            hidden.flatten(0, 1), wanted.flatten(0, 1), weights, self.temperature, self.chunk
        )
        return loss
