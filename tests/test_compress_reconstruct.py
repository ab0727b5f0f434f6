"""Block-wise reconstruction on tiny random models: nearer to the dense model, never farther, kept and saved exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from marlin import api, streaming
from marlin.compress import Event, LayerRecipe, Options, Recipe, compress_model, reconstruct
from marlin.compress.recipe import PLAIN
from marlin.errors import CheckpointError
from marlin.formats import CompressedWeight, DenseInt4Weight, is_24
from tests.test_compress_walk import KilledError, assert_same, linears, tiny, tokens

transformers = pytest.importorskip("transformers")

# Why plain: better one-shot solutions leave little to train in models as small as these.
SPARSE = LayerRecipe(group_size=32, **PLAIN)
DENSE = LayerRecipe(kind="w4a16_dense", group_size=32, **PLAIN)
IDS = tokens(samples=16)


def trained(**more: Any) -> Options:
    return Options(autocast="none", **{"reconstruct": 24, **more})


class Experts(nn.Module):
    """A layer of experts: each token goes to the one that its first entry names; the last gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for index, chosen in enumerate((hidden[..., 0] > 0, hidden[..., 0] <= 0)):
            if bool(chosen.any()):
                out[chosen] = self.experts[index](hidden[chosen]).to(out)
        return out


def with_experts() -> Any:
    model = tiny(1)
    torch.manual_seed(1)
    model.model.layers[0].mlp = Experts()
    return model


def test_reconstruct_brings_blocks_nearer_and_leaves_what_it_returns() -> None:
    solved, model = tiny(), tiny()
    before = compress_model(solved, IDS, Recipe(default=SPARSE), options=trained(reconstruct=0))
    done = compress_model(model, IDS, Recipe(default=SPARSE), options=trained())
    assert not before.blocks and [row.name for row in done.blocks] == ["model.layers.0", "model.layers.1"]
    for row, share in zip(done.blocks, (0.97, 1.0), strict=True):
        assert row.error_after < share * row.error_before and row.steps == 24 and row.best_step > 0 and row.seconds > 0
    changed = 0
    for name, layer in linears(model).items():
        weight = done.weights[name]
        assert isinstance(weight, CompressedWeight) and is_24(weight.mask()) and weight.scales.dtype == torch.float16
        assert torch.equal(layer.weight, weight.to_dense(torch.float32))
        if ".layers.0." in name:
            assert torch.equal(weight.mask(), before.weights[name].mask())
            changed += int((weight.codes != before.weights[name].codes).sum())
    assert changed > 0
    for block in model.model.layers:
        norm = block.input_layernorm.weight
        assert torch.equal(norm, norm.half().float()) and not torch.equal(norm, torch.ones_like(norm))
        assert norm.requires_grad


def test_reconstruct_reports_the_error_of_the_block_that_it_leaves() -> None:
    model, dense = tiny(1), tiny(1)
    row = compress_model(model, IDS, Recipe(default=SPARSE), options=trained()).blocks[0]
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for each in (model, dense):
            handle = each.model.layers[0].register_forward_hook(lambda module, args, out: found.append(out))
            each(IDS[12:])
            handle.remove()
    assert row.error_after == pytest.approx(float(reconstruct.token_errors(*found).mean()), rel=1e-4)


def test_reconstruct_keeps_the_solved_block_where_training_brings_nothing() -> None:
    solved, model = tiny(), tiny()
    before = compress_model(solved, IDS, Recipe(default=SPARSE), options=trained(reconstruct=0))
    done = compress_model(model, IDS, Recipe(default=SPARSE), options=trained(reconstruct=2, reconstruct_rate=1e-9))
    assert_same(before, done)
    assert all(row.error_after == row.error_before and row.best_step == 0 for row in done.blocks)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, solved.state_dict()[name])


def test_reconstruct_trains_int4_and_goes_around_what_it_leaves_alone() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(
            **sizes, num_hidden_layers=1, vocab_size=96, initializer_range=0.1, attention_bias=True
        )
        return transformers.LlamaForCausalLM(config).eval()

    rules = (
        ("*.q_proj", LayerRecipe(kind="skip")),
        ("*.k_proj", LayerRecipe(kind="sp24")),
        ("*.v_proj", LayerRecipe(kind="w4a16_dense", group_size=32, low_rank=4, **PLAIN)),
    )
    recipe = Recipe(rules, DENSE)
    first, model = make(), make()
    before = compress_model(first, IDS, recipe, options=trained(reconstruct=0))
    # Why so slowly: dense INT4 is near to begin with.
    done = compress_model(model, IDS, recipe, options=trained(reconstruct_rate=0.01))
    assert done.blocks[0].error_after < done.blocks[0].error_before
    at = "model.layers.0.self_attn."
    for name in ("q_proj", "k_proj"):
        assert torch.equal(model.get_submodule(at + name).weight, first.get_submodule(at + name).weight)
        assert not torch.equal(model.get_submodule(at + name).bias, first.get_submodule(at + name).bias)
    old, new = before.low_rank[at + "v_proj"], done.low_rank[at + "v_proj"]
    assert torch.equal(old.up, new.up) and torch.equal(old.down, new.down)
    value = done.weights[at + "v_proj"]
    assert isinstance(value, DenseInt4Weight)
    expected = value.to_dense(torch.float32) + new.to_dense()
    assert torch.equal(model.get_submodule(at + "v_proj").weight, expected)
    assert any(not torch.equal(done.weights[name].to_dense(), before.weights[name].to_dense()) for name in done.weights)


