"""The quantization method `sparse_marlin` of vLLM: which checkpoints are ours, and which of their layers.

Owns the translation from a description in config.json to specs of vLLM's layers, by their names and those of the parts
that vLLM merges. Two kinds of description: ours, which lists layers, and marlin-24 (compressed-tensors and GPTQ), which
lists exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from marlin.errors import CheckpointError, UnsupportedError, message
from marlin.formats.checkpoint import CONFIG_FILE, QUANT_METHOD, LayerSpec, parse_description
from marlin.formats.published import GPTQ_MARLIN_24, MARLIN_24, describe_published
from marlin.integrations.vllm.linear import SparseMarlinLinearMethod

_CONVERT = "Convert the checkpoint: marlin convert DIR OUT."


class SparseMarlinConfig(QuantizationConfig):
    """Layers of a model that are packed, by the names that vLLM gives them.

    layers: specs of ours by checkpoint name; otherwise `everywhere` is the spec of all linears but those that `ignore`
    names ("re:" begins a pattern).
    """

    def __init__(
        self, layers: Mapping[str, LayerSpec], everywhere: LayerSpec | None = None, ignore: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.layers = dict(layers)
        self.everywhere = everywhere
        self.ignore = list(ignore)

    def __repr__(self) -> str:
        what = f"{len(self.layers)} layers" if self.everywhere is None else self.everywhere.kind
        return f"{type(self).__name__}({what})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @staticmethod
    def get_cache_scale_mapper() -> Any:
        """vLLM's own names, without the scratch memory that some GPTQ checkpoints carry."""
        return QuantizationConfig.get_cache_scale_mapper() | WeightsMapper(orig_to_new_suffix={".workspace": None})

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, **_: Any
    ) -> str | None:
        """Ours for marlin-24, unless the user asked for another method."""
        if user_quant in (None, QUANT_METHOD, "gptq", "compressed-tensors") and _is_marlin_24(hf_quant_cfg):
            return QUANT_METHOD
        return None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SparseMarlinConfig:
        """Of a `quantization_config`. Raises: CheckpointError (what no reader takes, by name)."""
        if config.get("quant_method") == QUANT_METHOD:
            return cls(parse_description(config))
        described = describe_published(config, CONFIG_FILE)
        forms, sizes = described.formats, described.facts.group_sizes
        if len(forms) != 1 or forms[0] not in (MARLIN_24, GPTQ_MARLIN_24) or len(sizes) != 1:
            got = f"{', '.join(form.name for form in forms)}; group sizes {list(sizes)}"
            need = "all layers must be in one marlin-24 format with one group size"
            raise CheckpointError(message(f"{CONFIG_FILE}, quantization_config", need, got, _CONVERT))
        ignore = (config.get("ignore") or ()) if forms[0] is MARLIN_24 else ("lm_head",)
        return cls({}, LayerSpec(forms[0].name, sizes[0], 0, 0), ignore)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names as vLLM's model has them."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Ours where any part of the layer is packed, vLLM's unquantized one elsewhere, None for what is no linear."""
        if not isinstance(layer, LinearBase | ParallelLMHead):
            self._check_no_experts(layer, prefix)
            return None
        specs = self._specs(prefix, layer)
        if all(spec is None for spec in specs):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        return SparseMarlinLinearMethod(prefix, specs)

    def _parts(self, prefix: str) -> list[str]:
        """Checkpoint layers that vLLM merges into this one, or its own name."""
        parent, dot, own = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(own, ())] or [prefix]

    def _specs(self, prefix: str, layer: nn.Module) -> list[LayerSpec | None]:
        if self.everywhere is None:
            names = [prefix] if prefix in self.layers else self._parts(prefix)
            return [self.layers.get(name) for name in names]
        if isinstance(layer, ParallelLMHead):
            return [None]
        names = [prefix] if self._ignores(prefix) else self._parts(prefix)
        return [None if self._ignores(name) else self.everywhere for name in names]

    def _ignores(self, name: str) -> bool:
        patterns = [text.removeprefix("re:") for text in self.ignore if text.startswith("re:")]
        return name in self.ignore or any(re.match(pattern, name) for pattern in patterns)

    def _check_no_experts(self, layer: nn.Module, prefix: str) -> None:
        below = [name for name in self.layers if name.startswith(f"{prefix}.")]
        if below and "MoE" in type(layer).__name__:
            need = "experts of a mixture must not be packed"
            fix = "Leave them dense: compress with a rule that skips them."
            raise UnsupportedError(message(f"layer {prefix}", need, below[0], fix))


def _is_marlin_24(config: Mapping[str, Any]) -> bool:
    """Whether a description is in the published 2:4 format, of either tool."""
    method = str(config.get("quant_method") or ("compressed-tensors" if "config_groups" in config else ""))
    if method == "compressed-tensors":
        return bool(config.get("format") == MARLIN_24.name)
    if method == "gptq":
        stated = config.get("checkpoint_format") or config.get("format")
        return bool(config.get("is_marlin_24_format")) or stated == "marlin_24"
    return method == "gptq_marlin_24"


def register() -> None:
    """Enter the method; a second call changes nothing."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(SparseMarlinConfig)
