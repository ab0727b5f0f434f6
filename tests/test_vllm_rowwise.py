"""Norms and SiLU-and-multiply in vLLM's own registry of operators, on the CPU: who computes which, and what comes out.

Runs where vLLM's Python package can be imported. Its own kernels are replaced by a mark, since they need its libraries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("vllm", reason="needs the Python package vllm")
try:
    from vllm.config import CompilationConfig, DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
except ImportError as error:
    pytest.skip(f"vllm lacks a package that it needs: {error}", allow_module_level=True)

from marlin import ops
from marlin.integrations.vllm import kernel, register, rowwise
from marlin.integrations.vllm.config import SparseMarlinConfig

H, EPS = 1024, 1e-5
THEIRS = "theirs"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setattr(RMSNorm, "forward_cuda", lambda self, x, residual=None: THEIRS)
    monkeypatch.setattr(SiluAndMul, "forward_cuda", lambda self, x: THEIRS)
    monkeypatch.setattr(kernel, "_kept", 0)
    monkeypatch.delenv("MARLIN_VLLM_ROWWISE", raising=False)


@contextmanager
def model(ours: bool = True, mode: int = 0, **named: Any) -> Iterator[CompilationConfig]:
    """vLLM's configuration while it builds a model. mode: of compilation."""
    config = VllmConfig(device_config=DeviceConfig("cpu"), compilation_config=CompilationConfig(mode=mode, **named))
    config.quant_config = SparseMarlinConfig({}) if ours else None
    with set_current_vllm_config(config):
        yield config.compilation_config


def norm(size: int = H, **named: Any) -> Any:
    return RMSNorm(size, eps=EPS, dtype=torch.float16, **named)


