"""What a published `quantization_config` says: which formats its layers may have, and the facts that readers need.

Owns the names of methods, formats, versions and options of other tools, and refuses by name what no reader here takes.
Knows nothing of tensors and files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marlin.formats.checkpoint import QUANT_METHOD
from marlin.formats.published.bitmask import SPARSE_24_BITMASK
from marlin.formats.published.common import COMPRESS_AGAIN, Facts, Format
from marlin.formats.published.gptq import AWQ, GPTQ
from marlin.formats.published.marlin_order import GPTQ_MARLIN_24, MARLIN, MARLIN_24
from marlin.formats.published.pack_quantized import PACK_QUANTIZED
from marlin.formats.safetensors_header import refuse

METHODS = ("compressed-tensors", "gptq", "awq", "marlin")
_CT_FORMATS = {form.name: form for form in (MARLIN_24, PACK_QUANTIZED)}
_GPTQ_FORMATS = {"gptq": GPTQ, "gptq_v2": GPTQ, "marlin": MARLIN, "marlin_24": GPTQ_MARLIN_24}


@dataclass(frozen=True)
class Described:
    """The formats that layers may have (one, but for mixed directories), and the facts common to all of them."""

    formats: tuple[Format, ...]
    facts: Facts


def _object(op: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise refuse(op, "it must be a JSON object", type(value).__name__)
    return value


def _check(op: str, key: str, value: Any, allowed: tuple[Any, ...], need: str, fix: str = COMPRESS_AGAIN) -> None:
    # Why by type as well: 1 == True and 4 == 4.0 in Python.
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise refuse(op, need, f"{key}={value!r}", fix)


def _ct_weights(op: str, weights: Any) -> int:
    """Group size of one `weights` entry of compressed-tensors. Raises: CheckpointError (what is not symmetric INT4)."""
    weights = _object(f"{op}, weights", weights)
    _check(op, "num_bits", weights.get("num_bits"), (4,), "weights must have 4 bits")
    _check(op, "type", str(weights.get("type", "int")).lower(), ("int",), "weights must be integers")
    _check(op, "symmetric", weights.get("symmetric", True), (True,), "quantization must be symmetric")
    _check(op, "dynamic", weights.get("dynamic", False), (False,), "scales of weights must be static")
    allowed = (None, False, "weight", "static")
    need = "groups must follow the columns (no activation reordering)"
    _check(op, "actorder", weights.get("actorder"), allowed, need, f"Use actorder=static or none. {COMPRESS_AGAIN}")
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if group_size == -1 else "group" if group_size else "tensor")
    _check(op, "strategy", strategy, ("group", "channel"), "scales must be per group or per channel")
    if strategy == "channel":
        return -1
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise refuse(op, "group_size must be a positive integer", f"group_size={group_size!r}")
    return group_size


def _ct_groups(op: str, config: Mapping[str, Any]) -> tuple[set[str], set[int]]:
    """Formats and group sizes of all `config_groups`."""
    names, sizes = set(), set()
    for name, entry in _object(op, config.get("config_groups") or {}).items():
        where = f"{op}, config_groups.{name}"
        if isinstance(entry, list):
            _check(where, "preset", name, ("W4A16",), "presets must be W4A16")
            sizes.add(128)
            continue
        entry = _object(where, entry)
        for key in ("input_activations", "output_activations"):
            _check(where, key, entry.get(key), (None,), "activations must not be quantized")
        sizes.add(_ct_weights(where, entry.get("weights")))
        if entry.get("format"):
            names.add(str(entry["format"]))
    return names, sizes


def _compressed_tensors(op: str, config: Mapping[str, Any]) -> Described:
    for key, need in (
        ("kv_cache_scheme", "the key-value cache must not be quantized"),
        ("transform_config", "weights must not need transforms at run time"),
    ):
        if config.get(key):
            raise refuse(op, need, f"{key} is set", COMPRESS_AGAIN)
    sparsity = _object(f"{op}, sparsity_config", config.get("sparsity_config") or {})
    sparse = sparsity.get("format") or "dense"
    names, sizes = _ct_groups(op, config)
    if sparse == SPARSE_24_BITMASK.name and not sizes:
        return Described((SPARSE_24_BITMASK,), Facts())
    need = f"sparsity_config.format must be dense, or {SPARSE_24_BITMASK.name} without config_groups"
    _check(op, "sparsity_config.format", sparse, ("dense",), need)
    whole = config.get("format")
    if whole != "mixed-precision":
        names.add(str(whole))
    unknown = sorted(names - set(_CT_FORMATS))
    if unknown or not names:
        need = f"format must be {' or '.join(_CT_FORMATS)}, or {SPARSE_24_BITMASK.name} in sparsity_config"
        raise refuse(op, need, ", ".join(map(repr, unknown)) or "none", COMPRESS_AGAIN)
    return Described(tuple(_CT_FORMATS[name] for name in sorted(names)), Facts(tuple(sorted(sizes))))


def _stated_group_sizes(op: str, config: Mapping[str, Any], *keys: str) -> tuple[int, ...]:
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    if value is None:
        return ()
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise refuse(op, f"{keys[0]} must be a positive integer or -1", repr(value))
    return (value,)


def _gptq(op: str, config: Mapping[str, Any]) -> Described:
    _check(op, "bits", config.get("bits", 4), (4,), "weights must have 4 bits")
    _check(op, "sym", config.get("sym", True), (True,), "quantization must be symmetric")
    overrides = config.get("dynamic") or {}
    if any(not str(pattern).startswith("-:") for pattern in overrides):
        raise refuse(op, "all layers must be quantized alike", "dynamic with overrides per layer", COMPRESS_AGAIN)
    stated = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_24_format"):
        stated = "marlin_24"
    elif config.get("is_marlin_format"):
        stated = "marlin"
    need = f"checkpoint_format must be one of {', '.join(_GPTQ_FORMATS)}"
    _check(op, "checkpoint_format", stated, tuple(_GPTQ_FORMATS), need)
    sizes = _stated_group_sizes(op, config, "group_size")
    return Described((_GPTQ_FORMATS[stated],), Facts(sizes, zero_nibble=7 if stated == "gptq" else 8))


def _awq(op: str, config: Mapping[str, Any]) -> Described:
    bits = config.get("bits", config.get("w_bit", 4))
    _check(op, "bits", bits, (4,), "weights must have 4 bits")
    version = str(config.get("version", "gemm")).lower()
    _check(op, "version", version, ("gemm",), 'the order of AWQ must be "gemm"')
    return Described((AWQ,), Facts(_stated_group_sizes(op, config, "group_size", "q_group_size")))


def describe_published(config: Any, source: str) -> Described:
    """What a `quantization_config` of another tool says. source: the file that errors name.

    Raises: CheckpointError (method, format, version, bits, asymmetry, activation reordering, quantized activations).
    """
    op = f"{source}, quantization_config"
    config = _object(op, config)
    method = config.get("quant_method") or ("compressed-tensors" if "config_groups" in config else None)
    if method == "compressed-tensors":
        return _compressed_tensors(op, config)
    if method == "awq":
        return _awq(op, config)
    if method in ("gptq", "gptq_marlin_24", "marlin"):
        implied = {"gptq_marlin_24": "marlin_24", "marlin": "marlin"}.get(method)
        return _gptq(op, {**config, "checkpoint_format": implied} if implied else config)
    fix = "It is in our packed layout already." if method == QUANT_METHOD else COMPRESS_AGAIN
    raise refuse(op, f"quant_method must be one of {', '.join(METHODS)}", repr(method), fix)
