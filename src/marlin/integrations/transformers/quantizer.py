"""The quantizer `sparse_marlin` of transformers: linears become `SparseLinear` on the meta device, then tensors load.

Owns: the translation between a description (`marlin.formats.checkpoint`) and a model of transformers, both ways. Knows
nothing of how tensors are packed or multiplied. Works with transformers 5.0 and later.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from marlin import experts, nn
from marlin.errors import CheckpointError, message
from marlin.formats import checkpoint
from marlin.formats.checkpoint import QUANT_METHOD, VERSION, LayerSpec
from marlin.formats.safetensors_header import read_header
from marlin.formats.weight import SCALE_DTYPES
from marlin.integrations.transformers import parallel

_PUBLISHED_EXPERT = re.compile(r"\.experts\.\d+\.gate_proj$")


class SparseMarlinConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed model; `layers` maps module names to kind, group_size and shape [N, K].

    Raises: CheckpointError (see `marlin.formats.checkpoint.parse_description`).
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        version: int = VERSION,
        quant_method: str = QUANT_METHOD,
        **_: Any,
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.layers = {} if layers is None else layers
        self.specs()

    def specs(self) -> dict[str, LayerSpec]:
        """The layers, checked."""
        return checkpoint.parse_description(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as in config.json."""
        return {"quant_method": self.quant_method, "version": self.version, "layers": copy.deepcopy(self.layers)}


def _module_names(model: Any, specs: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """The specs under the names that this class of model gives its modules.

    A base model (AutoModel) lacks the prefix and the head of the model that was saved, and the other way around.
    """
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    present = {name for name, _ in model.named_modules()}
    if not prefix or any(name in present for name in specs):
        return dict(specs)
    if any(name.removeprefix(prefix) in present for name in specs):
        return {name.removeprefix(prefix): spec for name, spec in specs.items() if name.startswith(prefix)}
    if any(prefix + name in present for name in specs):
        return {prefix + name: spec for name, spec in specs.items()}
    return dict(specs)


def _split_experts(model: Any, specs: Mapping[str, LayerSpec], source: str) -> None:
    """Make linear layers of the experts that were compressed as such. Raises: CheckpointError (only some of them)."""
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    known = {name.removeprefix(prefix) for name in specs}
    published = any(_PUBLISHED_EXPERT.search(name) for name in known)
    leaves = experts.PUBLISHED_LEAVES if published else experts.LEAVES
    try:
        experts.split(model, lambda name: name.removeprefix(prefix) in known, leaves)
    except ValueError as error:
        fix = "config.json was altered: copy or download it again."
        need = "quantization_config must name all layers of a mixture's experts, or none"
        raise CheckpointError(message(f"load {source}", need, "some of them", fix)) from error


def _replace_linear(model: torch.nn.Module, name: str, spec: LayerSpec, source: str) -> None:
    """Put an empty SparseLinear on the meta device where the model has the linear `name`."""
    op = f"load {source}"
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, torch.nn.Linear):
        got = "no such module" if linear is None else type(linear).__name__
        fix = "config.json describes another model, or another class of it: load it as the class it was saved from."
        raise CheckpointError(message(op, f"quantized layer {name} must be a torch.nn.Linear of the model", got, fix))
    if (linear.out_features, linear.in_features) != (spec.n, spec.k):
        got = f"[{spec.n}, {spec.k}] in quantization_config"
        need = f"layer {name} must have shape [{linear.out_features}, {linear.in_features}], that of the model"
        raise CheckpointError(message(op, need, got, "config.json was altered: copy or download it again."))
    dtype = linear.weight.dtype
    if dtype not in SCALE_DTYPES:
        raise ValueError(message(op, "dtype must be float16, bfloat16 or float32", str(dtype), "Pass another dtype."))
    parent, _, leaf = name.rpartition(".")
    empty = nn.SparseLinear(
        spec.k,
        spec.n,
        kind=spec.kind,
        group_size=spec.group_size,
        bias=linear.bias is not None,
        dtype=dtype,
        device="meta",
        low_rank=spec.low_rank,
    )
    empty.train(linear.training)
    setattr(model.get_submodule(parent), leaf, empty)