def test_reconstruct_trains_experts_and_says_which_no_token_reached() -> None:
    solved, model = with_experts(), with_experts()
    with pytest.warns(UserWarning, match="no calibration token reached it"):
        before = compress_model(solved, IDS, Recipe(default=SPARSE), options=trained(reconstruct=0))
        done = compress_model(model, IDS, Recipe(default=SPARSE), options=trained(reconstruct=48))
    (row,) = done.blocks
    assert row.error_after < row.error_before
    assert row.note == "no token reached 1 layers, which stay as they were solved"
    at = "model.layers.0.mlp.experts."
    same = [torch.equal(done.weights[f"{at}{i}"].codes, before.weights[f"{at}{i}"].codes) for i in range(3)]
    assert same == [False, False, True]


def test_reconstruct_trains_a_model_of_16_bits_in_32() -> None:
    model = tiny(1).bfloat16()
    done = compress_model(model, IDS, Recipe(default=SPARSE), options=trained())
    assert done.blocks[0].error_after < done.blocks[0].error_before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    name, layer = next(iter(linears(model).items()))
    assert torch.equal(layer.weight, done.weights[name].to_dense(torch.float32).bfloat16())


def test_reconstruct_resumes_to_the_same_bits_after_a_kill(tmp_path: Path) -> None:
    def kill(event: Event) -> None:
        if event.stage == "block":
            raise KilledError

    recipe, stages = Recipe(default=SPARSE), []
    with pytest.raises(KilledError):
        compress_model(tiny(), IDS, recipe, options=trained(resume_dir=tmp_path, progress=kill))
    resumed, whole = tiny(), tiny()
    options = trained(resume_dir=tmp_path, progress=lambda event: stages.append(event))
    first = compress_model(resumed, IDS, recipe, options=options)
    second = compress_model(whole, IDS, recipe, options=trained())
    assert_same(first, second)
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])
    steps = [event.step for event in stages if event.stage == "reconstruct"]
    assert [event.stage for event in stages if event.step == 0] == ["capture", "resumed", "block"]
    assert steps == list(range(3, 25, 3))
    assert all(event.done == 1 and event.error > 0 for event in stages if event.stage == "reconstruct")
    assert stages[1].block == first.blocks[0] and stages[-1].block == first.blocks[1]
    assert [row.error_after for row in first.blocks] == [row.error_after for row in second.blocks]
    with pytest.raises(CheckpointError, match=r"^resume: the folder must belong to the same run; got another options"):
        compress_model(tiny(), IDS, recipe, options=trained(resume_dir=tmp_path, reconstruct=25))


def test_reconstructed_model_is_saved_as_it_was_measured(tmp_path: Path) -> None:
    tiny().half().save_pretrained(tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    model, recipe = copy.deepcopy(dense), Recipe(default=SPARSE)
    values = copy.deepcopy(dense)
    compress_model(values, IDS, recipe, options=trained())
    done = api.compress(model, IDS, recipe, options=trained(), dtype=torch.float16)
    api.save_pretrained(model, tmp_path / "whole", report=done, recipe=recipe)
    loaded = api.load(tmp_path / "whole", dtype=torch.float32)
    state = loaded.state_dict()
    for name, tensor in values.state_dict().items():
        layer = name.removesuffix(".weight")
        found = loaded.get_submodule(layer).to_dense(torch.float32) if layer in done.weights else state[name]
        assert torch.equal(found, tensor), name
    report = json.loads((tmp_path / "whole" / "compression_report.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in report["reconstruction"]] == ["model.layers.0", "model.layers.1"]
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert "| reconstruction, steps | 24 |" in card and "| reconstruction, error_after |" in card
    precision = streaming.Precision(torch.float32, torch.float16)
    streaming.compress_directory(
        tmp_path / "dense", tmp_path / "out", IDS, recipe, precision=precision, options=trained()
    )
    streamed = api.load(tmp_path / "out", dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, streamed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"reconstruct": -1}, "reconstruct must be a number of steps, at least 0; got reconstruct=-1."),
        ({"reconstruct": 1.5}, "reconstruct must be a number of steps, at least 0; got reconstruct=1.5."),
        ({"reconstruct_rate": 0.0}, "reconstruct_rate must lie in 0..1, 0 excluded; got reconstruct_rate=0.0."),
    ],
)
def test_options_refuse_training_that_makes_no_sense(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Options(**given)
    assert str(caught.value) == f"Options: {text}"


def test_reconstruct_refuses_too_few_windows_before_any_work() -> None:
    stages: list[Event] = []
    with pytest.raises(ValueError) as caught:
        compress_model(tiny(), IDS[:4], Recipe(default=SPARSE), options=trained(progress=stages.append))
    assert str(caught.value) == (
        "reconstruct: there must be two batches of calibration windows; got 1. Use more calibration windows, or a "
        "smaller batch."
    )
    assert not stages and reconstruct.held_out(2) == [1] and reconstruct.held_out(16) == [14, 15]


def test_reconstruct_names_the_block_whose_error_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "token_errors", lambda out, wanted: out.sum(-1) * float("nan"))
    with pytest.raises(ValueError, match=r"^reconstruct model.layers.0: the error must be finite at step 3; got nan"):
        compress_model(tiny(), IDS, Recipe(default=SPARSE), options=trained())
