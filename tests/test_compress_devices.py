"""Calibration shared out over several devices: two of the CPU stand for two GPUs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from marlin import streaming
from marlin.compress import Compressed, LayerRecipe, Options, Recipe, blocks, compress_model
from marlin.compress.replicas import Replicas, owner
from tests.test_compress_reconstruct import with_experts
from tests.test_compress_walk import assert_same, tiny, tokens
from tests.test_streaming import tensors_of

transformers = pytest.importorskip("transformers")

RECIPE = Recipe((("*.v_proj", LayerRecipe(kind="w4a16_dense", group_size=32, low_rank=4)),), LayerRecipe(group_size=32))
IDS = tokens(samples=10)
TWO = ("cpu", "cpu")


def run(device: Any, model: Any = None, **more: Any) -> Compressed:
    made = tiny() if model is None else model
    return compress_model(made, IDS, RECIPE, options=Options(device, batch=2, autocast="none", **more))


@pytest.mark.parametrize("sequential", [False, True])
def test_two_devices_find_what_one_finds(sequential: bool) -> None:
    one, two = run("cpu", sequential=sequential), run(TWO, sequential=sequential)
    for mine, other in zip(one.report, two.report, strict=True):
        assert (mine.name, mine.tokens) == (other.name, other.tokens)
        assert other.relative_error == pytest.approx(mine.relative_error, rel=0.1)
    # Why the first layer: in those after it, other roundings have led to other codes.
    first = "model.layers.0.self_attn.q_proj"
    assert float((one.weights[first].codes == two.weights[first].codes).float().mean()) > 0.99
    assert_same(two, run("cpu,cpu", sequential=sequential))


def test_two_devices_train_blocks_and_give_the_same_bits_again() -> None:
    one, two = run("cpu", reconstruct=8), run(TWO, reconstruct=8)
    assert_same(two, run(TWO, reconstruct=8))
    for mine, other in zip(one.blocks, two.blocks, strict=True):
        assert other.error_after == pytest.approx(mine.error_after, rel=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_devices_count_the_tokens_of_experts_once() -> None:
    one, two = run("cpu", with_experts()), run(TWO, with_experts())
    assert [(row.name, row.tokens) for row in one.report] == [(row.name, row.tokens) for row in two.report]
    assert sorted(row.tokens for row in two.report)[0] == 0


def test_more_devices_than_batches_are_left_idle() -> None:
    done = compress_model(tiny(1), IDS[:2], RECIPE, options=Options(["cpu"] * 4, batch=1, autocast="none"))
    assert {row.tokens for row in done.report} == {IDS[:2].numel()}


def test_input_sums_of_two_shares_add_up_and_drop_layers_of_other_tokens() -> None:
    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 8) for name in ("even", "absent", "longer")}
    batches = [torch.randn(2, 3, 8) for _ in range(4)]

    def sums(part: list[torch.Tensor], known: bool) -> blocks.InputSums:
        found = blocks.InputSums()
        with found.collect(layers):
            for rows in part:
                reference = {"even": rows + 1, "absent": rows, "longer": rows if known else torch.cat([rows, rows])}
                found.refer({name: reference[name] for name in layers if known or name != "absent"})
                for layer in layers.values():
                    layer(rows)
        return found

    whole, first, second = sums(batches, True), sums(batches[:2], True), sums(batches[2:], False)
    first.merge(second, torch.device("cpu"))
    assert set(whole.cross) == set(layers) and set(first.cross) == {"even"}
    assert torch.allclose(first.cross["even"], whole.cross["even"], rtol=1e-5, atol=1e-5)
    for name in layers:
        assert first.sums[name].tokens == whole.sums[name].tokens == 24
        assert torch.allclose(first.sums[name].total, whole.sums[name].total, rtol=1e-5, atol=1e-5)


def test_failure_of_a_worker_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    original = blocks.BlockRunner.__call__

    def failing(self: Any, hidden: torch.Tensor, call: Any) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread() and bool((hidden == last).all()):
            raise RuntimeError("the second device gave up")
        return original(self, hidden, call)

    model = tiny(1)
    last = model.model.embed_tokens(IDS[8:]).detach()
    monkeypatch.setattr(blocks.BlockRunner, "__call__", failing)
    with pytest.raises(RuntimeError, match=r"^the second device gave up$"):
        run(TWO, model)


def test_shares_are_neighbours_in_order_and_replicas_follow() -> None:
    assert [owner(index, 5, 2) for index in range(5)] == [0, 0, 0, 1, 1]
    assert [owner(index, 3, 4) for index in range(3)] == [0, 1, 2]
    block = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    replicas = Replicas(block, [torch.device("cpu")] * 3, None)
    assert replicas.spread(lambda run, share: share, 5) == [[0, 1], [2, 3], [4]]
    assert replicas.each(lambda run, index: (index, run is replicas.runs[2]), 3) == [(0, False), (1, False), (2, True)]
    assert replicas.spread(lambda run, share: torch.is_grad_enabled(), 3) == [False] * 3
    for layer in block.values():
        layer.weight.data.fill_(7.0)
    replicas.follow(["a"])
    copies = [run.block for run in replicas.runs[1:]]
    assert all(bool((each["a"].weight == 7).all()) and not bool((each["b"].weight == 7).any()) for each in copies)
    replicas.follow()
    assert all(bool((each["b"].weight == 7).all()) for each in copies)


def test_two_devices_compress_out_of_the_files(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "dense")
    precision = streaming.Precision(torch.float32, torch.float16)
    written = []
    for name, device in (("one", "cpu"), ("two", TWO)):
        options = Options(device, autocast="none", reconstruct=4)
        streaming.compress_directory(
            tmp_path / "dense", tmp_path / name, IDS, RECIPE, precision=precision, options=options
        )
        written.append(tensors_of(tmp_path / name))
    assert written[0].keys() == written[1].keys()
    scales = "model.layers.0.mlp.up_proj.scales"
    assert torch.allclose(written[0][scales].float(), written[1][scales].float(), rtol=0.2)


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ((), "device must name at least one device; got ()."),
        (("cpu", "cuda:0"), "devices must be of one type; got cpu, cuda:0."),
        ("cuda,cuda:0", "each GPU must be named once; got cuda, cuda:0."),
        (
            "cpu,gpu0",
            "device must name devices of torch; got 'cpu,gpu0'. Use names like cpu or cuda:0, several with commas "
            "between them.",
        ),
    ],
)
def test_options_refuse_devices_that_make_no_sense(device: Any, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Options(device)
    assert str(caught.value) == f"Options: {text}"


def test_options_name_devices_in_order() -> None:
    options = Options("cuda:1, cuda:0")
    assert [str(each) for each in options.devices] == ["cuda:1", "cuda:0"]
    assert str(options.first_device) == "cuda:1"
    assert Options(torch.device("cpu")).devices == Options().devices == (torch.device("cpu"),)
