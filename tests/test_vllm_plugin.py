"""The plugin against vLLM's own Python code on the CPU: registration, which layers are ours, loading, and products.

Runs where vLLM's Python package can be imported; its CUDA libraries are not needed. Tensor parallelism is that of
vLLM's layers and parameters, rank after rank, with only the questions "which rank" and "how many" answered here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_published_packers import PACKERS, pack_pack_quantized, random_weight
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("vllm", reason="needs the Python package vllm")
try:
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.layers import linear, vocab_parallel_embedding
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.models.utils import WeightsMapper
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
    from vllm.platforms import PlatformEnum
    from vllm.scalar_type import scalar_types
except ImportError as error:
    pytest.skip(f"vllm lacks a package that it needs: {error}", allow_module_level=True)

import vllm.model_executor.parameter as parameter_module

from marlin import settings
from marlin.errors import CheckpointError
from marlin.formats import CompressedWeight, Weight
from marlin.formats.checkpoint import LayerSpec, describe
from marlin.formats.layouts import pack
from marlin.formats.published import describe_pack_quantized
from marlin.integrations.vllm import plugin, register
from marlin.integrations.vllm.config import SparseMarlinConfig
from marlin.integrations.vllm.kernel import SparseMarlinLinearKernel
from marlin.integrations.vllm.linear import SparseMarlinLinearMethod

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
K = 256


@dataclass
class World:
    """Which rank of how many the layers believe to be."""

    rank: int = 0
    size: int = 1


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    register()
    state = World()
    for module in (linear, parameter_module, vocab_parallel_embedding):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: state.rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: state.size)
    monkeypatch.setattr(linear, "tensor_model_parallel_all_reduce", lambda x: x)
    yield state


def our_tensors(weight: Weight) -> dict[str, Tensor]:
    packed = pack(weight)
    tensors = {"codes": packed.codes, "meta": packed.meta, "scales": packed.scales}
    return {leaf: tensor for leaf, tensor in tensors.items() if tensor is not None}


def our_config(weights: Mapping[str, Weight]) -> SparseMarlinConfig:
    specs = {name: LayerSpec(w.kind, w.group_size, w.n, w.k) for name, w in weights.items()}
    config = SparseMarlinConfig.from_config(describe(specs))
    config.packed_modules_mapping = MERGED
    return config


def load(layer: nn.Module, tensors: Mapping[str, Tensor], shard_id: Any = None) -> None:
    """As vLLM's models load: through the weight_loader of the parameter of that name."""
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, tensor) if shard_id is None else param.weight_loader(param, tensor, shard_id)


def output(layer: Any, act: Tensor) -> Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)  # a second call changes nothing
    result = layer(act)
    return result[0] if isinstance(result, tuple) else result


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def weight(n: int, k: int = K, group_size: int = 64, sparse: bool = True) -> Weight:
    return random_weight(n, k, group_size, sparse, torch.float32)


def dense(one: Weight) -> Tensor:
    return one.to_dense(torch.float32)


def test_registration_is_idempotent_and_comes_first():
    register()
    plugin()
    assert get_quantization_config("sparse_marlin") is SparseMarlinConfig
    cuda = kernels._POSSIBLE_KERNELS[PlatformEnum.CUDA]
    assert cuda[0] is SparseMarlinLinearKernel
    assert cuda.count(SparseMarlinLinearKernel) == 1
    assert "SparseMarlinLinearMethod" in linear.WEIGHT_LOADER_V2_SUPPORTED


