"""The walk through a model: tiny random Llama models with planted structure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from marlin.compress import (
    CalibrationWarning,
    Compressed,
    Event,
    LayerRecipe,
    Options,
    Recipe,
    compress_model,
    preset,
)
from marlin.compress.blocks import decoder_blocks
from marlin.errors import CheckpointError
from marlin.formats import CompressedWeight, DenseInt4Weight, is_24

transformers = pytest.importorskip("transformers")

VOCAB, TOKENS = 96, 48
EXACT = Options(autocast="none")


def tiny(layers: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(seed: int = 0, samples: int = 6) -> torch.Tensor:
    return torch.randint(0, VOCAB, (samples, TOKENS), generator=torch.Generator().manual_seed(seed))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def assert_same(a: Compressed, b: Compressed) -> None:
    assert a.weights.keys() == b.weights.keys()
    for name, weight in a.weights.items():
        assert torch.equal(weight.codes, b.weights[name].codes)
        assert torch.equal(weight.scales, b.weights[name].scales)
        assert torch.equal(weight.to_dense(), b.weights[name].to_dense())


def test_compress_model_leaves_the_weights_that_it_returns() -> None:
    model = tiny()
    before = {name: layer.weight.clone() for name, layer in linears(model).items()}
    done = compress_model(model, tokens(), preset("sp24-int4", 32), options=EXACT)
    assert set(done.weights) == set(before) and len(before) == 14
    for name, layer in linears(model).items():
        weight = done.weights[name]
        assert isinstance(weight, CompressedWeight)
        assert is_24(weight.mask())
        assert weight.scales.dtype == torch.float16
        assert torch.equal(layer.weight, weight.to_dense(torch.float32))
        assert not torch.equal(layer.weight, before[name])


def test_compress_model_keeps_head_and_embeddings() -> None:
    model, original = tiny(), tiny()
    compress_model(model, tokens(), preset("sp24-int4", 32), options=EXACT)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)


def test_compress_model_mixes_kinds_by_rule() -> None:
    model, original = tiny(), tiny()
    rules = (
        ("*.q_proj", LayerRecipe(kind="skip")),
        ("*.k_proj", LayerRecipe(kind="sp24")),
        ("*.mlp.*", LayerRecipe(kind="w4a16_dense", group_size=32)),
    )
    done = compress_model(model, tokens(), Recipe(rules, LayerRecipe(group_size=64)), options=EXACT)
    kinds = {row.name.rsplit(".", 1)[1]: row.kind for row in done.report}
    assert kinds["q_proj"] == "skip" and kinds["k_proj"] == "sp24"
    assert kinds["v_proj"] == kinds["o_proj"] == "w4a16_sp24"
    assert kinds["gate_proj"] == kinds["up_proj"] == kinds["down_proj"] == "w4a16_dense"
    first = "model.layers.0.self_attn"
    assert torch.equal(model.get_submodule(f"{first}.q_proj").weight, original.get_submodule(f"{first}.q_proj").weight)
    pruned = model.get_submodule(f"{first}.k_proj").weight
    assert bool(((pruned != 0).reshape(-1, 4).sum(-1) == 2).all())
    assert f"{first}.k_proj" not in done.weights and f"{first}.q_proj" not in done.weights
    assert isinstance(done.weights["model.layers.1.mlp.down_proj"], DenseInt4Weight)


def test_compress_model_reports_every_layer_in_module_order() -> None:
    done = compress_model(tiny(), tokens(), preset("sp24-int4", 128), options=EXACT)
    names = list(linears(tiny()))
    assert [row.name for row in done.report] == names
    for row in done.report:
        assert row.relative_error is not None and 0 < row.relative_error < 0.5
        assert row.damping == 0.01
        assert row.tokens == 6 * TOKENS
        assert row.seconds > 0
    down = next(row for row in done.report if row.name.endswith("down_proj"))
    assert (down.n, down.k, down.group_size) == (64, 96, 32)
    assert down.note == "group_size 32 instead of 128: in_features is 96"
    assert down.bits_per_weight == 3.5
    body = json.loads(done.report_json())
    assert [layer["name"] for layer in body["layers"]] == names
    assert body["bits_per_weight"] == pytest.approx(done.bits_per_weight())


def test_compress_model_calibrates_each_block_with_what_compressed_blocks_produce() -> None:
    broken = Recipe((("*.layers.0.*", LayerRecipe(kind="sp24", method="magnitude")),), LayerRecipe(kind="skip"))
    both = Recipe(
        (("*.layers.0.*", LayerRecipe(kind="sp24", method="magnitude")),), LayerRecipe(group_size=32, correct=0.0)
    )
    model = tiny()
    compress_model(model, tokens(), broken, options=EXACT)
    second_only = Recipe((("*.layers.0.*", LayerRecipe(kind="skip")),), LayerRecipe(group_size=32, correct=0.0))
    alone = compress_model(model, tokens(), second_only, options=EXACT)
    together = compress_model(tiny(), tokens(), both, options=EXACT)
    assert_same(alone, together)
    untouched = compress_model(tiny(), tokens(), second_only, options=EXACT)
    name = "model.layers.1.mlp.up_proj"
    assert not torch.equal(untouched.weights[name].codes, together.weights[name].codes)


def test_compress_model_hessian_is_that_of_a_plain_forward_pass() -> None:
    model = tiny(layers=1)
    seen: list[torch.Tensor] = []
    name = "model.layers.0.mlp.down_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens())
    handle.remove()
    weight = model.get_submodule(name).weight.detach().clone()
    done = compress_model(model, tokens(), preset("sp24-int4-fast", 32), options=EXACT)
    inputs = seen[0].flatten(0, 1)
    delta = inputs @ (weight - done.weights[name].to_dense(torch.float32)).T
    expected = float(delta.square().sum() / (inputs @ weight.T).square().sum())
    row = next(row for row in done.report if row.name == name)
    assert row.relative_error == pytest.approx(expected, rel=1e-3)


def test_compress_model_is_reproducible_bit_for_bit() -> None:
    runs = [compress_model(tiny(), tokens(), preset("sp24-int4", 32)) for _ in range(2)]
    assert_same(*runs)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("name", ["sp24-int4", "int4", "sp24"])
def test_compress_model_resumes_to_identical_weights_after_a_kill(tmp_path: Path, name: str) -> None:
    recipe, stages = preset(name, 32), []

    def kill(event: Event) -> None:
        if event.done == 1:
            raise KilledError

    with pytest.raises(KilledError):
        compress_model(tiny(3), tokens(), recipe, options=Options(resume_dir=tmp_path, progress=kill))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block_00000.safetensors", "fingerprint.json"]
    model, whole_model = tiny(3), tiny(3)
    options = Options(resume_dir=tmp_path, progress=lambda event: stages.append((event.stage, event.done)))
    resumed = compress_model(model, tokens(), recipe, options=options)
    whole = compress_model(whole_model, tokens(), recipe)
    assert stages == [("capture", 0), ("resumed", 1), ("block", 2), ("block", 3)]
    assert_same(resumed, whole)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole_model.state_dict()[key])
    assert [row.relative_error for row in resumed.report] == [row.relative_error for row in whole.report]


@pytest.mark.parametrize("changed", ["model", "calibration", "recipe", "options"])
def test_compress_model_refuses_a_resume_dir_of_another_run(tmp_path: Path, changed: str) -> None:
    def run(model: int = 0, calibration: int = 0, recipe: int = 32, options: int = 4) -> None:
        made = Options(resume_dir=tmp_path, batch=options)
        compress_model(tiny(1, model), tokens(calibration), preset("int4-rtn", recipe), options=made)

    run()
    with pytest.raises(CheckpointError) as caught:
        run(**{changed: {"model": 1, "calibration": 1, "recipe": 64, "options": 2}[changed]})
    assert str(caught.value) == (
        f"resume: the folder must belong to the same run; got another {changed} in {tmp_path}. Choose another "
        "resume_dir, or delete this one."
    )


def test_compress_model_refuses_a_damaged_resume_file(tmp_path: Path) -> None:
    compress_model(tiny(1), tokens(), preset("int4-rtn", 32), options=Options(resume_dir=tmp_path))
    path = tmp_path / "block_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"^resume: block_00000.safetensors must be whole; got "):
        compress_model(tiny(1), tokens(), preset("int4-rtn", 32), options=Options(resume_dir=tmp_path))


def test_compress_model_rejects_calibration_that_makes_infinite_inputs() -> None:
    model = tiny()
    model.model.embed_tokens.weight.data[5, 3] = float("inf")
    ids = tokens()
    ids[0, 0] = 5
    with pytest.raises(ValueError, match=r"^hessian of model.layers.0.self_attn.q_proj: calibration inputs must"):
        compress_model(model, ids, preset("sp24-int4", 32), options=EXACT)


def test_compress_model_rejects_weights_that_are_not_finite() -> None:
    model = tiny()
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^compress model.layers.1.mlp.gate_proj: weights must be finite; got NaN or"):
        compress_model(model, tokens(), preset("int4-rtn", 32), options=EXACT)


@pytest.mark.parametrize(
    ("ids", "kind", "error"),
    [
        (torch.zeros(4, dtype=torch.int64), ValueError, "compress_model: calibration must have shape [samples, tok"),
        (torch.zeros(2, 4), TypeError, "compress_model: calibration must be int64 token ids; got torch.float32."),
    ],
)
def test_compress_model_rejects_other_calibration(ids: torch.Tensor, kind: type[Exception], error: str) -> None:
    with pytest.raises(kind) as caught:
        compress_model(tiny(), ids, Recipe())
    assert str(caught.value).startswith(error)


def test_compress_model_rejects_a_rule_that_matches_nothing() -> None:
    recipe = Recipe((("*.fc1", LayerRecipe()),))
    with pytest.raises(ValueError) as caught:
        compress_model(tiny(), tokens(), recipe)
    assert str(caught.value) == (
        "compress_model: every rule of the recipe must match a linear layer; got pattern '*.fc1'. Layers have names "
        "like 'model.layers.0.self_attn.q_proj'."
    )


def test_compress_model_rejects_a_shape_before_any_work() -> None:
    model = tiny()
    model.model.layers[1].mlp.down_proj = nn.Linear(96, 60)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^compress model.layers.1.mlp.down_proj: out_features must be a mult"):
        compress_model(model, tokens(), preset("sp24-int4", 32))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_compress_model_falls_back_with_a_warning_for_a_layer_without_tokens() -> None:
    model = tiny(1)
    model.model.layers[0].mlp.idle = nn.Linear(64, 16, bias=False)
    with pytest.warns(CalibrationWarning, match="no calibration token reached it; method magnitude instead of"):
        done = compress_model(model, tokens(), preset("sp24-int4", 32), options=EXACT)
    row = next(row for row in done.report if row.name.endswith("idle"))
    assert (row.method, row.tokens, row.relative_error) == ("magnitude", 0, None)
    assert row.note == "no calibration token reached it; method magnitude instead of sparsegpt"


def test_compress_model_restores_mode_and_forward_functions() -> None:
    model = tiny().train()
    compress_model(model, tokens(), preset("int4-rtn", 32))
    assert model.training
    assert all("forward" not in block.__dict__ for block in model.model.layers)


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "gemma3", "qwen3"])
def test_compress_model_walks_other_architectures(family: str) -> None:
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64}
    if family == "gpt_neox":
        config = transformers.GPTNeoXConfig(**common, intermediate_size=96, max_position_embeddings=64)
    elif family == "opt":
        config = transformers.OPTConfig(**common, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64)
    else:
        name = "Gemma3TextConfig" if family == "gemma3" else "Qwen3Config"
        sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
        extra = sliding if family == "gemma3" else {}
        config = getattr(transformers, name)(
            **common, intermediate_size=96, num_key_value_heads=1, head_dim=32, max_position_embeddings=64, **extra
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    _, blocks = decoder_blocks(model)
    with torch.no_grad():
        before = model(tokens()).logits
    done = compress_model(model, tokens(), preset("int4", 32), options=EXACT)
    assert len(done.weights) == sum(isinstance(m, nn.Linear) for m in blocks.modules())
    with torch.no_grad():
        after = model(tokens()).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.3


def test_decoder_blocks_rejects_a_model_without_blocks() -> None:
    with pytest.raises(ValueError) as caught:
        decoder_blocks(nn.Linear(8, 8))
    assert str(caught.value) == (
        "compress_model: the model must hold its decoder blocks in a torch.nn.ModuleList with torch.nn.Linear layers; "
        "got Linear. Load a causal language model with AutoModelForCausalLM."
    )
