"""`marlin convert` and `marlin.convert`: published directories in, ours out, and the way to pack-quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_published_packers import PACKERS, SPARSE_ONLY, pack_bitmask, random_weight
from typer.testing import CliRunner

from marlin.cli import app
from marlin.convert import Conversion, convert, save_pack_quantized
from marlin.errors import CheckpointError
from marlin.formats import Weight, checkpoint, top2_mask
from marlin.formats.published import open_published

transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).view(2, 12) * 7 % 96
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
LIMITS = {"num_hidden_layers": 2, "vocab_size": 96, "max_position_embeddings": 64}
PLAIN = "model.layers.0.self_attn.q_proj"  # stays as it is

DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "marlin-24": {
        "quant_method": "compressed-tensors",
        "format": "marlin-24",
        "sparsity_config": {"format": "dense", "targets": ["Linear"]},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}},
    },
    "gptq-marlin-24": {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "marlin_24"},
    "marlin": {"quant_method": "gptq", "bits": 4, "group_size": 64, "is_marlin_format": True},
    "pack-quantized": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}},
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
}


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, **LIMITS, attention_bias=True, tie_word_embeddings=True)
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # Why: biases and norms must not stay at their neutral values.
    return model


def random_weights(model: Any, sparse_only: bool) -> dict[str, Weight]:
    """2:4 weights for all decoder linears but one, and a dense one where the format has them."""
    return {
        name: random_weight(linear.out_features, linear.in_features, 64, sparse_only or not name.endswith("k_proj"))
        for name, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and name not in ("lm_head", PLAIN)
    }


@torch.no_grad()
def dense_logits(model: Any, weights: Mapping[str, Weight]) -> torch.Tensor:
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight.to_dense(torch.float32))
    return model(IDS).logits


@torch.no_grad()
def logits_of(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert set(checkpoint.open_directory(directory).layers) == {
        name for name, module in model.named_modules() if type(module).__name__ == "SparseLinear"
    }
    return model(IDS).logits


def write_published(folder: Path, model: Any, tensors: Mapping[str, torch.Tensor], quantization: Any) -> Path:
    """The model's directory with these tensors in the place of their layers' weights, in two shards."""
    model.save_pretrained(folder)
    layers = {name.rpartition(".")[0] for name in tensors}
    kept = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in kept.items() if name.removesuffix(".weight") not in layers}
    everything = {**kept, **tensors}
    # Why: in a real index, the tensors of a layer may well lie in two shards.
    files = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(sorted(everything))}
    for file in set(files.values()):
        save_file({name: everything[name].contiguous() for name in everything if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_other.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def write_with(name: str, folder: Path) -> tuple[Path, dict[str, Weight], torch.Tensor]:
    model = tiny_llama()
    weights = random_weights(model, name in SPARSE_ONLY)
    pack = PACKERS[name][1]
    tensors = {f"{layer}.{leaf}": t for layer, weight in weights.items() for leaf, t in pack(weight).items()}
    logits = dense_logits(model, weights)
    return write_published(folder, model, tensors, DESCRIPTIONS[name]), weights, logits


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", PACKERS)
def test_convert_gives_the_model_of_the_published_directory(name: str, tmp_path: Path):
    source, weights, expected = write_with(name, tmp_path / "in")
    before = files_of(source)
    calls: list[tuple[int, int]] = []
    done = convert(source, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert files_of(source) == before
    assert calls == [(index, 13) for index in range(14)]
    assert isinstance(done, Conversion) and done.target_format == "marlin"
    assert {row.name: row.kind for row in done.layers} == {layer: weight.kind for layer, weight in weights.items()}

    ours = checkpoint.open_directory(tmp_path / "out").check_all_values()
    for row in done.layers:
        spec = ours.layers[row.name]
        assert (spec.kind, spec.group_size, spec.n, spec.k) == (row.kind, 64, row.n, row.k)
        assert sum(ours.tensors[f"{row.name}.{leaf}"].nbytes for leaf in spec.tensor_shapes()) == row.bytes_after
    assert sum(entry.nbytes for entry in ours.tensors.values()) == done.other_bytes + sum(
        row.bytes_after for row in done.layers
    )
    assert set(files_of(tmp_path / "out")) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    # Kernels of the Marlin orders ran in float16 only; the other formats leave the choice to the model.
    assert ours.config["dtype"] == ("float16" if "marlin" in name else "bfloat16")
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_convert_to_pack_quantized_and_back_keeps_every_bit(tmp_path: Path):
    source, weights, _ = write_with("pack-quantized", tmp_path / "in")
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "plain", to="pack-quantized")
    plain = open_published(tmp_path / "plain")
    for layer, weight in weights.items():
        read = plain.read(layer)
        assert read.kind == weight.kind
        assert torch.equal(read.dense_codes(), weight.dense_codes()) and torch.equal(read.scales, weight.scales)
    described = plain.config["quantization_config"]
    assert described["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert described["ignore"] == ["lm_head", "model.embed_tokens", PLAIN]
    # The other tensors, biases included, are those of the input.
    kept = {name for name in plain.tensors if name.rpartition(".")[0] not in weights or name.endswith(".bias")}
    original = open_published(source)
    assert kept == {n for n in original.tensors if n.rpartition(".")[0] not in weights or n.endswith(".bias")} and any(
        name.endswith(".bias") for name in kept
    )
    for name in kept:
        assert torch.equal(plain.read_tensor(name), original.read_tensor(name)), name
    convert(tmp_path / "plain", tmp_path / "again")
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        left, right = load_file(tmp_path / "ours" / file), load_file(tmp_path / "again" / file)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _mixed_model() -> tuple[Any, dict[str, Weight]]:
    from marlin import nn

    model = tiny_llama()
    weights = {
        name: random_weight(weight.n, weight.k, 32 if name.endswith("down_proj") else -1, weight.kind == "w4a16_sp24")
        for name, weight in random_weights(model, False).items()
    }
    nn.replace_linears(model, weights)
    return model, weights


def test_save_pack_quantized_lists_layers_of_several_group_sizes(tmp_path: Path):
    model, weights = _mixed_model()
    done = save_pack_quantized(model, tmp_path / "plain")
    assert done.source_format == "marlin" and len(done.layers) == len(weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]
    assert not (tmp_path / "plain" / "README.md").exists()
    plain = open_published(tmp_path / "plain")
    groups = plain.config["quantization_config"]["config_groups"]
    assert [group["weights"]["strategy"] for group in groups.values()] == ["group", "channel"]
    assert sorted(target for group in groups.values() for target in group["targets"]) == sorted(weights)
    for layer, weight in weights.items():
        assert torch.equal(plain.read(layer).dense_codes(), weight.dense_codes())


def test_written_directory_loads_with_compressed_tensors(tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, which would read the directory, is absent")
    model, _ = _mixed_model()
    with torch.no_grad():
        expected = model(IDS).logits
    save_pack_quantized(model, tmp_path / "plain")
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    except ImportError as error:
        pytest.skip(f"transformers takes no compressed-tensors of this version: {error}")
    assert not any(type(module).__name__ == "SparseLinear" for module in loaded.modules())
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def _write_pruned(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    model = tiny_llama()
    tensors, dense = {}, {}
    for layer, weight in random_weights(model, True).items():
        mask = top2_mask(torch.rand(weight.n, weight.k))
        dense[layer] = (torch.randn(weight.n, weight.k) * 0.05 * mask).half()
        tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in pack_bitmask(dense[layer], mask).items()}
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "sparsity_structure": "2:4"}
    described = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity}
    return write_published(folder, model, tensors, described), dense


def test_convert_rounds_pruned_weights_only_when_asked(tmp_path: Path):
    source, dense = _write_pruned(tmp_path / "in")
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "out")
    assert "weights must be quantized; got 2:4 weights in floating point. Pass --quantize" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    convert(source, tmp_path / "out", quantize_to=64)
    ours = checkpoint.open_directory(tmp_path / "out")
    for layer, weight in dense.items():
        from marlin.formats.layouts import unpack

        rounded = unpack(ours.packed(layer))
        assert (rounded.kind, rounded.group_size) == ("w4a16_sp24", 64)
        assert bool((rounded.to_dense()[weight == 0] == 0).all())
        error_norm = (rounded.to_dense(torch.float32) - weight.float()).norm() / weight.float().norm()
        assert 0.02 < float(error_norm) < 0.15


def test_convert_refuses_what_it_would_have_to_guess(tmp_path: Path):
    source, _, _ = write_with("awq", tmp_path / "in")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"only 2:4 weights in floating point .* can be quantized here; got awq\."):
        convert(source, out, quantize_to=64)
    with pytest.raises(ValueError, match="convert: to must be one of marlin, pack-quantized; got 'gguf'"):
        convert(source, out, to="gguf")
    with pytest.raises(ValueError, match="the output must not replace the input"):
        convert(source, source, overwrite=True)
    with pytest.raises(ValueError, match="the output must not replace the input"):
        convert(source, tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="the input must be a directory; got no such directory"):
        convert(tmp_path / "nowhere", out)
    convert(source, out)
    with pytest.raises(ValueError, match=r"must be in another format; got marlin\. Convert it .* --to pack-quantized"):
        convert(out, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_convert_leaves_nothing_when_a_layer_fails(tmp_path: Path):
    source, weights, _ = write_with("gptq", tmp_path / "in")
    last = max(weights)
    for file in sorted(source.glob("part-*.safetensors")):
        tensors = load_file(file)
        if f"{last}.qzeros" in tensors:
            tensors[f"{last}.qzeros"] -= 1
            save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"gptq, layer {last}: quantization must be symmetric"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_convert_replaces_only_what_it_may(tmp_path: Path):
    source, _, _ = write_with("marlin", tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="an existing directory must be empty or a previous save"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "notes.txt").exists()
    convert(source, tmp_path / "out")  # a directory of ours


def test_command_prints_a_table_and_json(tmp_path: Path):
    source, _, _ = write_with("pack-quantized", tmp_path / "in")
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("w4a16_dense", "w4a16_sp24", "not quantized", "pack-quantized to"))
    shutil.rmtree(tmp_path / "out")
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--json"])
    report = json.loads(result.stdout)
    assert (report["source_format"], report["target_format"], len(report["layers"])) == ("pack-quantized", "marlin", 13)
    assert report["quantized_bytes_after"] < report["quantized_bytes_before"]


def test_command_shows_what_it_refuses_in_one_line(tmp_path: Path):
    source, _ = _write_pruned(tmp_path / "in")
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out")])
    assert result.exit_code == 2 and "Pass --quantize to round them to INT4" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "-g", "64"])
    assert result.exit_code == 2 and "--group-size needs --quantize" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--quantize", "-g", "64"])
    assert result.exit_code == 0, result.output
