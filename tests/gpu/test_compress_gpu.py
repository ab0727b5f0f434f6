"""Compression on a GPU: sweeps in CUDA graphs, text written by the model, recovery, and low-rank layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from marlin import nn
from marlin.compress import LayerRecipe, Options, Recipe, Recovery, compress_model, graphs, recover, refine, solvers
from marlin.compress.hessian import factor, output_error
from marlin.compress.recipe import PLAIN
from marlin.compress.sampling import FREE, sample
from marlin.compress.solvers import activation_order, solve
from marlin.formats import LowRank
from tests.test_compress_recover import QUICK, compressed, stream, tiny
from tests.test_compress_solvers import problem

pytestmark = pytest.mark.gpu


def solved(kind: str, weight: torch.Tensor, hessian: torch.Tensor) -> solvers.Solution:
    recipe = LayerRecipe(kind=kind, group_size=32)
    order = activation_order(hessian, 32)
    solution = solve(weight, recipe, 32, hessian, factor(hessian[order][:, order], 0.01))
    return refine.refine(solution, weight, hessian, 0.01, 3)


@pytest.mark.parametrize("kind", ["w4a16_sp24", "w4a16_dense"])
def test_sweeps_in_graphs_find_what_they_find_step_by_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = (tensor.cuda() for tensor in problem())
    with warnings.catch_warnings():
        warnings.simplefilter("error", graphs.GraphWarning)
        replayed = [solved(kind, weight * scale, hessian) for scale in (1.0, 2.0)]
    graphs.release()

    def direct(function: Any, *tensors: Any, **static: Any) -> Any:
        return function(*tensors, **static)

    for module in (solvers, refine):
        monkeypatch.setattr(module, "replayed", direct)
    for scale, found in zip((1.0, 2.0), replayed, strict=True):
        expected = solved(kind, weight * scale, hessian)
        # Why not the same bits: copies into the graph's buffers may take another path through cuBLAS.
        errors = [output_error(weight * scale, each.dense, hessian) for each in (expected, found)]
        assert errors[1] == pytest.approx(errors[0], rel=0.02)
        canonical = found.weight()
        assert canonical is not None and torch.equal(canonical.to_dense(torch.float32), found.dense.cpu())


def test_compress_model_on_the_gpu_is_as_near_as_on_the_cpu() -> None:
    recipe = Recipe(default=LayerRecipe(group_size=32, low_rank=4))
    errors = []
    for device in ("cpu", "cuda"):
        options = Options(device, autocast="none")
        report = compress_model(tiny(), stream(192).view(6, 32), recipe, options=options).report
        errors.append(sum(row.relative_error or 0.0 for row in report))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_sample_writes_on_the_gpu_what_the_models_own_cache_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny().cuda()
    beginnings = torch.tensor([[1, 2, 3], [4, FREE, FREE]] * 64)
    ids = sample(dense, beginnings, 24, seed=3)
    monkeypatch.setattr(type(dense), "_supports_attention_backend", False)
    assert float((ids == sample(dense, beginnings, 24, seed=3)).float().mean()) > 0.9


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recovery_from_a_graph_has_the_bits_of_one_without(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, weights = compressed()
    quick = {**QUICK, "device": "cuda", "compile": "never", "accumulate": accumulate, "generated_tokens": 0}
    found, recorded = [], []
    for record in (graphs.record, lambda *args: None):
        with monkeypatch.context() as patch:
            patch.setattr("marlin.compress.training.record", lambda *args, own=record: _noted(recorded, own(*args)))
            given = Recovery(steps=6, **quick)
            found.append(recover(copy.deepcopy(model), dense, weights, stream(), recovery=given))
    assert recorded[0] is not None and recorded[1] is None
    assert found[0].report["history"] == found[1].report["history"]
    for name, weight in found[0].weights.items():
        assert torch.equal(weight.codes, found[1].weights[name].codes)


def _noted(found: list[Any], value: Any) -> Any:
    found.append(value)
    return value


def test_recover_on_the_gpu_lowers_the_divergence() -> None:
    dense, model, weights = compressed()
    settings = Recovery(steps=40, device="cuda", **QUICK)
    report = recover(copy.deepcopy(model), dense, weights, stream(), recovery=settings).report
    assert report["divergence"] < 0.98 * report["divergence_before"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reconstruct_on_the_gpu_brings_blocks_nearer(dtype: torch.dtype) -> None:
    recipe, model = Recipe(default=LayerRecipe(group_size=32, **PLAIN)), tiny().to(dtype)
    done = compress_model(model, stream(512).view(16, 32), recipe, options=Options("cuda", reconstruct=32))
    assert all(row.error_after < row.error_before for row in done.blocks)
    for name, weight in done.weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.to_dense(torch.float32).to(dtype))


def test_two_gpus_find_what_one_finds() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    recipe, errors = Recipe(default=LayerRecipe(group_size=32, low_rank=4)), []
    for device in ("cuda:0", "cuda:0,cuda:1", "cuda:1,cuda:0"):
        options = Options(device, autocast="none", reconstruct=4)
        report = compress_model(tiny(), stream(512).view(16, 32), recipe, options=options).report
        errors.append(sum(row.relative_error or 0.0 for row in report))
    assert errors[1:] == pytest.approx([errors[0]] * 2, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_rank_layer_adds_its_correction(dtype: torch.dtype) -> None:
    n, k, rank = 256, 512, 32
    plain = nn.SparseLinear.from_dense(torch.randn(n, k).to(dtype), group_size=64)
    low = LowRank(torch.randn(n, rank).to(dtype) / 16, torch.randn(rank, k).to(dtype) / 16)
    layer = nn.SparseLinear.from_weight(plain.to_weight(), None, dtype, low).cuda()
    for m in (1, 17, 64):
        act = torch.randn(m, k, device="cuda", dtype=dtype)
        wanted = act.double() @ layer.to_dense(torch.float32).double().T
        bound = (act.double().square() @ layer.to_dense(torch.float32).double().square().T).sqrt()
        unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        assert bool(((layer(act).double() - wanted).abs() <= 4 * unit * (wanted.abs() + bound)).all())
