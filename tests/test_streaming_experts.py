"""Mixtures of experts compressed out of the files: what published checkpoints name one by one, and what they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

from marlin import api, experts, streaming  # noqa: E402
from marlin.compress import LayerRecipe, Options, Recipe, block  # noqa: E402
from marlin.errors import CheckpointError, UnsupportedError  # noqa: E402
from marlin.shards import Shards  # noqa: E402
from tests.test_cli import error_of  # noqa: E402
from tests.test_experts import AT, MODELS, RECIPE, tiny, tokens  # noqa: E402
from tests.test_streaming import tensors_of  # noqa: E402

PRECISION = streaming.Precision(torch.float32, torch.float16)
EXACT = Options(autocast="none")
SKIPS = Recipe((("*.experts.*", LayerRecipe(kind="skip")),), RECIPE.default)


def saved(folder: Path, name: str) -> Path:
    """A mixture as it is published: with its family's own names of tensors."""
    tiny(name).save_pretrained(folder, max_shard_size="60KB")
    return folder


def streamed(source: Path, target: Path, recipe: Recipe = RECIPE, options: Options = EXACT) -> dict[str, torch.Tensor]:
    streaming.compress_directory(source, target, tokens(), recipe, precision=PRECISION, options=options)
    return tensors_of(target)


@pytest.mark.parametrize("recipe", [RECIPE, SKIPS], ids=["all", "experts skipped"])
@pytest.mark.parametrize("name", list(MODELS))
def test_streamed_experts_equal_those_from_memory(name: str, recipe: Recipe, tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", name)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    api.compress(model, tokens(), recipe, options=EXACT, dtype=torch.float16)
    first = tensors_of(api.save_pretrained(model, tmp_path / "whole"))
    second = streamed(dense, tmp_path / "out", recipe)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert any(key.startswith(f"{AT}.0.gate_up_proj.codes") for key in second) == (recipe is RECIPE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ids = tokens(2, seed=5)
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-2)


@pytest.mark.parametrize("sequential", [False, True])
def test_inputs_that_memory_does_not_hold_are_summed_one_after_another(
    sequential: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved(tmp_path / "dense", "qwen")
    options = Options(autocast="none", sequential=sequential)
    whole = streamed(dense, tmp_path / "whole", options=options)
    held: list[int] = []
    collect = block._collect

    def counted(*args: Any) -> Any:
        sums = collect(*args)
        held.append(sum(each.total.numel() * 4 for each in sums.sums.values()))
        return sums

    monkeypatch.setattr(block, "_collect", counted)
    monkeypatch.setattr(block, "SUMS_BYTES", 40_000)
    parts = streamed(dense, tmp_path / "parts", options=options)
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())
    assert 16_384 < max(held) <= 40_000 and len(held) > 8


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of a model's directory, in one file, whose tensors were changed."""
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_an_expert_that_lacks_a_tensor_or_has_another_shape_is_refused(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", "qwen")
    gone, other = f"{AT}.3.up_proj.weight", f"{AT}.5.gate_proj.weight"
    lacking = changed(dense, tmp_path / "lacking", lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=f"an expert must have all its tensors; got none named '{gone}'"):
        streamed(lacking, tmp_path / "out")
    uneven = changed(dense, tmp_path / "uneven", lambda tensors: tensors.update({other: torch.zeros(32, 64)}))
    need = rf"all experts must have shape \[128, 64\], that of the first; got \[96, 64\] for '{other}'"
    with pytest.raises(CheckpointError, match=need):
        streamed(uneven, tmp_path / "out")
    fewer = changed(dense, tmp_path / "fewer", lambda tensors: tensors.pop(f"{AT}.7.gate_proj.weight"))
    need = rf"{AT}\.gate_up_proj must have shape \[8, 128, 64\], that of the model; got \[7, 128, 64\]"
    with pytest.raises(CheckpointError, match=need):
        streamed(fewer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_buffer_that_the_files_lack_is_refused(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", "deepseek")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    lacking = changed(dense, tmp_path / "lacking", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"a tensor for each parameter and buffer; got none named '{name}'"):
        streamed(lacking, tmp_path / "out")


def test_experts_with_another_function_are_refused_and_may_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved(tmp_path / "dense", "mixtral")
    # The meta device tells nothing of functions; the first block with values does.
    monkeypatch.setattr(experts, "_differs", lambda fused, built: not next(built.parameters()).is_meta)
    need = r"model\.layers\.0\.mlp\.experts must compute gated experts and nothing else; got another function of its "
    with pytest.raises(UnsupportedError, match=need):
        streamed(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert streamed(dense, tmp_path / "out", SKIPS)[f"{AT}.gate_up_proj"].ndim == 3


def test_a_quantized_model_is_not_compressed(tmp_path: Path) -> None:
    model = tiny("mixtral")
    api.compress(model, tokens(), RECIPE)
    with pytest.raises(ValueError, match=r"^compress: the model must be dense; got compressed layer model\.layers\.0"):
        api.compress(model, tokens(), RECIPE)
    ours = api.save_pretrained(model, tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"must not be quantized; got quantization_config in config\.json\. Comp"):
        streamed(ours, tmp_path / "out")
    for more in ((), ("--stream",), ("--recipe", "auto")):
        found = error_of("compress", str(ours), str(tmp_path / "out"), *more)
        assert found == (
            f"error: compress: MODEL must be dense; got {ours}, compressed. Compress the model that it was made of."
        )
    dense = tiny("mixtral")
    layer = dense.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    need = r"weights must have 16 or 32 bits; got model\.layers\.0\.self_attn\.q_proj in torch\.float8_e4m3fn\. Load"
    with pytest.raises(ValueError, match=need):
        api.compress(dense, tokens(), RECIPE)


def test_identity_knows_values_and_names_but_not_files(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", "mixtral")
    one = changed(dense, tmp_path / "one", lambda tensors: None)
    names = json.loads((dense / "model.safetensors.index.json").read_text())["weight_map"]
    assert any("block_sparse_moe.experts.0.w1" in name for name in names)
    assert Shards.open(one).identity() == Shards.open(dense).identity()
    other = changed(dense, tmp_path / "other", lambda tensors: tensors["model.norm.weight"].add_(1))
    assert Shards.open(other).identity() != Shards.open(dense).identity()
