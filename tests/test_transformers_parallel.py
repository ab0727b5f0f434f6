"""Two ranks over gloo on the CPU: a compressed model under the model's tensor-parallel plan gives the logits of one."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, Qwen2Config

import marlin
from marlin.formats import CompressedWeight, DenseInt4Weight, Weight, group_scales, quantize, top2_mask
from marlin.formats.low_rank import LowRank
from marlin.integrations.transformers import parallel
from marlin.nn import SparseLinear, replace_linears, sparse_linears

CHILD = pathlib.Path(__file__).with_name("parallel_child.py")
ROOT = pathlib.Path(__file__).parents[1]
PROMPT = [3, 14, 15, 92, 65, 35]
# Kinds and group sizes of layers; what is not here stays dense.
KINDS = {
    "q_proj": ("w4a16_sp24", 64),
    "k_proj": ("w4a16_dense", 32),
    "o_proj": ("w4a16_sp24", 64),
    "gate_proj": ("w4a16_sp24", -1),
    "down_proj": ("w4a16_sp24", -1),
    "lm_head": ("w4a16_sp24", 64),
}


def random_weight(n: int, k: int, group_size: int, kind: str = "w4a16_sp24") -> Weight:
    dense = torch.randn(n, k) / k**0.5
    mask = top2_mask(dense.abs()) if kind == "w4a16_sp24" else None
    scales = group_scales(dense, group_size, mask)
    codes = quantize(dense, scales)
    if mask is None:
        return DenseInt4Weight(codes, scales, group_size)
    return CompressedWeight.from_codes(codes, mask, scales, group_size)


def save_model(directory: pathlib.Path) -> None:
    """A small Qwen2 (its q, k, v have biases): layers of every kind, dense ones, and some low-rank corrections."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config)
    weights: dict[str, Any] = {}
    for name, module in model.named_modules():
        kind, group_size = KINDS.get(name.rpartition(".")[2], ("", 0))
        if not isinstance(module, torch.nn.Linear) or not kind or name.startswith("model.layers.1.self_attn.o"):
            continue
        if module.bias is not None:
            torch.nn.init.normal_(module.bias)
        weights[name] = random_weight(*module.weight.shape, group_size, kind)
    corrected = [name for name in weights if name.endswith(("q_proj", "o_proj"))]
    low_rank = {name: LowRank(torch.randn(weights[name].n, 2) / 8, torch.randn(2, 256) / 8) for name in corrected}
    replace_linears(model, weights, low_rank=low_rank)
    marlin.save_pretrained(model, directory)


