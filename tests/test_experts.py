"""Fused experts of a mixture: split into linear layers, compressed, saved, loaded, recovered."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

from marlin import api  # noqa: E402
from marlin.compress import LayerRecipe, Options, Recipe, Recovery, compress_model, sensitivity  # noqa: E402
from marlin.compress.block import CalibrationWarning  # noqa: E402
from marlin.compress.recipe import PLAIN  # noqa: E402
from marlin.convert import convert  # noqa: E402
from marlin.errors import CheckpointError  # noqa: E402
from marlin.experts import PUBLISHED_LEAVES, Expert, Experts, ExpertsWarning, split  # noqa: E402
from marlin.integrations.transformers import parallel  # noqa: E402
from marlin.nn import sparse_linears  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "initializer_range": 0.1,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 96, "num_key_value_heads": 1, "num_local_experts": 4}),
    "qwen": (
        "Qwen3Moe",
        {"head_dim": 32, "num_key_value_heads": 1, "moe_intermediate_size": 64, "num_experts": 8}
        | {"num_experts_per_tok": 2},
    ),
    "deepseek": (
        "DeepseekV3",
        {"moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"first_k_dense_replace": 1, "intermediate_size": 96, "num_key_value_heads": 2, **LATENT},
    ),
    "gpt-oss": (
        "GptOss",
        {"intermediate_size": 64, "head_dim": 32, "num_key_value_heads": 1, "num_local_experts": 4}
        | {"num_experts_per_tok": 2},
    ),
}
RECIPE = Recipe(default=LayerRecipe(group_size=32, **PLAIN))
AT = "model.layers.1.mlp.experts"


def tiny(name: str = "mixtral") -> Any:
    family, more = MODELS[name]
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def tokens(count: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (count, 48), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(tokens(2, seed=5)).logits
    return out


@pytest.mark.parametrize("name", list(MODELS))
def test_split_experts_compute_what_the_fused_ones_do(name: str) -> None:
    model = tiny(name)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # Why: others add in another order.
    before, count = logits(model), sum(each.numel() for each in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = split(model)
    assert AT in done and isinstance(model.get_submodule(AT), Experts)
    assert torch.equal(logits(model), before)
    assert sum(each.numel() for each in model.parameters()) == count
    assert split(model) == []


@pytest.mark.parametrize("name", list(MODELS))
def test_compressed_experts_survive_a_directory(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    done = api.compress(model, tokens(), RECIPE)
    rows = {row.name: row for row in done.report}
    found = [row for key, row in rows.items() if f"{AT}." in key and key.endswith("gate_up_proj")]
    routed = 2 * tokens().numel()
    assert all(row.kind == "w4a16_sp24" for row in found) and sum(row.tokens for row in found) == routed
    api.save_pretrained(model, tmp_path / "out", report=done)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert {key for key, _ in sparse_linears(loaded)} == set(rows)
    assert torch.equal(logits(loaded), logits(model))
    if parallel.register_styles():
        assert not any("mlp.experts" in key for key in loaded.tp_plan)
    ids = loaded.generate(tokens(1)[:, :4], max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, 7)
    again = AutoModelForCausalLM.from_pretrained(api.save_pretrained(loaded, tmp_path / "again"), dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_experts_named_as_in_published_checkpoints_are_loaded_and_converted(tmp_path: Path) -> None:
    model = tiny("qwen")
    model.set_experts_implementation("eager")
    before = logits(model)
    assert AT in split(model, leaves=PUBLISHED_LEAVES) and torch.allclose(logits(model), before, atol=1e-5)
    api.compress(model, tokens(), RECIPE)
    names = {name for name, _ in sparse_linears(model)}
    assert f"{AT}.7.up_proj" in names and not any(name.endswith("gate_up_proj") for name in names)
    convert(api.save_pretrained(model, tmp_path / "ours"), tmp_path / "plain", to="pack-quantized")
    convert(tmp_path / "plain", tmp_path / "back")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert {name for name, _ in sparse_linears(loaded)} == names
    assert torch.equal(logits(loaded), logits(model))


def test_experts_that_few_tokens_reach_get_another_method_and_a_warning() -> None:
    with pytest.warns(CalibrationWarning) as caught:
        done = api.compress(tiny("qwen"), tokens(1)[:, :40], RECIPE)
    rows = [row for row in done.report if f"{AT}." in row.name and row.name.endswith("gate_up_proj")]
    few = [row for row in rows if 0 < row.tokens < 16]
    assert few and all(row.method == "wanda" for row in few)
    assert all(row.method == "sparsegpt" for row in rows if row.tokens >= 16)
    texts = [str(warning.message) for warning in caught]
    for row in few:
        need = f"only {row.tokens} calibration tokens reached it; method wanda instead of sparsegpt"
        assert row.note == need and f"compress {row.name}: {need}" in texts


def test_a_recipe_that_leaves_experts_alone_leaves_them_fused(tmp_path: Path) -> None:
    model = tiny()
    recipe = Recipe((("*.experts.*", LayerRecipe(kind="skip")),), RECIPE.default)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        api.compress(model, tokens(), recipe)
    assert model.get_submodule(AT).gate_up_proj.ndim == 3
    api.save_pretrained(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))


def test_a_description_of_some_layers_of_experts_is_refused(tmp_path: Path) -> None:
    model = tiny()
    api.compress(model, tokens(), RECIPE)
    config = api.save_pretrained(model, tmp_path / "out") / "config.json"
    text = json.loads(config.read_text())
    del text["quantization_config"]["layers"][f"{AT}.2.down_proj"]
    config.write_text(json.dumps(text))
    need = r"must name all layers of a mixture's experts, or none; got some of them\. config\.json was"
    with pytest.raises(CheckpointError, match=need):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_recipe_that_takes_some_layers_of_experts_is_refused() -> None:
    recipe = Recipe((("*.experts.*.down_proj", LayerRecipe(kind="skip")),), RECIPE.default)
    need = r"^split experts: all layers of model\.layers\.0\.mlp\.experts must be compressed; got 4 of 8\. Let the"
    with pytest.raises(ValueError, match=need):
        api.compress(tiny(), tokens(), recipe)


def test_fused_experts_are_not_passed_over_in_silence() -> None:
    with pytest.warns(
        CalibrationWarning, match=r"experts must be linear layers to be compressed; got model\.layers\.0"
    ):
        compress_model(tiny(), tokens(), RECIPE)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("norm", "a norm after each expert"),
        ("gate", "another function of its tensors"),
        ("arguments", "another function of its tensors"),
    ],
)
def test_experts_that_do_something_else_stay_with_a_warning(change: str, why: str) -> None:
    model = tiny()
    for layer in model.model.layers:
        mixture = layer.mlp.experts
        if change == "norm":
            mixture.has_post_expert_norm = True
        elif change == "gate":
            mixture._apply_gate = lambda both: both.chunk(2, dim=-1)[0] + 1
        else:
            mixture.__class__ = type("Other", (type(mixture),), {"forward": lambda self, hidden: hidden})
    with pytest.warns(ExpertsWarning, match=f"must compute gated experts and nothing else; got {why}. They stay as"):
        assert split(model) == []
    assert model.get_submodule(AT).gate_up_proj.ndim == 3


def test_compressed_experts_have_no_place_in_pack_quantized(tmp_path: Path) -> None:
    model = tiny()
    api.compress(model, tokens(), RECIPE)
    api.save_pretrained(model, tmp_path / "out")
    need = r"layers must be no experts of a mixture; got model\.layers\.0\.mlp\.experts\.0\.gate_up_proj\. Engines"
    with pytest.raises(ValueError, match=need):
        convert(tmp_path / "out", tmp_path / "plain", to="pack-quantized")
    assert not (tmp_path / "plain").exists()


def test_all_experts_of_a_block_are_one_unit_of_a_mixed_recipe() -> None:
    model = tiny()
    split(model)
    weights = compress_model(copy.deepcopy(model), tokens(), RECIPE).weights
    units = sensitivity.measure(model, weights, tokens(2, seed=3))
    assert sorted(unit.name for unit in units) == [
        f"model.layers.{index}.{part}" for index in range(2) for part in ("mlp.experts", "self_attn")
    ]
    assert {len(unit.layers) for unit in units} == {8, 4}


def test_compressed_experts_are_recovered() -> None:
    model, dense = tiny(), tiny()
    api.compress(model, tokens(), RECIPE)
    given = Recovery(steps=40, batch=4, length=32, generated_tokens=0, learning_rate=3e-3, autocast="none")
    report = api.recover(model, dense, tokens(40, seed=7).flatten(), recovery=given)
    assert report["divergence"] < 0.97 * report["divergence_before"]


def test_reconstruction_trains_experts() -> None:
    model = tiny()
    done = api.compress(model, tokens(16), RECIPE, options=Options(reconstruct=24))
    assert done.blocks and all(row.error_after < row.error_before for row in done.blocks)


def test_tokens_that_go_nowhere_add_nothing() -> None:
    pair = Expert({"gate_up_proj": nn.Linear(4, 6, bias=False), "down_proj": nn.Linear(3, 4, bias=False)})
    mixture = Experts([pair], lambda both: both[:, :3] * both[:, 3:])
    hidden, index = torch.randn(3, 4), torch.tensor([[0], [1], [0]])
    out = mixture(hidden, index, torch.ones(3, 1))
    assert not bool(out[1].any()) and bool(out[0].any())