def values(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def is_theirs(result: Any) -> bool:
    return isinstance(result, str) and result == THEIRS


def test_registration_takes_both_places_once_and_keeps_their_names():
    register()
    assert custom_op.op_registry_oot["RMSNorm"] is rowwise.MarlinRMSNorm
    assert custom_op.op_registry_oot["SiluAndMul"] is rowwise.MarlinSiluAndMul
    assert (rowwise.MarlinRMSNorm.name, rowwise.MarlinSiluAndMul.name) == ("rms_norm", "silu_and_mul")
    assert (RMSNorm.name, SiluAndMul.name) == ("rms_norm", "silu_and_mul")


def test_whoever_came_first_stays(monkeypatch: pytest.MonkeyPatch):
    class Other(RMSNorm):
        name = "rms_norm"

    monkeypatch.setitem(custom_op.op_registry_oot, "RMSNorm", Other)
    register()
    assert custom_op.op_registry_oot["RMSNorm"] is Other


def test_layers_of_our_models_are_ours_and_compute_the_operators():
    with model():
        layer, act = norm(), SiluAndMul()
    assert isinstance(layer, RMSNorm) and isinstance(act, SiluAndMul)
    layer.weight.data.copy_(values(H))
    x, residual = values(3, H), values(3, H) + 1
    before = x.clone(), residual.clone()
    with torch.inference_mode():
        assert torch.equal(layer(x), ops.rms_norm(x, layer.weight, EPS))
        found, wanted = layer(x, residual), ops.fused_add_rms_norm(x, residual, layer.weight, EPS)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        assert torch.equal(act(x), ops.silu_and_mul(x))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_values_are_those_of_vllm():
    with model():
        layer = norm()
    layer.weight.data.copy_(values(H))
    x, residual = values(3, H), values(3, H) + 1
    # Its plain formulation does not round the sum before it is normed.
    with torch.inference_mode():
        for found, wanted in zip(layer(x, residual), RMSNorm.forward_native(layer, x, residual), strict=True):
            torch.testing.assert_close(found, wanted, rtol=2**-9, atol=2**-12)
        torch.testing.assert_close(layer(x), RMSNorm.forward_native(layer, x), rtol=2**-9, atol=2**-12)


def test_layers_of_other_models_are_theirs():
    with model(ours=False):
        layer, act = norm(), SiluAndMul()
    x = values(3, H)
    assert is_theirs(layer(x)) and is_theirs(layer(x, x)) and is_theirs(act(x))


def test_switch_leaves_all_to_vllm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MARLIN_VLLM_ROWWISE", "0")
    with model(mode=3) as compilation:
        layer, act = norm(), SiluAndMul()
    assert compilation.custom_ops == ["none"]
    assert is_theirs(layer.forward_cuda(values(3, H))) and is_theirs(act.forward_cuda(values(3, H)))
    monkeypatch.setenv("MARLIN_VLLM_ROWWISE", "yes")
    with pytest.raises(ValueError, match=r"^MARLIN_VLLM_ROWWISE: it must be 0 or 1; got 'yes'\.$"), model():
        norm()


def test_layers_beside_a_kernel_that_kept_some_are_ours(monkeypatch: pytest.MonkeyPatch):
    with model(ours=False):
        layer, act = norm(), SiluAndMul()
    x = values(3, H)
    monkeypatch.setattr(kernel, "_kept", 1)  # by the first forward, weights are loaded
    assert not is_theirs(layer(x)) and not is_theirs(act(x))
    monkeypatch.setenv("MARLIN_VLLM_ROWWISE", "0")
    with model(ours=False):
        layer, act = norm(), SiluAndMul()
    assert is_theirs(layer(x)) and is_theirs(act(x))


@pytest.mark.parametrize(
    ("size", "named", "x"),
    [
        (128, {}, values(3, 128)),
        (1020, {}, values(3, 1020)),
        (40960, {}, values(1, 40960)),
        (H, {"has_weight": False}, values(3, H)),
        (H, {"var_hidden_size": 512}, values(3, H)),
        (H, {}, values(3, H, dtype=torch.float32)),
        (H, {}, values(3, H, dtype=torch.bfloat16)),
        (H, {}, values(3, 2 * H)),
    ],
    ids=["heads", "multiple", "wide", "no-weight", "variance", "float32", "mixed", "other-width"],
)
def test_norms_that_do_not_fit_are_theirs(size: int, named: dict[str, Any], x: Tensor):
    with model():
        layer = norm(size, **named)
    assert is_theirs(layer(x))


def test_a_residual_of_another_dtype_is_theirs():
    with model():
        layer = norm()
    assert is_theirs(layer(values(3, H), values(3, H, dtype=torch.float32)))


def test_halves_that_do_not_fit_are_theirs():
    with model():
        act = SiluAndMul()
    assert is_theirs(act(values(3, 2 * 100))) and is_theirs(act(values(3, 32, dtype=torch.float32)))
    assert not is_theirs(act(values(3, 2 * 104)))


def test_other_norms_keep_their_class():
    with model():
        assert type(GemmaRMSNorm(H)) is GemmaRMSNorm


def test_compiled_models_name_both_in_their_configuration():
    with model(mode=3) as compilation:
        layer, act = norm(), SiluAndMul()
        norm()
        assert compilation.custom_ops == ["none", "+rms_norm", "+silu_and_mul"]
    assert not is_theirs(layer(values(3, H))) and not is_theirs(act(values(3, H)))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        out, total = layer(x, residual)
        return act(out), total

    x = values(3, H)
    with torch.no_grad():
        out, total = ops.fused_add_rms_norm(x, x, layer.weight.data, EPS)
        found = block(x, x)
    assert torch.equal(found[0], ops.silu_and_mul(out)) and torch.equal(found[1], total)


@pytest.mark.parametrize(
    ("ours", "named", "expected"),
    [
        (False, {}, ["none"]),
        (True, {"custom_ops": ["none", "-rms_norm", "-silu_and_mul"]}, ["none", "-rms_norm", "-silu_and_mul"]),
        (True, {"custom_ops": ["none", "+rms_norm"]}, ["none", "+rms_norm", "+silu_and_mul"]),
        (True, {"custom_ops": ["all", "-rms_norm"]}, ["all", "-rms_norm"]),
    ],
    ids=["other-model", "off", "on", "all"],
)
def test_what_the_user_says_of_them_stays(ours: bool, named: dict[str, Any], expected: list[str]):
    with model(ours, mode=3, **named) as compilation:
        layer, act = norm(), SiluAndMul()
        assert compilation.custom_ops == expected
        assert layer.enabled() == ("+rms_norm" in expected)
        assert act.enabled() == ("+silu_and_mul" in expected or "all" in expected)


def test_norms_that_a_pass_joins_with_the_exchange_between_ranks_are_left_alone():
    with model(mode=3) as compilation:
        compilation.pass_config.fuse_allreduce_rms = True
        norm()
        assert compilation.custom_ops == ["none"]