def run(directory: pathlib.Path, root: pathlib.Path, plan: str = "auto") -> tuple[list[int], str, dict[str, Any]]:
    """(exit codes, output of rank 0, what it found) of two ranks."""
    root.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        own |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        own["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        words = [sys.executable, str(CHILD), str(directory), json.dumps(PROMPT), str(root / "result.json"), plan]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(words, env={**os.environ, **own}, **pipes))  # type: ignore[call-overload]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    result = root / "result.json"
    found = json.loads(result.read_text()) if result.exists() else {}
    return [process.returncode for process in processes], outputs[0], found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("parallel") / "model"
    save_model(path)
    return path


def tensors(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.skipif(not parallel.register_styles(), reason="needs transformers' DTensor-based parallelism")
def test_two_ranks_give_the_logits_of_one_and_save_the_whole_model(directory: pathlib.Path):
    codes, output, found = run(directory, directory.parent / "auto")
    assert codes == [0, 0], output[-4000:]
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        whole = model(torch.tensor([PROMPT])).logits[0]
        tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=4, do_sample=False)[0]
    torch.testing.assert_close(torch.tensor(found["logits"]), whole, rtol=1e-4, atol=1e-4)
    assert found["tokens"] == tokens.tolist()
    full = {name: list(layer.codes.shape) for name, layer in sparse_linears(model)}
    assert full.keys() == found["shapes"].keys()
    for name, (tiles_n, tiles_k, words) in full.items():
        cut = [tiles_n, tiles_k // 2] if name.endswith(("o_proj", "down_proj")) else [tiles_n // 2, tiles_k]
        assert found["shapes"][name] == [*cut, words], name
    assert "dequantize: layers must be whole" in found["refused"]
    before, after = tensors(directory), tensors(directory.parent / "auto" / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_plan_names_our_styles_for_packed_layers_only(directory: pathlib.Path):
    if not parallel.register_styles():
        pytest.skip("needs transformers' DTensor-based parallelism")
    plan = AutoModelForCausalLM.from_pretrained(directory).tp_plan
    styles = {name.rpartition(".")[2]: style for name, style in plan.items()}
    assert styles["q_proj"] == styles["gate_proj"] == "sparse_marlin_colwise"
    assert styles["o_proj"] == styles["down_proj"] == "sparse_marlin_rowwise"
    assert styles["lm_head"] == "sparse_marlin_colwise_gather_output"
    assert styles["v_proj"] == styles["up_proj"] == "colwise"


@pytest.mark.skipif(not parallel.register_styles(), reason="needs transformers' DTensor-based parallelism")
@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("dim", [0, 1])
def test_cut_layers_add_up_to_the_whole_one(dim: int, group_size: int):
    """Both ranks in this process, without communication."""
    torch.manual_seed(1)
    low_rank = LowRank(torch.randn(128, 3), torch.randn(3, 256))
    whole = SparseLinear.from_weight(random_weight(128, 256, group_size), low_rank=low_rank)
    act, parts = torch.randn(5, 256), []
    for rank in range(2):
        torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            layer = SparseLinear(256, 128, group_size=group_size, dtype=torch.float32, device="meta", low_rank=3)
            parallel.shard(layer, init_device_mesh("cpu", (2,)), dim)
            assert parallel.is_sharded(layer)
            for name, tensor in whole.state_dict().items():
                own = parallel.local(layer._parameters[name])
                cuts = [axis for axis in range(tensor.ndim) if own.shape[axis] != tensor.shape[axis]]
                values = tensor.chunk(2, cuts[0])[rank] if cuts else tensor
                layer._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
            parts.append(layer(act if dim == 0 else act.chunk(2, 1)[rank]))
        finally:
            torch.distributed.destroy_process_group()
    found = torch.cat(parts, 1) if dim == 0 else parts[0] + parts[1]
    torch.testing.assert_close(found, whole(act), rtol=1e-4, atol=1e-3)


class Mesh:
    """As many ranks as a test needs, without processes."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def size(self) -> int:
        return self._ranks


@pytest.mark.parametrize(
    ("dim", "ranks", "group_size", "text"),
    [
        (0, 4, 64, "tp_plan: 4 ranks must each get whole rows of 64; got a layer [128, 256]. Use another number"),
        (1, 8, 64, "tp_plan: 8 ranks must each get whole columns of 64; got a layer [128, 256]. Use another number"),
        (1, 4, 128, "tp_plan: 4 ranks must each get whole columns of 128; got a layer [128, 256]. Use another number"),
    ],
)
def test_cuts_within_tiles_and_groups_are_refused(dim: int, ranks: int, group_size: int, text: str):
    layer = SparseLinear(256, 128, group_size=group_size, device="meta")
    with pytest.raises(ValueError) as caught:
        parallel.shard(layer, Mesh(ranks), dim)
    assert str(caught.value).startswith(text)
    assert not parallel.is_sharded(layer)


def test_layers_that_another_style_left_whole_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "_api", lambda: object())
    model = torch.nn.Sequential(SparseLinear(128, 64))
    parallel.check_loaded(model)
    model._tp_size = 2
    parallel.check_loaded(model)
    model[0].forward = lambda act: act
    with pytest.raises(marlin.UnsupportedError) as caught:
        parallel.check_loaded(model)
    assert str(caught.value).startswith("tp_plan: packed layers must have one of the styles sparse_marlin_colwise, ")


def test_versions_that_cut_no_dtensors_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "_api", lambda: None)
    model = torch.nn.Sequential(SparseLinear(128, 64))
    parallel.check_loaded(model)
    model._tp_size = 2
    with pytest.raises(marlin.UnsupportedError, match="compressed layers need the DTensor-based parallelism"):
        parallel.check_loaded(model)