CT = {
    "quant_method": "compressed-tensors",
    "format": "marlin-24",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
        }
    },
    "ignore": ["lm_head", "re:.*down_proj"],
}
GPTQ = {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": 4, "group_size": 128, "sym": True}


@pytest.mark.parametrize(
    ("config", "user", "method"),
    [
        (CT, None, "sparse_marlin"),
        (GPTQ, None, "sparse_marlin"),
        (GPTQ, "gptq", "sparse_marlin"),
        ({**GPTQ, "checkpoint_format": None, "is_marlin_24_format": True}, None, "sparse_marlin"),
        ({**GPTQ, "quant_method": "gptq_marlin_24"}, None, "sparse_marlin"),
        (CT, "humming", None),
        ({**CT, "format": "pack-quantized"}, None, None),
        ({**GPTQ, "checkpoint_format": "gptq"}, None, None),
        ({"quant_method": "fp8"}, None, None),
    ],
)
def test_marlin_24_is_taken_over_and_nothing_else(config: dict[str, Any], user: str | None, method: str | None):
    assert SparseMarlinConfig.override_quantization_method(config, user, hf_config=None) == method


def test_unreadable_descriptions_are_refused_by_name():
    with pytest.raises(CheckpointError, match="version must be 1"):
        SparseMarlinConfig.from_config({"quant_method": "sparse_marlin", "version": 2, "layers": {}})
    with pytest.raises(CheckpointError) as caught:
        SparseMarlinConfig.from_config({**CT, "format": "pack-quantized"})
    assert str(caught.value) == (
        "config.json, quantization_config: all layers must be in one marlin-24 format with one group size; "
        "got pack-quantized; group sizes [128]. Convert the checkpoint: marlin convert DIR OUT."
    )


def test_layers_are_found_under_their_own_and_their_merged_names():
    config = our_config({"model.a.q_proj": weight(64), "model.a.gate_up_proj": weight(128), "lm_head": weight(64)})
    make = lambda cls, *args, **named: cls(*args, bias=False, quant_config=config, params_dtype=torch.float32, **named)  # noqa: E731
    qkv = make(linear.QKVParallelLinear, K, 64, 1, 1, prefix="model.a.qkv_proj")
    assert isinstance(qkv.quant_method, SparseMarlinLinearMethod)
    down = make(linear.RowParallelLinear, K, 64, prefix="model.a.down_proj")
    assert isinstance(down.quant_method, linear.UnquantizedLinearMethod)
    fused = make(linear.MergedColumnParallelLinear, K, [64, 64], prefix="model.a.gate_up_proj")
    assert isinstance(fused.quant_method, SparseMarlinLinearMethod)
    embed = vocab_parallel_embedding.VocabParallelEmbedding(64, K, quant_config=config, prefix="model.embed_tokens")
    assert not isinstance(embed.quant_method, SparseMarlinLinearMethod)
    head = vocab_parallel_embedding.ParallelLMHead(64, K, quant_config=config, prefix="lm_head")
    assert isinstance(head.quant_method, SparseMarlinLinearMethod)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert "language_model.model.a.q_proj" in config.layers


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["w4a16_sp24", "w4a16_dense"])
def test_column_and_row_parallel_layers_compute_their_slices(world: World, tp: int, kind: str):
    world.size = tp
    up, down = weight(512, sparse=kind == "w4a16_sp24"), weight(64, 512, sparse=kind == "w4a16_sp24")
    bias, act = torch.randn(512), torch.randn(3, K)
    hidden, partial = [], torch.zeros(3, 64)
    for world.rank in range(tp):
        config = our_config({"up_proj": up, "down_proj": down})
        layer = linear.ColumnParallelLinear(
            K, 512, bias=True, quant_config=config, prefix="up_proj", params_dtype=torch.float32
        )
        load(layer, {**our_tensors(up), "bias": bias})
        hidden.append(output(layer, act))
        layer = linear.RowParallelLinear(
            512, 64, bias=True, quant_config=config, prefix="down_proj", params_dtype=torch.float32
        )
        load(layer, {**our_tensors(down), "bias": bias[:64]})
        partial += output(layer, hidden[-1])
    close(torch.cat(hidden, -1), act @ dense(up).T + bias)
    close(partial, torch.cat(hidden, -1) @ dense(down).T + bias[:64])


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_merged_and_qkv_layers_compute_their_slices(world: World, tp: int):
    world.size = tp
    weights = {"q_proj": weight(1024), "k_proj": weight(256), "v_proj": weight(256)}
    weights |= {"gate_proj": weight(512), "up_proj": weight(512)}
    config, act = our_config(weights), torch.randn(2, K)
    qkv, gate_up = [], []
    for world.rank in range(tp):
        layer = linear.QKVParallelLinear(
            K, 128, 8, 2, bias=False, quant_config=config, prefix="qkv_proj", params_dtype=torch.float32
        )
        for shard in "qkv":
            load(layer, our_tensors(weights[f"{shard}_proj"]), shard)
        qkv.append(output(layer, act))
        layer = linear.MergedColumnParallelLinear(
            K, [512, 512], bias=False, quant_config=config, prefix="gate_up_proj", params_dtype=torch.float32
        )
        for shard, name in enumerate(("gate_proj", "up_proj")):
            load(layer, our_tensors(weights[name]), shard)
        gate_up.append(output(layer, act))
        assert len(layer.products) == 1
    heads = 8 // tp
    for rank in range(tp):
        q, k, v = qkv[rank].split([128 * heads, 128 * max(2 // tp, 1), 128 * max(2 // tp, 1)], -1)
        first = rank * 2 // tp * 128
        close(q, act @ dense(weights["q_proj"])[128 * heads * rank :][: 128 * heads].T)
        close(k, act @ dense(weights["k_proj"])[first : first + k.shape[-1]].T)
        close(v, act @ dense(weights["v_proj"])[first : first + v.shape[-1]].T)
        gate, up = gate_up[rank].chunk(2, -1)
        close(gate, act @ dense(weights["gate_proj"]).chunk(tp)[rank].T)
        close(up, act @ dense(weights["up_proj"]).chunk(tp)[rank].T)


def test_parts_of_other_kinds_groups_and_sizes_keep_their_own(world: World):
    weights = {"k_proj": weight(96, group_size=-1), "v_proj": weight(96, sparse=False)}
    plain, act, bias = torch.randn(96, K), torch.randn(2, 1, K), torch.randn(288)
    layer = linear.QKVParallelLinear(
        K, 96, 1, 1, bias=True, quant_config=our_config(weights), prefix="qkv_proj", params_dtype=torch.float32
    )
    load(layer, {"weight": plain}, "q")
    load(layer, our_tensors(weights["k_proj"]), "k")
    load(layer, our_tensors(weights["v_proj"]), "v")
    for index, shard in enumerate("qkv"):
        load(layer, {"bias": bias[96 * index : 96 * (index + 1)]}, shard)
    expected = torch.cat([plain, dense(weights["k_proj"]), dense(weights["v_proj"])])
    close(output(layer, act), act @ expected.T + bias)
    assert [product.kind for product in layer.products] == ["weight", "w4a16_sp24", "w4a16_dense"]


def test_parts_that_end_within_a_tile_are_computed_apart():
    weights = {"gate_proj": weight(96), "up_proj": weight(96)}
    layer = linear.MergedColumnParallelLinear(
        K, [96, 96], bias=False, quant_config=our_config(weights), prefix="gate_up_proj", params_dtype=torch.float32
    )
    for shard, one in enumerate(weights.values()):
        load(layer, our_tensors(one), shard)
    act = torch.randn(2, K)
    close(output(layer, act), act @ torch.cat([dense(one) for one in weights.values()]).T)
    assert len(layer.products) == 2


@pytest.mark.parametrize("tp", [1, 2])
def test_layers_merged_in_the_checkpoint_are_split_on_loading(world: World, tp: int):
    world.size = tp
    whole, act = weight(512), torch.randn(2, K)
    qkv = weight(384)
    config = our_config({"gate_up_proj": whole, "qkv_proj": qkv})
    for world.rank in range(tp):
        layer = linear.MergedColumnParallelLinear(
            K, [256, 256], bias=False, quant_config=config, prefix="gate_up_proj", params_dtype=torch.float32
        )
        load(layer, our_tensors(whole))
        rows = torch.cat([half.chunk(tp)[world.rank] for half in dense(whole).chunk(2)])
        close(output(layer, act), act @ rows.T)
        layer = linear.QKVParallelLinear(
            K, 64, 2, 2, bias=False, quant_config=config, prefix="qkv_proj", params_dtype=torch.float32
        )
        load(layer, our_tensors(qkv))
        rows = torch.cat([third.chunk(tp)[world.rank] for third in dense(qkv).chunk(3)])
        close(output(layer, act), act @ rows.T)


def test_replicated_layers_and_the_head_load_whole_or_by_rows(world: World):
    world.size = 2
    one, head = weight(96), weight(200)
    config, act = our_config({"kv_a": one, "lm_head": head}), torch.randn(2, K)
    logits = []
    for world.rank in range(2):
        layer = linear.ReplicatedLinear(
            K, 96, bias=False, quant_config=config, prefix="kv_a", params_dtype=torch.float32
        )
        load(layer, our_tensors(one))
        close(output(layer, act), act @ dense(one).T)
        layer = vocab_parallel_embedding.ParallelLMHead(
            200, K, quant_config=config, prefix="lm_head", params_dtype=torch.float32
        )
        load(layer, our_tensors(head))
        layer.quant_method.process_weights_after_loading(layer)
        logits.append(layer.quant_method.apply(layer, act))
    close(torch.cat(logits, -1)[:, :200], act @ dense(head).T)
    assert float(torch.cat(logits, -1)[:, 200:].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("n", "k", "tp", "text"),
    [
        (192, K, 2, "layer up_proj: codes can be cut at multiples of 64; got 96."),
        (72, K, 2, "layer up_proj: the output size of a rank must be a multiple of 8; got 36."),
        (64, 2 * K, 1, "layer up_proj: the input size must be that of config.json, 512; got 256."),
    ],
)
def test_extents_that_do_not_fit_are_refused(world: World, n: int, k: int, tp: int, text: str):
    world.size = tp
    config = SparseMarlinConfig({"up_proj": LayerSpec("w4a16_sp24", 64, n, k)})
    with pytest.raises(ValueError) as caught:
        linear.ColumnParallelLinear(K, n, bias=False, quant_config=config, prefix="up_proj")
    assert str(caught.value).startswith(text)


def test_tensors_of_another_shape_or_dtype_are_refused():
    one = weight(128)
    layer = linear.ColumnParallelLinear(
        K, 128, bias=False, quant_config=our_config({"up_proj": one}), prefix="up_proj", params_dtype=torch.float32
    )
    tensors = our_tensors(one)
    with pytest.raises(CheckpointError) as caught:
        load(layer, {"codes": tensors["codes"][:1]})
    assert str(caught.value) == (
        "layer up_proj: codes must have shape (2, 4, 256), as config.json says; got (1, 4, 256). Copy the files again."
    )
    with pytest.raises(CheckpointError, match=r"codes must be torch\.int32; got torch\.float32"):
        load(layer, {"codes": tensors["codes"].float()})


def test_batch_invariant_mode_of_vllm_switches_ours_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settings, "_batch_invariant", False)
    register()
    assert not settings.batch_invariant()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    register()
    assert settings.batch_invariant()
    config, dtype = our_config({"o": weight(64)}), torch.float16
    layer = linear.RowParallelLinear(K, 64, bias=False, params_dtype=dtype, quant_config=config, prefix="o")
    load(layer, our_tensors(weight(64)))
    layer.quant_method.process_weights_after_loading(layer)
    act = torch.randn(3, K, dtype=dtype)
    together = layer.quant_method.apply(layer, act)
    assert torch.equal(together[1:2], layer.quant_method.apply(layer, act[1:2]))


def test_dummy_weights_are_legal():
    layer = linear.RowParallelLinear(K, 64, bias=False, quant_config=our_config({"o": weight(64)}), prefix="o")
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.products[0].kind == "w4a16_sp24"


@pytest.mark.parametrize("flavour", ["marlin-24", "gptq-marlin-24"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_published_sparse_checkpoints_compute_their_slices(world: World, flavour: str, tp: int):
    world.size = tp
    described = {**(CT if flavour == "marlin-24" else GPTQ)}
    config = SparseMarlinConfig.from_config(described)
    config.packed_modules_mapping = MERGED
    config.ignore = [name for name in config.ignore if "down" not in name]
    packer = PACKERS[flavour][1]
    parts = [random_weight(256, 1024, 128, True) for _ in range(2)]
    down, act = random_weight(64, 1024, 128, True), torch.randn(2, 1024).half()
    partial = torch.zeros(2, 64)
    for world.rank in range(tp):
        layer = linear.MergedColumnParallelLinear(
            1024, [256, 256], bias=False, quant_config=config, prefix="m.gate_up_proj", params_dtype=torch.float16
        )
        for shard, part in enumerate(parts):
            load(layer, packer(part), shard)
        rows = torch.cat([dense(part).chunk(tp)[world.rank] for part in parts])
        torch.testing.assert_close(output(layer, act).float(), act.float() @ rows.T, rtol=2e-3, atol=2e-3)
        layer = linear.RowParallelLinear(
            1024, 64, bias=False, quant_config=config, prefix="m.down_proj", params_dtype=torch.float16
        )
        load(layer, packer(down))
        partial += output(layer, act.chunk(tp, -1)[world.rank]).float()
    torch.testing.assert_close(partial, act.float() @ dense(down).T, rtol=4e-3, atol=4e-3)


def test_published_exceptions_stay_unquantized():
    config = SparseMarlinConfig.from_config(CT)
    config.packed_modules_mapping = MERGED
    for name, quantized in (("m.down_proj", False), ("m.o_proj", True), ("lm_head", False)):
        layer = linear.ReplicatedLinear(K, 64, bias=False, quant_config=config, prefix=name)
        assert isinstance(layer.quant_method, SparseMarlinLinearMethod) is quantized, name


def test_scratch_memory_of_gptq_checkpoints_is_not_loaded():
    names = ["model.layers.0.mlp.up_proj.workspace", "model.layers.0.mlp.up_proj.B_24"]
    assert SparseMarlinConfig.get_cache_scale_mapper().apply_list(names) == names[1:]


class Other(kernels.MPLinearKernel):
    """Stands for the kernel that vLLM would choose."""

    get_min_capability = classmethod(lambda cls: 0)
    can_implement = classmethod(lambda cls, c: (True, None))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.shape = tuple(getattr(layer, self.w_q_name).shape)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.full((*x.shape[:-1], 1), 7.0)


def mixed_precision_layer(one: Weight, transposed: bool) -> tuple[nn.Module, SparseMarlinLinearKernel]:
    """A layer as compressed-tensors (or, transposed, GPTQ) leaves it after loading, and the kernel for it."""
    tensors = pack_pack_quantized(one)
    words, scales = tensors["weight_packed"], tensors["weight_scale"].half()
    dims = {"output_dim": int(transposed), "input_dim": int(not transposed), "weight_loader": lambda *_: None}
    flip = (lambda t: t.t().contiguous()) if transposed else (lambda t: t)
    layer = nn.Module()
    layer.weight_packed = PackedvLLMParameter(data=flip(words), packed_dim=int(not transposed), packed_factor=8, **dims)
    layer.weight_scale = GroupQuantScaleParameter(data=flip(scales), **dims)
    fields = {"has_g_idx": False} if "has_g_idx" in kernels.MPLinearLayerConfig.__dataclass_fields__ else {}
    config = kernels.MPLinearLayerConfig(
        full_weight_shape=(one.k, one.n),
        partition_weight_shape=(one.k, one.n),
        weight_type=scalar_types.uint4b8,
        act_type=torch.float16,
        group_size=one.group_size,
        zero_points=False,
        **fields,
    )
    assert SparseMarlinLinearKernel.can_implement(config) == (True, None)
    return layer, SparseMarlinLinearKernel(config, "weight_packed", "weight_scale")


@pytest.fixture
def only_other(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = kernels.current_platform._enum
    monkeypatch.setitem(kernels._POSSIBLE_KERNELS, platform, [SparseMarlinLinearKernel, Other])


@pytest.mark.parametrize("transposed", [False, True], ids=["compressed-tensors", "gptq"])
@pytest.mark.parametrize("group_size", [64, -1])
def test_kernel_takes_over_what_is_sparse(only_other: None, transposed: bool, group_size: int):
    one = random_weight(128, K, group_size, True)
    layer, kernel = mixed_precision_layer(one, transposed)
    kernel.process_weights_after_loading(layer)
    act, bias = torch.randn(2, 3, K).half(), torch.randn(128).half()
    got = kernel.apply_weights(layer, act, bias)
    torch.testing.assert_close(got.float(), act.float() @ dense(one).T + bias.float(), rtol=2e-3, atol=2e-3)
    assert isinstance(one, CompressedWeight) and kernel.packed == ("w4a16_sp24", 128, group_size)


@pytest.mark.parametrize("transposed", [False, True], ids=["compressed-tensors", "gptq"])
def test_kernel_hands_on_what_is_dense(only_other: None, transposed: bool, monkeypatch: pytest.MonkeyPatch):
    one = random_weight(128, K, 64, False)
    layer, kernel = mixed_precision_layer(one, transposed)
    before = layer.weight_packed.data.clone()
    kernel.process_weights_after_loading(layer)
    assert isinstance(kernel.delegate, Other) and torch.equal(layer.weight_packed.data, before)
    assert float(kernel.apply_weights(layer, torch.ones(1, K))) == 7.0
    monkeypatch.setenv("MARLIN_VLLM_DENSE", "1")
    layer, kernel = mixed_precision_layer(one, transposed)
    kernel.process_weights_after_loading(layer)
    act = torch.randn(2, K).half()
    torch.testing.assert_close(
        kernel.apply_weights(layer, act).float(), act.float() @ dense(one).T, rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"zero_points": True}, "weights must be symmetric INT4"),
        ({"weight_type": scalar_types.uint8b128}, "weights must be symmetric INT4"),
        ({"act_type": torch.float32}, "activations must be fp16 or bf16"),
        ({"group_size": 256, "full_weight_shape": (512, 64)}, "group_size must be one of (32, 64, 128, -1), got 256"),
        ({"partition_weight_shape": (96, 64)}, "K=96 must be a multiple of group_size=64"),
        ({"partition_weight_shape": (128, 60)}, "N=60 and K=128 must be multiples of 8 and 32"),
    ],
)
def test_kernel_declines_what_it_cannot_do(change: dict[str, Any], why: str):
    _, kernel = mixed_precision_layer(random_weight(64, K, 64, True), False)
    config = kernel.config
    for name, value in change.items():
        setattr(config, name, value)
    assert SparseMarlinLinearKernel.can_implement(config) == (False, f"SparseMarlin: {why}")


def test_plain_description_of_pack_quantized_is_not_ours():
    described = describe_pack_quantized({"model.a": 64}, ["lm_head"])
    assert SparseMarlinConfig.override_quantization_method(described, None) is None
