"""Low-rank corrections: the closed form is the best, alternation lowers the error, what is saved loads and counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin import api, nn
from marlin.cli.compress import read_recipe
from marlin.compress import LayerRecipe, Options, Recipe, Recovery, compress_model
from marlin.compress import low_rank as module
from marlin.compress.hessian import damped, factor, output_error
from marlin.compress.low_rank import best_low_rank, corrected
from marlin.compress.refine import refine
from marlin.compress.solvers import activation_order, solve
from marlin.convert import convert
from marlin.errors import CheckpointError
from marlin.formats import LowRank
from marlin.formats.checkpoint import LayerSpec, describe, open_directory, parse_description, read_directory_summary
from tests.test_cli import run
from tests.test_compress_recover import QUICK, stream, tiny
from tests.test_compress_solvers import N, problem

RANK = 4
RECIPE = Recipe(default=LayerRecipe(group_size=32, low_rank=RANK))
IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(IDS).logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(model in float32, what compress returned, directory)."""
    torch.manual_seed(0)
    model = tiny()
    done = api.compress(model, stream(192).view(6, 32), RECIPE, options=Options(autocast="none"))
    directory = tmp_path_factory.mktemp("model") / "out"
    api.save_pretrained(model, directory, report=done, recipe=RECIPE)
    return model, done, directory


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_best_low_rank_is_the_truncated_svd_in_the_metric_of_the_inputs(shape: tuple[int, int]) -> None:
    n, k = shape
    inputs = torch.randn(200, k) * torch.rand(k).mul(3).exp()
    hessian = damped(inputs.T @ inputs / 200, 0.01)
    error = torch.randn(n, k)
    root = torch.linalg.cholesky(hessian.double())
    values = torch.linalg.svdvals(error.double() @ root)
    found = best_low_rank(error, hessian, RANK).validate(n, k)
    left = (error - found.to_dense()).double() @ root
    # Why not equal: the factors are rounded to float16.
    assert float(left.square().sum()) == pytest.approx(float(values[RANK:].square().sum()), rel=1e-3)
    assert found.rank == RANK and best_low_rank(error, None, 1000).rank == min(n, k)


@pytest.mark.parametrize("kind", ["w4a16_sp24", "w4a16_dense"])
def test_corrected_lowers_the_error_with_each_alternation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem()
    recipe = LayerRecipe(kind=kind, group_size=32, low_rank=RANK)
    order = activation_order(hessian, 32)
    solution = solve(weight, recipe, 32, hessian, factor(hessian[order][:, order], 0.01))
    solution = refine(solution, weight, hessian, 0.01, 3)
    errors = [output_error(weight, solution.dense, hessian)]
    for count in (0, 1, 4):
        monkeypatch.setattr(module, "ALTERNATIONS", count)
        found, parts = corrected(solution, weight, hessian, [N // 4, N - N // 4], recipe)
        dense = found.dense + torch.cat([part.to_dense() for part in parts])
        errors.append(output_error(weight, dense, hessian))
        canonical = found.weight()
        assert canonical is not None and torch.equal(canonical.to_dense(torch.float32), found.dense)
    assert errors[1] < 0.9 * errors[0]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.99 * errors[1]


def test_compressed_model_is_what_is_saved_and_loaded(saved: tuple[Any, Any, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model, done, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(loaded), logits(model))
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.low_rank.rank == RANK and "low_rank=4" in repr(layer)
    assert torch.equal(layer.low_rank.up, done.low_rank["model.layers.0.mlp.down_proj"].up.float())
    dense = copy.deepcopy(loaded)
    dense.dequantize()
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)
    half = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16)
    assert half.model.layers[0].mlp.down_proj.low_rank_up.dtype == torch.float16
    assert torch.allclose(logits(half).float(), logits(model), atol=0.05)


def test_correction_brings_the_model_closer(saved: tuple[Any, Any, Path]) -> None:
    model = saved[0]
    plain = tiny()
    api.compress(plain, stream(192).view(6, 32), Recipe(default=LayerRecipe(group_size=32)), options=Options())
    wanted = logits(tiny())
    assert (logits(model) - wanted).norm() < 0.95 * (logits(plain) - wanted).norm()


def test_bits_of_a_correction_are_counted(saved: tuple[Any, Any, Path]) -> None:
    _, done, directory = saved
    row = next(row for row in done.report if row.name.endswith("mlp.up_proj"))
    assert row.low_rank == RANK and row.bits_per_weight == 3.5 + 16 * RANK * (96 + 64) / (96 * 64)
    body = json.loads((directory / "config.json").read_text())["quantization_config"]["layers"]
    assert body["model.layers.0.mlp.up_proj"] == {
        "kind": "w4a16_sp24",
        "group_size": 32,
        "shape": [96, 64],
        "low_rank": RANK,
    }
    layer = next(x for x in read_directory_summary(directory).layers if x.name == "model.layers.0.mlp.up_proj")
    held = saved[0].get_submodule(layer.name)
    assert layer.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in held.buffers())
    result = run("inspect", str(directory), "--no-zeros")
    assert result.exit_code == 0 and "w4a16_sp24, rank 4" in result.output


