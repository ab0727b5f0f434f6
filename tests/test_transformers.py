"""transformers loads, runs, saves and dequantizes compressed models through the registered quantizer."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from marlin import nn  # noqa: E402
from marlin.errors import CheckpointError  # noqa: E402
from marlin.formats import CompressedWeight, DenseInt4Weight, top2_mask  # noqa: E402
from marlin.integrations.transformers import register_lazily  # noqa: E402
from marlin.integrations.transformers.quantizer import (  # noqa: E402
    SparseMarlinConfig,
    SparseMarlinQuantizer,
    attach,
    describe_model,
)

IDS = torch.arange(24).view(2, 12) * 7 % 96
OLD = int(transformers.__version__.split(".")[0]) < 5
LAYER = "model.layers.1.mlp.up_proj"


def random_weight(linear: torch.nn.Linear, kind: str, group_size: int) -> CompressedWeight | DenseInt4Weight:
    n, k = linear.out_features, linear.in_features
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scales = torch.rand(n, 1 if group_size == -1 else k // group_size).add(0.5).mul(0.02)
    if kind == "w4a16_dense":
        return DenseInt4Weight(codes, scales, group_size)
    return CompressedWeight.from_codes(codes, top2_mask(torch.rand(n, k)), scales, group_size)


def tiny_model(tie: bool = False, dtype: torch.dtype = torch.float32, head: bool = False) -> Any:
    """Two blocks, 2:4 everywhere but for one dense INT4 layer and one that stays; biases in the attention."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    limits = {"num_hidden_layers": 2, "vocab_size": 96, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **limits, tie_word_embeddings=tie, attention_bias=True)
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # Why: biases and norms must not stay at their neutral values.
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("0.mlp.gate_proj"):
            kind = "w4a16_dense" if name.endswith("k_proj") else "w4a16_sp24"
            if head or name != "lm_head":
                weights[name] = random_weight(module, kind, -1 if name.endswith("down_proj") else 32)
    nn.replace_linears(model, weights)
    attach(model)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def assert_same_state(a: Any, b: Any) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = tiny_model(tie=request.param)
    directory = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(directory)
    return model, directory


@pytest.mark.parametrize(
    "options",
    [{}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}],
    ids=["plain", "map", "auto", "cpu", "low-memory"],
)
def test_load_gives_the_logits_of_the_saved_model(saved: tuple[Any, Path], options: dict[str, Any]) -> None:
    model, directory = saved
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert_same_state(model, loaded)
    assert torch.equal(logits(loaded), logits(model))
    assert describe_model(loaded) == describe_model(model)
    assert isinstance(loaded.hf_quantizer, SparseMarlinQuantizer) and loaded.is_quantized


