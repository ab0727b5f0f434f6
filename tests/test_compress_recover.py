"""Recovery on tiny random Llama models: it lowers the divergence, repeats, resumes, and saves what it measured."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin.compress import LayerRecipe, Options, Recipe, Recovery, RecoveryWarning, compress_model, recover
from marlin.compress.distill import Distance, logits_kl
from marlin.compress.latent import LatentLinear
from marlin.compress.recipe import PLAIN
from marlin.compress.sampling import FREE, one_sequence_a_row, sample
from marlin.compress.texts import Batches, prompts, split_held_out
from marlin.compress.training import Run
from marlin.errors import CheckpointError
from marlin.formats import CompressedWeight, DenseInt4Weight

transformers = pytest.importorskip("transformers")

VOCAB = 96
QUICK: dict[str, Any] = {
    "learning_rate": 3e-3,
    "batch": 4,
    "length": 32,
    "generated_tokens": 256,
    "generated_share": 0.5,
    "generated_rows": 4,
    "generated_length": 32,
    "validations": 4,
    "autocast": "none",
}
# Why plain: better one-shot solutions leave little to recover in models as small as these.
DENSE = LayerRecipe(kind="w4a16_dense", group_size=32, **PLAIN)
RECIPES = {
    "sparse": Recipe(default=LayerRecipe(group_size=32, **PLAIN)),
    "dense": Recipe(default=DENSE),
    "mixed": Recipe((("*.mlp.*", DENSE),), LayerRecipe(group_size=64, **PLAIN)),
}


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def stream(count: int = 1000) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(1))


def compressed(name: str = "sparse") -> tuple[Any, Any, Any]:
    """(dense model, model with compressed values, its weights)."""
    dense = tiny()
    model = copy.deepcopy(dense)
    done = compress_model(model, stream(192).view(6, 32), RECIPES[name], options=Options(autocast="none"))
    return dense, model, done.weights


@pytest.mark.parametrize("name", list(RECIPES))
def test_recover_lowers_the_divergence_and_leaves_what_it_returns(name: str) -> None:
    dense, model, weights = compressed(name)
    held_out = split_held_out(stream(), 32, 4)[1]
    before = float(Distance(model, dense, None)(held_out).detach())
    masks = {key: weight.mask() for key, weight in weights.items() if isinstance(weight, CompressedWeight)}
    rate = 5e-4 if name == "dense" else 3e-3
    given = Recovery(steps=60, **{**QUICK, "learning_rate": rate})
    result = recover(model, dense, weights, stream(), recovery=given)
    after = float(Distance(model, dense, None)(held_out).detach())
    assert after < 0.97 * before
    assert result.report["divergence_before"] == pytest.approx(before, rel=1e-4)
    assert result.report["divergence"] == pytest.approx(after, rel=1e-4)
    assert result.weights.keys() == weights.keys()
    for key, weight in result.weights.items():
        assert torch.equal(model.get_submodule(key).weight, weight.to_dense(torch.float32))
        assert weight.scales.dtype == torch.float16 and weight.kind == weights[key].kind
        assert isinstance(weight, DenseInt4Weight) or torch.equal(weight.mask(), masks[key])
    norm = model.model.norm.weight
    assert (
        norm.dtype == torch.float32 and torch.equal(norm, norm.half().float()) and not torch.equal(norm, norm * 0 + 1)
    )
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)


def test_recover_repeats_and_resumes_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, weights = compressed()
    whole = recover(copy.deepcopy(model), dense, weights, stream(), recovery=Recovery(steps=12, **QUICK))
    settings = Recovery(steps=12, resume_dir=tmp_path, checkpoint_minutes=0.0, **QUICK)

    class KilledError(Exception):
        pass

    def kill(event: Any) -> None:
        if event.step == 7:
            raise KilledError

    with pytest.raises(KilledError):
        recover(
            copy.deepcopy(model),
            dense,
            weights,
            stream(),
            recovery=Recovery(steps=12, resume_dir=tmp_path, checkpoint_minutes=0.0, progress=kill, **QUICK),
        )
    assert (tmp_path / "state.safetensors").exists()
    monkeypatch.setattr("marlin.compress.recovery.sample", None)  # Why: the text is taken from the folder.
    resumed = recover(copy.deepcopy(model), dense, weights, stream(), recovery=settings)
    assert resumed.report["history"] == whole.report["history"]
    for key, weight in whole.weights.items():
        assert torch.equal(weight.codes, resumed.weights[key].codes)
        assert torch.equal(weight.scales, resumed.weights[key].scales)
    with pytest.raises(
        CheckpointError, match=r"^resume: the folder must belong to the same run; got another options in "
    ):
        other = {**QUICK, "learning_rate": 1e-3}
        recover(model, dense, weights, stream(), recovery=Recovery(steps=12, resume_dir=tmp_path, **other))


def test_recover_ends_in_time_and_tells_progress() -> None:
    dense, model, weights = compressed()
    events: list[Any] = []
    recovery = Recovery(minutes=0.02, progress=events.append, **QUICK)
    report = recover(model, dense, weights, stream(), recovery=recovery).report
    assert report["seconds"] < 10
    assert {event.stage for event in events} == {"generate", "train"}
    shares = [event.share for event in events if event.stage == "train"]
    assert shares == sorted(shares)


def test_recover_goes_on_without_generated_text_with_a_warning() -> None:
    dense, model, weights = compressed()
    with pytest.warns(RecoveryWarning, match=r"^recover: generated text must fill 4 windows; got 0 generated tokens\."):
        recover(model, dense, weights, stream(), recovery=Recovery(steps=2, **QUICK), generated=torch.empty(0).long())


def test_recover_refuses_what_it_cannot_train() -> None:
    dense, model, weights = compressed()
    with pytest.raises(ValueError, match=r"^recover: the text must hold at least 4 windows of 32 tokens; got 100\."):
        recover(model, dense, weights, stream(100), recovery=Recovery(steps=2, **QUICK))
    with pytest.raises(ValueError, match=r"^recover: weights must be named as the model's modules; got 'other'\.$"):
        recover(model, dense, {"other": next(iter(weights.values()))}, stream(), recovery=Recovery(steps=2, **QUICK))
    with pytest.raises(ValueError, match=r"^recover: the model must have compressed layers; got none\."):
        recover(model, dense, {}, stream(), recovery=Recovery(steps=2, **QUICK))
    with pytest.raises(ValueError) as caught:
        Recovery()
    assert str(caught.value) == "Recovery: one of minutes and steps must be given; got minutes=None, steps=None."


def test_latent_linear_gives_back_the_weight_that_it_starts_from() -> None:
    _, _, weights = compressed("mixed")
    for weight in weights.values():
        for unit in (None, 0.02):
            layer = LatentLinear(weight, None, learn_scales=True, unit=unit)
            again = layer.weight()
            assert torch.equal(again.codes, weight.codes) and torch.equal(again.scales, weight.scales)
            act = torch.randn(3, weight.k)
            assert torch.equal(layer(act), act @ weight.to_dense(torch.float32).T)


def test_distance_from_hidden_states_has_value_and_gradient_of_that_from_logits() -> None:
    dense, model, _ = compressed()
    ids = stream(64).view(2, 32)
    model.requires_grad_(True)
    weight = model.model.layers[0].mlp.up_proj.weight
    for temperature in (1.0, 2.0):
        distance = Distance.between(model, dense, ids, temperature)
        assert distance.heads is not None
        value = distance(ids)
        (gradient,) = torch.autograd.grad(value, weight)
        with torch.no_grad():
            wanted = dense(ids).logits
        expected = logits_kl(model(ids).logits, wanted, temperature)
        (reference,) = torch.autograd.grad(expected, weight)
        assert float(value) == pytest.approx(float(expected), rel=1e-4)
        assert torch.allclose(gradient, reference, rtol=1e-3, atol=1e-7)


def test_distance_uses_logits_where_the_head_is_not_all() -> None:
    dense, model, _ = compressed()
    for each in (dense, model):
        head = each.lm_head
        head.register_forward_hook(lambda module, args, out: out / 3)
    distance = Distance.between(model, dense, stream(32).view(1, 32), 1.0)
    assert distance.heads is not None  # The hook is part of the head.
    dense.forward = lambda **given: type("Out", (), {"logits": torch.zeros(1, 32, VOCAB)})()
    assert Distance.between(model, dense, stream(32).view(1, 32), 1.0).heads is None


def test_sample_draws_from_the_models_distribution_and_repeats() -> None:
    dense = tiny()
    beginnings = torch.zeros(400, 1, dtype=torch.int64)
    ids = sample(dense, beginnings, 2, seed=3)
    assert torch.equal(ids, sample(dense, beginnings, 2, seed=3))
    assert not torch.equal(ids, sample(dense, beginnings, 2, seed=4))
    with torch.no_grad():
        wanted = dense(torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1].softmax(-1)
    found = torch.bincount(ids[:, 1], minlength=VOCAB) / 400
    assert float((found - wanted).abs().max()) < 5 * float((wanted * (1 - wanted) / 400).sqrt().max())


def test_sample_in_place_draws_what_the_models_own_cache_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny()
    before = dense.config._attn_implementation
    beginnings = torch.tensor([[1, 2, 3], [4, FREE, FREE], [5, 6, FREE]])
    ids = sample(dense, beginnings, 24, seed=3)
    assert dense.config._attn_implementation == before
    assert ids.shape == (3, 24) and ids[0, :3].tolist() == [1, 2, 3] and ids[2, :2].tolist() == [5, 6]
    monkeypatch.setattr(type(dense), "_supports_attention_backend", False)
    assert torch.equal(ids, sample(dense, beginnings, 24, seed=3))


def test_sample_begins_anew_after_an_end() -> None:
    dense = tiny()
    beginnings = torch.zeros(300, 1, dtype=torch.int64)
    dense.generation_config.eos_token_id = [0, 7]
    ids = sample(dense, beginnings, 2, seed=3)
    found = torch.bincount(ids[:, 1], minlength=VOCAB) / 300
    assert float((found - 1 / VOCAB).abs().max()) < 5 * (1 / VOCAB / 300) ** 0.5


def test_models_do_not_look_for_several_sequences_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    model, ids, calls = tiny(), stream(60).view(3, 20), []
    search = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: (calls.append(1), search(ids))[1])
    plain = model(ids, use_cache=False).logits
    assert len(calls) == 1
    with one_sequence_a_row():
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert len(calls) == 1
    model(ids, use_cache=False)
    assert len(calls) == 2


def test_models_make_no_mask_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import import_utils

    if not hasattr(import_utils, "is_cuda_stream_capturing"):
        pytest.skip("this transformers does not know of captures")
    model, ids, masks = tiny(), stream(60).view(3, 20), []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    model(ids, use_cache=False)
    with one_sequence_a_row():
        model(ids, use_cache=False)
    assert masks[0] is not None and masks[1] is None
    assert import_utils.is_cuda_stream_capturing()


def test_recovery_gives_up_its_graph_when_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, weights = compressed()
    measure, calls = Run._measure, []
    monkeypatch.setattr("marlin.compress.training.record", lambda function, *tensors: function)

    def short(self: Run) -> float:
        calls.append(self.recorded is not None)
        if calls == [True]:
            raise torch.cuda.OutOfMemoryError
        return measure(self)

    monkeypatch.setattr(Run, "_measure", short)
    plain = recover(copy.deepcopy(model), dense, weights, stream(), recovery=Recovery(steps=6, **QUICK)).report
    assert calls[:3] == [True, False, False] and not any(calls[1:]) and plain["steps"] == 6
    calls[:] = [False]
    graph = recover(copy.deepcopy(model), dense, weights, stream(), recovery=Recovery(steps=6, **QUICK)).report
    assert calls[1] and graph["history"] == plain["history"]


def test_prompts_are_pieces_of_text_and_single_tokens() -> None:
    text = torch.arange(1000, 2000)
    rows = prompts(text, VOCAB, 400, 0, seed=0, begin=5000)
    assert torch.equal(rows, prompts(text, VOCAB, 400, 0, seed=0, begin=5000))
    assert not torch.equal(rows, prompts(text, VOCAB, 400, 1, seed=0, begin=5000))
    pieces, single = rows[rows[:, 1] != FREE], rows[rows[:, 1] == FREE]
    assert bool((pieces.diff(dim=1) == 1).all()) and 0.3 < len(pieces) / 400 < 0.45
    assert bool((single[:, 1:] == FREE).all())
    begun = single[:, 0] == 5000
    assert 0.08 < int(begun.sum()) / 400 < 0.17 and int(single[~begun, 0].max()) < VOCAB


def test_batches_draw_each_stream_by_its_share_and_repeat() -> None:
    batches = Batches([torch.arange(500), torch.arange(1000, 1500)], [0.75, 0.25], 16, 8, seed=0)
    rows = torch.cat([batches(step) for step in range(50)])
    assert torch.equal(batches(7), batches(7)) and not torch.equal(batches(7), batches(8))
    assert bool((rows.diff(dim=1) == 1).all())
    assert 0.65 < float((rows[:, 0] < 500).float().mean()) < 0.85


def test_recovery_of_a_model_whose_texts_begin_with_a_token_sees_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, weights = compressed()
    asked, seen = [], []
    measure = Distance.__call__

    def draw(model: Any, rows: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        asked.append(rows)
        return sample(model, rows, *args, **more)

    def note(self: Distance, ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return measure(self, ids)

    monkeypatch.setattr("marlin.compress.recovery.sample", draw)
    monkeypatch.setattr(Distance, "__call__", note)
    recover(model, dense, weights, stream(), recovery=Recovery(steps=3, begin=5, **QUICK))
    assert asked and all(set(rows[:, 0].tolist()) == {5} for rows in asked)
    assert seen and all(set(rows[:, 0].tolist()) == {5} for rows in seen)
    alone = prompts(stream(), VOCAB, 400, 0, seed=0, begin=9, always=5)
    assert set(alone[:, 0].tolist()) == {5} and 0.08 < float((alone[:, 1] == FREE).float().mean()) < 0.17
    batches = Batches([torch.arange(500)], [1.0], 16, 8, seed=0)
    begun = replace(batches, begin=7)
    assert begun(1)[:, 0].tolist() == [7] * 8 and torch.equal(begun(1)[:, 1:], batches(1)[:, 1:])


@pytest.mark.parametrize(("divergence", "rate"), [(0.01, 3e-4), (0.4, 1e-3), (3.0, 2e-3)])
def test_the_learning_rate_follows_the_divergence_unless_given(divergence: float, rate: float) -> None:
    assert Recovery(steps=1).rate_for(divergence) == pytest.approx(rate)
    assert Recovery(steps=1, learning_rate=5e-3).rate_for(divergence) == 5e-3


def test_held_out_text_is_the_tail_and_is_never_drawn() -> None:
    train, held_out = split_held_out(torch.arange(3210), 32, 3)
    assert held_out.shape == (6, 32)
    assert int(held_out[-1, -1]) == 3209 and int(train[-1]) + 1 == int(held_out[0, 0])
