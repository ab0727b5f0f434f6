"""LoRA adapters of `peft` on frozen `SparseLinear` layers.

Owns the adapter layer, and its place in the configurations of peft, through the dispatch that peft offers for layers
that it does not know. Must not know formats or kernels. Imported once `peft.tuners.lora.model` is (see
`marlin.integrations.transformers`). Needs peft 0.20 or newer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear

from marlin.errors import UnsupportedError, message, require
from marlin.nn import SparseLinear

# The ways to begin that read the inputs or nothing; all others take the dense weight apart.
STARTS = (True, False, "gaussian", "eva")
_OP = "LoRA on SparseLinear"


class SparseLoraLinear(Linear):
    """A `SparseLinear` and low-rank adapters beside it: out = base(act) + scaling * B(A(dropout(act))).

    act [..., in_features]; returns [..., out_features] of the base layer's dtype. Adapters are trained and saved, the
    base is not; they cannot be merged into it.
    Raises: ValueError (a variant or a start that needs the dense weight), UnsupportedError (an older peft).
    """

    def __init__(self, base_layer: torch.nn.Module, adapter_name: str, **options: Any) -> None:
        if "config" not in options:
            fix = "Update it: pip install -U peft."
            raise UnsupportedError(message(_OP, "peft must be 0.20 or newer", "an older one", fix))
        super().__init__(base_layer, adapter_name, **options)

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        assert isinstance(module, SparseLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Variants of LoRA that work here: none but the plain one, scaled by rank or by its square root."""
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **options: Any) -> None:
        """None, the plain variant. Raises: ValueError (any other)."""
        try:
            super().resolve_lora_variant(config=config, **options)
        except ValueError as error:
            fix = "Turn DoRA and other variants off, or leave compressed layers out of target_modules."
            raise ValueError(message(_OP, "adapters must be plain LoRA", str(error), fix)) from error

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        """Add an adapter. Raises: ValueError (init_lora_weights that needs the dense weight)."""
        start = config.init_lora_weights
        fix = "Pass True, or leave compressed layers out of target_modules."
        require(start in STARTS, _OP, f"init_lora_weights must be one of {STARTS}", repr(start), fix)
        super().update_layer(adapter_name, r, lora_alpha, config=config, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the sum would be neither INT4 nor 2:4. Raises: UnsupportedError."""
        base = self.get_base_layer()
        got = f"{type(base).__name__} of kind {base.kind}"
        fix = "Keep the adapter beside the model, or load the model, call dequantize() and merge into that."
        raise UnsupportedError(message("merge LoRA", "the base layer must be dense", got, fix))


def register() -> None:
    """Make every `LoraConfig` from now on put `SparseLoraLinear` on `SparseLinear`; a second call changes nothing.

    Configurations know their custom layers one by one, so that each gets the entry when it is made: by hand, by
    `PeftModel.from_pretrained`, or by `load_adapter`.
    """
    original = LoraConfig.__post_init__
    if getattr(original, "registers_sparse_linear", False):
        return

    @functools.wraps(original)
    def post_init(self: LoraConfig) -> None:
        original(self)
        self._register_custom_module({SparseLinear: SparseLoraLinear})

    post_init.registers_sparse_linear = True  # type: ignore[attr-defined]
    LoraConfig.__post_init__ = post_init