def test_load_allocates_no_dense_weight(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear of the description is replaced while the model is on the meta device."""
    seen: list[tuple[str, str]] = []
    before = SparseMarlinQuantizer._process_model_before_weight_loading

    def spy(self: Any, model: Any, **kwargs: Any) -> None:
        seen.extend((f"{n} before", p.device.type) for n, p in model.named_parameters())
        before(self, model, **kwargs)
        seen.extend((f"{n} after", t.device.type) for n, t in model.state_dict().items())

    monkeypatch.setattr(SparseMarlinQuantizer, "_process_model_before_weight_loading", spy)
    loaded = AutoModelForCausalLM.from_pretrained(saved[1])
    assert len(seen) > 40 and {device for _, device in seen} == {"meta"}
    dense = [name for name, module in loaded.named_modules() if isinstance(module, torch.nn.Linear)]
    assert dense == ["model.layers.0.mlp.gate_proj", "lm_head"]
    assert len(list(nn.sparse_linears(loaded))) == 13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_load_casts_scales_and_never_codes(saved: tuple[Any, Path], dtype: torch.dtype) -> None:
    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    want = dict(nn.sparse_linears(model))
    for name, layer in nn.sparse_linears(loaded):
        assert torch.equal(layer.codes, want[name].codes) and layer.codes.dtype == torch.int32
        assert torch.equal(layer.scales, want[name].scales.to(dtype)) and layer.scales.dtype == dtype
        if layer.meta is not None:
            assert torch.equal(layer.meta, want[name].meta)
        if layer.bias is not None:
            assert layer.bias.dtype == dtype
    cast = copy.deepcopy(model)
    torch.nn.Module.to(cast, dtype)
    # Why not equal: rotary tables are rounded on cast but not on load.
    assert torch.allclose(logits(loaded).float(), logits(cast).float(), atol=0.15, rtol=0.05)


def test_shards_load_as_one_file(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = saved
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path / "sharded"))


def test_save_of_a_loaded_model_writes_the_same_files(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, directory = saved
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    configs = [json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["quantization_config"]["layers"][LAYER] == {
        "kind": "w4a16_sp24",
        "group_size": 32,
        "shape": [160, 64],
    }


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_compressed_head_round_trips_and_is_untied(tie: bool, tmp_path: Path) -> None:
    model = tiny_model(tie=tie, head=True)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(loaded.lm_head, nn.SparseLinear) and loaded.config.tie_word_embeddings is False
    assert torch.equal(logits(loaded), logits(model))


def test_base_model_loads_without_its_head(saved: tuple[Any, Path]) -> None:
    model, directory = saved
    base = AutoModel.from_pretrained(directory)
    assert len(list(nn.sparse_linears(base))) == 13
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.skipif(OLD, reason="transformers 4 cannot put buffers on disk")
def test_layers_offloaded_to_disk_give_the_same_logits(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, directory = saved
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(directory, device_map=places, offload_folder=tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_generate_matches_the_saved_model(saved: tuple[Any, Path]) -> None:
    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))


def test_dequantize_gives_linears_with_the_same_logits(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, directory = saved
    dense = AutoModelForCausalLM.from_pretrained(directory)
    dense.dequantize()
    assert not list(nn.sparse_linears(dense)) and not hasattr(dense.config, "quantization_config")
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_compiled_model_has_no_graph_break(saved: tuple[Any, Path]) -> None:
    model, _ = saved
    layer = model.model.layers[1].mlp
    act = torch.randn(3, 64)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(act), layer(act))
    assert model.hf_quantizer.is_compileable


def test_quantization_config_survives_pickle_and_copy(saved: tuple[Any, Path]) -> None:
    config = saved[0].config.quantization_config
    for twin in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        SparseMarlinConfig.from_dict(config.to_dict()),
    ):
        assert isinstance(twin, SparseMarlinConfig) and twin.to_dict() == config.to_dict()


def test_dense_model_cannot_be_quantized_on_load(tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sparse_marlin does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SparseMarlinConfig())


# Tampering


@pytest.fixture
def own(saved: tuple[Any, Path], tmp_path: Path) -> Path:
    saved[0].save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def edit(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refusal(directory: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(directory, **options)
    return str(caught.value)


def edit_config(directory: Path, change: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_load_refuses_illegal_metadata(own: Path) -> None:
    edit(own, lambda tensors: tensors[f"{LAYER}.meta"].__setitem__((0, 0, 9), 0x44444440))
    assert refusal(own) == (
        f"{own}, layer {LAYER}: every metadata nibble must hold two rising positions (i0 | i1 << 2 with i0 < i1); "
        "got an illegal nibble in meta. Scales beyond float16 need dtype=torch.bfloat16; "
        "otherwise copy or download the files again."
    )


def test_load_refuses_scales_that_are_not_finite(own: Path) -> None:
    edit(own, lambda tensors: tensors[f"{LAYER}.scales"].__setitem__((0, 0, 9), float("nan")))
    assert f"{own}, layer {LAYER}: scales must be finite; got NaN or infinity in torch.float32." in refusal(own)


def test_load_refuses_scales_that_the_dtype_cannot_hold(own: Path) -> None:
    edit(own, lambda tensors: tensors[f"{LAYER}.scales"].__setitem__((0, 0, 9), 1e6))
    assert AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16) is not None
    assert refusal(own, dtype=torch.float16) == (
        f"{own}, layer {LAYER}: scales must be finite; got NaN or infinity in torch.float16. "
        "Scales beyond float16 need dtype=torch.bfloat16; otherwise copy or download the files again."
    )


def test_load_refuses_a_missing_tensor(own: Path) -> None:
    edit(own, lambda tensors: tensors.pop(f"{LAYER}.scales"))
    assert refusal(own) == (
        f"{own}: w4a16_sp24 layer {LAYER} must have a tensor '{LAYER}.scales'; got none. "
        "Copy or download all of the files again."
    )


def test_load_refuses_a_wrong_dtype(own: Path) -> None:
    edit(own, lambda tensors: tensors.update({f"{LAYER}.codes": tensors[f"{LAYER}.codes"].float()}))
    need = f"{own / 'model.safetensors'}, tensor '{LAYER}.codes': dtype must be I32; got F32."
    assert refusal(own).startswith(need)


@pytest.mark.skipif(OLD, reason="transformers 4 opens the file before the quantizer can look at it")
def test_load_refuses_a_truncated_file(own: Path) -> None:
    file = own / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert refusal(own).endswith("The file is truncated or altered: copy or download it again.")


def test_load_refuses_an_index_that_points_outside(saved: tuple[Any, Path], tmp_path: Path) -> None:
    own = tmp_path / "own"
    saved[0].save_pretrained(own, max_shard_size="20KB")
    path = own / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = index["weight_map"][f"{LAYER}.codes"]
    (own / name).rename(tmp_path / name)
    index["weight_map"] = {key: f"../{file}" if file == name else file for key, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    fix = "Do not load it: a checkpoint has no reason to read other files."
    text = refusal(own)
    assert f": files must lie in {own}; got ../{name}. {fix}" in text


def test_load_refuses_an_unknown_version(own: Path) -> None:
    edit_config(own, lambda config: config["quantization_config"].update(version=9))
    assert refusal(own) == (
        "config.json, quantization_config: version must be 1; got 9. Update sparse-marlin to read newer versions."
    )


def test_load_refuses_a_layer_that_the_model_lacks(own: Path) -> None:
    edit_config(own, lambda config: config.update(num_hidden_layers=1))
    assert refusal(own) == (
        f"load {own}: quantized layer model.layers.1.mlp.down_proj must be a torch.nn.Linear of the model; "
        "got no such module. config.json describes another model, or another class of it: "
        "load it as the class it was saved from."
    )


def test_load_refuses_a_shape_that_is_not_the_models(own: Path) -> None:
    edit_config(own, lambda config: config.update(intermediate_size=192))
    text = refusal(own)
    assert "must have shape [64, 192], that of the model; got [64, 160] in quantization_config." in text


def test_load_refuses_a_dtype_without_kernels(saved: tuple[Any, Path]) -> None:
    with pytest.raises(ValueError) as caught:
        AutoModelForCausalLM.from_pretrained(saved[1], dtype=torch.float64)
    assert str(caught.value) == (
        f"load {saved[1]}: dtype must be float16, bfloat16 or float32; got torch.float64. Pass another dtype."
    )


# Registration


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('sparse_marlin' in m)"


def test_import_of_marlin_registers_once_transformers_is_imported() -> None:
    names = "'transformers', 'accelerate', 'marlin.integrations.transformers.quantizer'"
    alone = f"import sys, marlin; print([n for n in ({names}) if n in sys.modules])"
    assert run(f"{alone}; import transformers; {REGISTERED}").split("\n") == ["[]", "True"]


def test_import_of_marlin_registers_after_transformers() -> None:
    assert run(f"from transformers import AutoModelForCausalLM; import marlin; {REGISTERED}") == "True"


def test_registration_twice_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    finders = len(sys.meta_path)
    register_lazily()
    register_lazily()
    assert len(sys.meta_path) == finders
    assert AUTO_QUANTIZER_MAPPING["sparse_marlin"] is SparseMarlinQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["sparse_marlin"] is SparseMarlinConfig


def test_failed_registration_warns_and_leaves_transformers_usable(tmp_path: Path) -> None:
    """A package `transformers` whose registry has other names stands for an unknown version."""
    (tmp_path / "transformers" / "quantizers").mkdir(parents=True)
    for name in ("__init__.py", "quantizers/__init__.py"):
        (tmp_path / "transformers" / name).write_text("")
    (tmp_path / "transformers" / "quantizers" / "auto.py").write_text("usable = True")
    code = (
        f"import sys, warnings; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import marlin\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    from transformers.quantizers.auto import usable\n"
        "print(usable, [str(w.message) for w in seen if w.category is RuntimeWarning])"
    )
    text = run(code)
    assert text.startswith('True ["marlin: the quantizer could not be registered with transformers (ImportError: ')
    assert text.endswith('compressed models will not load. Install a tested version of transformers."]')
