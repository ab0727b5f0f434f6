"""Low-rank corrections in vLLM's layers, against its own Python code on the CPU: loading, cuts, and products.

Ranks and loading are those of `test_vllm_plugin`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file
from test_published_packers import random_weight
from test_vllm_plugin import MERGED, K, World, close, load, output
from test_vllm_plugin import world as world  # a fixture of every test here
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm.model_executor.layers import linear, vocab_parallel_embedding

import marlin
from marlin.errors import CheckpointError
from marlin.formats.checkpoint import LayerSpec, describe
from marlin.formats.low_rank import LowRank
from marlin.integrations.vllm.config import SparseMarlinConfig
from marlin.nn import SparseLinear, replace_linears, sparse_linears

HEADS, KV_HEADS, HEAD = 8, 2, 64
# (rows, columns, rank, kind) of the layers; rank 0: no correction.
LAYERS = {
    "self_attn.q_proj": (512, K, 3, "w4a16_sp24"),
    "self_attn.k_proj": (128, K, 0, "w4a16_sp24"),
    "self_attn.v_proj": (128, K, 5, "w4a16_dense"),
    "self_attn.o_proj": (K, 512, 6, "w4a16_sp24"),
    "mlp.gate_proj": (512, K, 4, "w4a16_sp24"),
    "mlp.up_proj": (512, K, 7, "w4a16_sp24"),
    "mlp.down_proj": (K, 512, 2, "w4a16_sp24"),
}


def correction(n: int, k: int, rank: int) -> LowRank:
    """Of about the size of the weight, so that one that is left out or in the wrong place shows."""
    return LowRank(torch.randn(n, rank) / 8, torch.randn(rank, k) / 8)


def corrected(n: int, k: int = K, rank: int = 4) -> SparseLinear:
    return SparseLinear.from_weight(random_weight(n, k, 64, True, torch.float32), low_rank=correction(n, k, rank))


def tensors_of(layer: SparseLinear) -> dict[str, Tensor]:
    return dict(layer.named_buffers())


def config_of(layers: Mapping[str, SparseLinear]) -> SparseMarlinConfig:
    specs = {}
    for name, layer in layers.items():
        rank = 0 if layer.low_rank is None else layer.low_rank.rank
        specs[name] = LayerSpec(layer.kind, layer.group_size, layer.out_features, layer.in_features, rank)
    config = SparseMarlinConfig.from_config(describe(specs))
    config.packed_modules_mapping = MERGED
    return config


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A saved model of one block in fp16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=K,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        vocab_size=64,
        dtype="float16",
    )
    model = AutoModelForCausalLM.from_config(config)
    prefix = "model.layers.0."
    weights = {prefix + name: random_weight(n, k, 64, "sp24" in kind) for name, (n, k, _, kind) in LAYERS.items()}
    low_rank = {prefix + name: correction(n, k, rank) for name, (n, k, rank, _) in LAYERS.items() if rank}
    replace_linears(model, weights, low_rank=low_rank)
    path = tmp_path_factory.mktemp("low_rank") / "model"
    marlin.save_pretrained(model, path)
    return path


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_saved_model_with_corrections_computes_its_dense_slices(world: World, directory: pathlib.Path, tp: int):
    world.size = tp
    config = SparseMarlinConfig.from_config(json.loads((directory / "config.json").read_text())["quantization_config"])
    config.packed_modules_mapping = MERGED
    files = load_file(directory / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory)
    dense = {name.rpartition(".")[2]: layer.to_dense(torch.float32) for name, layer in sparse_linears(model)}
    named = {"bias": False, "quant_config": config, "params_dtype": torch.float32}

    def fill(layer: torch.nn.Module, name: str, shard: object = None) -> None:
        own = {key.removeprefix(f"{name}."): t for key, t in files.items() if key.startswith(f"{name}.")}
        assert ("low_rank_up" in own) == ("low_rank_down" in own) == (LAYERS[name.split(".", 3)[3]][2] > 0)
        load(layer, own, shard)

    act, wide = torch.randn(2, 3, K), torch.randn(3, 512)
    o, down = torch.zeros(3, K), torch.zeros(3, K)
    for world.rank in range(tp):
        prefix = "model.layers.0.self_attn"
        qkv = linear.QKVParallelLinear(K, HEAD, HEADS, KV_HEADS, prefix=f"{prefix}.qkv_proj", **named)
        for shard in "qkv":
            fill(qkv, f"{prefix}.{shard}_proj", shard)
        queries, keys = HEAD * HEADS // tp, HEAD * max(KV_HEADS // tp, 1)
        first = world.rank * KV_HEADS // tp * HEAD
        rows = [dense["q_proj"][queries * world.rank :][:queries]]
        rows += [dense[name][first : first + keys] for name in ("k_proj", "v_proj")]
        close(output(qkv, act), act @ torch.cat(rows).T)
        assert qkv.low_rank == 8 and qkv.low_rank_up.shape == (queries + 2 * keys, 8)
        row = linear.RowParallelLinear(512, K, prefix=f"{prefix}.o_proj", **named)
        fill(row, f"{prefix}.o_proj")
        o += output(row, wide.chunk(tp, -1)[world.rank])
        prefix = "model.layers.0.mlp"
        gate_up = linear.MergedColumnParallelLinear(K, [512, 512], prefix=f"{prefix}.gate_up_proj", **named)
        for shard, name in enumerate(("gate_proj", "up_proj")):
            fill(gate_up, f"{prefix}.{name}", shard)
        rows = [dense[name].chunk(tp)[world.rank] for name in ("gate_proj", "up_proj")]
        close(output(gate_up, act), act @ torch.cat(rows).T)
        assert len(gate_up.products) == 1 and gate_up.low_rank == 11
        row = linear.RowParallelLinear(512, K, prefix=f"{prefix}.down_proj", **named)
        fill(row, f"{prefix}.down_proj")
        down += output(row, wide.chunk(tp, -1)[world.rank])
    close(o, wide @ dense["o_proj"].T)
    close(down, wide @ dense["down_proj"].T)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_correction_of_a_layer_merged_in_the_checkpoint_keeps_one_down(world: World, tp: int):
    world.size = tp
    whole, act = corrected(512), torch.randn(2, K)
    for world.rank in range(tp):
        layer = linear.MergedColumnParallelLinear(
            K,
            [256, 256],
            bias=False,
            quant_config=config_of({"gate_up_proj": whole}),
            prefix="gate_up_proj",
            params_dtype=torch.float32,
        )
        load(layer, tensors_of(whole))
        rows = torch.cat([half.chunk(tp)[world.rank] for half in whole.to_dense().chunk(2)])
        close(output(layer, act), act @ rows.T)
        assert layer.low_rank == 4 and torch.equal(layer.low_rank_down, whole.low_rank_down)


def test_correction_beside_a_part_that_is_not_quantized():
    gate, up, act, bias = corrected(96), torch.randn(96, K), torch.randn(2, K), torch.randn(192)
    layer = linear.MergedColumnParallelLinear(
        K,
        [96, 96],
        bias=True,
        quant_config=config_of({"gate_proj": gate}),
        prefix="gate_up_proj",
        params_dtype=torch.float32,
    )
    load(layer, {**tensors_of(gate), "bias": bias[:96]}, 0)
    load(layer, {"weight": up, "bias": bias[96:]}, 1)
    close(output(layer, act), act @ torch.cat([gate.to_dense(), up]).T + bias)


def test_replicated_layers_and_the_head_load_corrections_whole_or_by_rows(world: World):
    world.size = 2
    one, head, act = corrected(96), corrected(200), torch.randn(2, K)
    config, logits = config_of({"kv_a": one, "lm_head": head}), []
    named = {"bias": False, "quant_config": config, "params_dtype": torch.float32}
    for world.rank in range(2):
        layer = linear.ReplicatedLinear(K, 96, prefix="kv_a", **named)
        load(layer, tensors_of(one))
        close(output(layer, act), act @ one.to_dense().T)
        layer = vocab_parallel_embedding.ParallelLMHead(200, K, prefix="lm_head", **named)
        load(layer, tensors_of(head))
        layer.quant_method.process_weights_after_loading(layer)
        logits.append(layer.quant_method.apply(layer, act))
    close(torch.cat(logits, -1)[:, :200], act @ head.to_dense().T)
    assert float(torch.cat(logits, -1)[:, 200:].abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_corrected_layer_of_16_bits_computes_as_that_of_transformers(dtype: torch.dtype):
    one = corrected(128).to(dtype)
    layer = linear.RowParallelLinear(
        K, 128, bias=False, quant_config=config_of({"o": one}), prefix="o", params_dtype=dtype
    )
    load(layer, tensors_of(one))
    act = torch.randn(5, K).to(dtype)
    assert torch.equal(output(layer, act), one(act))
    assert {t.dtype for name, t in layer.named_parameters() if name.startswith("low_rank")} == {dtype}


def test_corrected_layer_is_one_graph_when_compiled():
    parts, act = {"gate_proj": corrected(128), "up_proj": corrected(128, rank=3)}, torch.randn(2, K)
    layer = linear.MergedColumnParallelLinear(
        K,
        [128, 128],
        bias=False,
        quant_config=config_of(parts),
        prefix="gate_up_proj",
        params_dtype=torch.float32,
    )
    for shard, one in enumerate(parts.values()):
        load(layer, tensors_of(one), shard)
    expected = output(layer, act)
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), fullgraph=True, backend="eager")
    close(compiled(act), expected)


def test_layer_without_a_correction_holds_none():
    one = SparseLinear.from_weight(random_weight(64, K, 64, True, torch.float32))
    layer = linear.RowParallelLinear(K, 64, bias=False, quant_config=config_of({"o": one}), prefix="o")
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.low_rank == 0 and not hasattr(layer, "low_rank_up")


def test_corrections_of_another_shape_or_not_finite_are_refused():
    one = corrected(128)
    layer = linear.ColumnParallelLinear(
        K, 128, bias=False, quant_config=config_of({"up_proj": one}), prefix="up_proj", params_dtype=torch.float16
    )
    with pytest.raises(CheckpointError) as caught:
        load(layer, {"low_rank_down": one.low_rank_down[:3]})
    assert str(caught.value) == (
        "layer up_proj: low_rank_down must have shape (4, 256), as config.json says; got (3, 256). "
        "Copy the files again."
    )
    load(layer, {**tensors_of(one), "low_rank_up": one.low_rank_up * 1e6})
    with pytest.raises(CheckpointError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    assert str(caught.value) == (
        "layer up_proj: low_rank_up must be finite; got NaN or infinity in torch.float16. "
        "Values beyond float16 need --dtype bfloat16; otherwise copy or download the files again."
    )