def test_resumed_compression_has_the_same_corrections(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        options = Options(autocast="none", resume_dir=tmp_path)
        results.append(compress_model(tiny(), stream(192).view(6, 32), RECIPE, options=options))
    assert results[0].low_rank.keys() == results[1].low_rank.keys() == results[0].weights.keys()
    for name, low in results[0].low_rank.items():
        assert torch.equal(low.up, results[1].low_rank[name].up)
        assert torch.equal(low.down, results[1].low_rank[name].down)


def test_recover_trains_around_a_correction(saved: tuple[Any, Any, Path]) -> None:
    model = copy.deepcopy(saved[0])
    before = {name: layer.low_rank for name, layer in nn.sparse_linears(model)}
    report = api.recover(model, tiny(), stream(), recovery=Recovery(steps=20, **QUICK))
    assert report["divergence"] < report["divergence_before"]
    for name, layer in nn.sparse_linears(model):
        old = before[name]
        assert old is not None and layer.low_rank is not None and torch.equal(layer.low_rank.up, old.up)


def test_what_has_no_place_for_a_correction_refuses_it(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    directory = saved[2]
    with pytest.raises(ValueError) as caught:
        convert(directory, tmp_path / "out", to="pack-quantized")
    assert str(caught.value) == (
        f"convert {directory}: layers must have no low-rank correction; got model.layers.0.mlp.down_proj: rank 4. "
        "That format has no place for it: compress without --low-rank."
    ).replace("model.layers.0.mlp.down_proj", next(iter(open_directory(directory).layers)))
    described = describe({"a.b": LayerSpec("w4a16_sp24", 32, 64, 64, 8)})
    assert parse_description(described)["a.b"].low_rank == 8
    described["layers"]["a.b"]["low_rank"] = 65
    with pytest.raises(CheckpointError, match=r"layer a\.b: low_rank must be at most 64; got 65\."):
        parse_description(described)
    described["layers"]["a.b"]["low_rank"] = 0
    with pytest.raises(CheckpointError, match=r"layer a\.b: low_rank must be a positive integer; got 0\."):
        parse_description(described)
    with pytest.raises(ValueError) as kinds:
        LayerRecipe(kind="sp24", low_rank=4)
    assert str(kinds.value) == "LayerRecipe: only kinds w4a16_sp24, w4a16_dense take a low_rank; got sp24, low_rank=4."


def test_low_rank_checks_its_parts() -> None:
    up, down = torch.zeros(8, 2), torch.zeros(2, 16)
    assert LowRank(up, down).validate(8, 16).rank == 2
    with pytest.raises(ValueError, match=r"^LowRank: up and down must have shapes \[8, r\] and \[r, 32\]; got "):
        LowRank(up, down).validate(8, 32)
    with pytest.raises(TypeError, match=r"^LowRank: up and down must both be float16, bfloat16 or float32; got "):
        LowRank(up.half(), down).validate(8, 16)
    with pytest.raises(ValueError, match=r"^LowRank: values must be finite; got NaN or inf\.$"):
        LowRank(up * torch.nan, down).validate(8, 16)


def test_read_recipe_gives_the_rank_to_all_that_is_packed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    rules = (("*.mlp.*", LayerRecipe(kind="w4a16_dense")), ("*.o_proj", LayerRecipe(kind="skip")))
    path.write_text(Recipe(rules, LayerRecipe()).to_json())
    recipe = read_recipe(str(path), None, None, 16)
    assert [layer.low_rank for _, layer in recipe.rules] == [16, 0] and recipe.default.low_rank == 16
    assert Recipe.from_json(recipe.to_json()) == recipe