def _check_files(model: Any, specs: Mapping[str, LayerSpec], files: Sequence[str] | None) -> None:
    """Headers and places of the files about to be loaded, where they can be known beforehand.

    Raises: CheckpointError.
    """
    root = Path(getattr(model.config, "name_or_path", "") or "")
    if files is None:
        # Before version 5, the quantizer is not told the files: look where transformers will.
        if not (root / checkpoint.CONFIG_FILE).is_file():
            return
        tensors = checkpoint.read_headers(root)
    else:
        paths = [Path(file) for file in files]
        if not paths or any(path.suffix != ".safetensors" for path in paths):
            return
        root = root if root.is_dir() and all(path.is_relative_to(root) for path in paths) else paths[0].parent
        tensors = {}
        for path in paths:
            tensors |= read_header(checkpoint.check_inside(root, path, str(root)))
    # Why: where transformers renames tensors on loading, their names in the files are not those of the modules.
    renamed = not any(f"{name}.codes" in tensors for name in specs) and any(t.endswith(".codes") for t in tensors)
    if not renamed:
        checkpoint.check_layer_tensors(specs, tensors, str(root))


class SparseMarlinQuantizer(HfQuantizer):
    """Loads and saves models whose linears are `marlin.nn.SparseLinear`."""

    requires_calibration = True
    quantization_config: SparseMarlinConfig

    def update_dtype(self, dtype: Any) -> Any:
        """The dtype of the checkpoint where none was asked for."""
        return "auto" if dtype is None else dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        specs = self.quantization_config.specs()
        _check_files(model, specs, kwargs.get("checkpoint_files"))
        source = getattr(model.config, "name_or_path", "") or type(model).__name__
        _split_experts(model, specs, source)
        for name, spec in _module_names(model, specs).items():
            _replace_linear(model, name, spec, source)
        parallel.update_plan(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        source = getattr(model.config, "name_or_path", "") or type(model).__name__
        fix = "Scales beyond float16 need dtype=torch.bfloat16; otherwise copy or download the files again."
        parallel.check_loaded(model)
        for name, layer in nn.sparse_linears(model):
            if layer.scales.device.type != "meta":  # offloaded to disk: its values come later
                meta, scales = parallel.local(layer.meta), parallel.local(layer.scales)
                checkpoint.check_values(f"{source}, layer {name}", meta, scales, fix)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        parallel.check_whole(model)
        for name, layer in list(nn.sparse_linears(model)):
            weight = layer.to_dense(dtype)
            linear = torch.nn.Linear(
                layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=weight.dtype
            )
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                linear.bias = torch.nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Whether the model can be saved: as safetensors."""
        return safe_serialization is not False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model; its codes stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes the model."""
        return True


def register() -> None:
    """Enter both classes in the registries of transformers; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparseMarlinConfig)
        register_quantizer(QUANT_METHOD)(SparseMarlinQuantizer)


def describe_model(model: torch.nn.Module) -> dict[str, LayerSpec]:
    """The description of a model's `SparseLinear` layers, by module name."""
    specs = {}
    for name, layer in nn.sparse_linears(model):
        rank = 0 if layer.low_rank is None else layer.low_rank.rank
        specs[name] = LayerSpec(layer.kind, layer.group_size, layer.out_features, layer.in_features, rank)
    return specs


def attach(model: Any) -> None:
    """Make a model of transformers whose linears were replaced one that it takes for quantized, and can save.

    An output head that was compressed is no longer tied to the embedding.
    Raises: CheckpointError (a layer with illegal metadata or scales that are not finite).
    """
    specs = describe_model(model)
    config = SparseMarlinConfig(**checkpoint.describe(specs))
    quantizer = SparseMarlinQuantizer(config)
    _untie(model, specs)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    quantizer.postprocess_model(model)


def _untie(model: Any, specs: Mapping[str, LayerSpec]) -> None:
    """Forget ties of weights that are no longer there."""
    gone = {f"{name}.weight" for name in specs}
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        tied = getattr(model, attribute, None)
        if isinstance(tied, dict) and gone & set(tied):
            setattr(model, attribute, {key: value for key, value in tied.items() if key not in gone})
    if isinstance(model.get_output_embeddings(), nn.SparseLinear):
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
