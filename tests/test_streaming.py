"""Compressing out of the files: the same tensors as from memory, one block at a time, resumable, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin import api, streaming
from marlin.compress import LayerRecipe, Options, Recipe, compress_model
from marlin.errors import CheckpointError
from marlin.formats.checkpoint import open_directory
from marlin.shards import Shards
from tests.test_cli import TEXT, _tokenizer, error_of, run
from tests.test_compress_recover import stream

transformers = pytest.importorskip("transformers")

RECIPE = Recipe(
    (
        ("*.layers.0.mlp.down_proj", LayerRecipe(kind="skip")),
        ("*.v_proj", LayerRecipe(kind="w4a16_dense", group_size=32, low_rank=4)),
    ),
    LayerRecipe(group_size=32),
)
IDS = stream(192).view(6, 32) % 64
PRECISION = streaming.Precision(torch.float32, torch.float16)


@pytest.fixture(scope="module", params=["tied", "untied"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, in several files."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.1,
        attention_bias=True,
        tie_word_embeddings=request.param == "tied",
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("dense") / "model"
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(folder, max_shard_size="60KB")
    _tokenizer().save_pretrained(folder)
    return folder


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def from_memory(dense: Path, target: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    done = api.compress(model, IDS, RECIPE, options=Options(autocast="none"), dtype=torch.float16)
    api.save_pretrained(model, target, report=done, recipe=RECIPE)
    return done


def test_streamed_directory_equals_that_from_memory(dense: Path, tmp_path: Path) -> None:
    whole = from_memory(dense, tmp_path / "whole")
    options = Options(autocast="none")
    done = streaming.compress_directory(
        dense, tmp_path / "out", IDS, RECIPE, precision=PRECISION, options=options, tokenizer=_tokenizer()
    )
    first, second = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    checked = open_directory(tmp_path / "out").check_all_values()
    assert checked.layers == open_directory(tmp_path / "whole").layers
    assert not done.weights and [row.name for row in done.report] == [row.name for row in whole.report]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float16
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, reference(IDS).logits)
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text())
    assert len(report["layers"]) == 21 and (tmp_path / "out" / "README.md").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_one_block_at_a_time_has_values(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Any] = []
    made = streaming.skeleton
    monkeypatch.setattr(streaming, "skeleton", lambda *args: models.append(made(*args)) or models[-1])
    held: list[tuple[int, int]] = []
    original = streaming.Files.close

    def count() -> tuple[int, int]:
        layers = models[0].model.layers
        real = [sum(not p.is_meta for p in block.parameters()) for block in layers]
        return sum(n > 0 for n in real), sum(not p.is_meta for p in models[0].lm_head.parameters())

    def close(self: Any, name: str, block: Any, result: Any) -> None:
        held.append(count())
        original(self, name, block, result)
        held.append(count())

    monkeypatch.setattr(streaming.Files, "close", close)
    streaming.compress_directory(
        dense, tmp_path / "out", IDS, RECIPE, precision=PRECISION, options=Options(autocast="none")
    )
    assert held == [(1, 0), (0, 0)] * 3


def test_killed_stream_goes_on_with_the_same_bits(dense: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(event: Any) -> None:
        if event.stage == "block" and event.done == 2:
            raise KilledError

    def work(target: Path, **more: Any) -> None:
        options = Options(autocast="none", **more)
        streaming.compress_directory(dense, target, IDS, RECIPE, precision=PRECISION, options=options)

    work(tmp_path / "whole")
    with pytest.raises(KilledError):
        work(tmp_path / "out", resume_dir=tmp_path / "resume", progress=kill)
    assert not (tmp_path / "out").exists()
    stages: list[str] = []
    work(tmp_path / "out", resume_dir=tmp_path / "resume", progress=lambda event: stages.append(event.stage))
    assert stages == ["capture", "resumed", "resumed", "block"]
    first, second = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = {**tensors_of(dense)}
    other["model.norm.weight"] = other["model.norm.weight"] * 2
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text((dense / "config.json").read_text())
    save_file(other, changed / "model.safetensors")
    options = Options(autocast="none", resume_dir=tmp_path / "resume")
    with pytest.raises(
        CheckpointError, match=r"^resume: the folder must belong to the same run; got another model in "
    ):
        streaming.compress_directory(changed, tmp_path / "x", IDS, RECIPE, precision=PRECISION, options=options)


def test_stream_refuses_files_whose_tensors_have_other_names(dense: Path, tmp_path: Path) -> None:
    tensors = tensors_of(dense)
    tensors["model.layers.1.mlp.w1"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        streaming.compress_directory(tmp_path, tmp_path / "out", IDS, RECIPE, precision=PRECISION)
    assert str(caught.value) == (
        f"stream {tmp_path}: the files must have a tensor for each parameter and buffer; got none named "
        "'model.layers.1.mlp.up_proj.weight'. The model's class renames tensors on loading: compress it without "
        "--stream."
    )
    assert not (tmp_path / "out").exists()


def test_streaming_is_the_default_where_memory_is_short(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = streaming.model_bytes(dense)
    assert size is not None and size == sum(t.numel() * 2 for t in tensors_of(dense).values())
    for free, expected in ((2 * size + 2, False), (2 * size - 2, True), (None, False)):
        monkeypatch.setattr(streaming, "free_memory", lambda free=free: free)
        assert streaming.is_worth_it(dense) == expected
    assert not streaming.is_worth_it(dense / "nothing")


def test_free_memory_is_read_where_the_system_tells_it() -> None:
    free = streaming.free_memory()
    assert free is None or free > 2**20


def test_compress_stream_writes_what_compress_writes(dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    given = ("-c", str(text), "--samples", "4", "--length", "32", "--device", "cpu", "-g", "32")
    for name, more in (("whole", "--no-stream"), ("out", "--stream")):
        result = run("compress", str(dense), str(tmp_path / name), *given, more)
        assert result.exit_code == 0, result.output
    first, second = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    found = error_of("compress", str(dense), str(tmp_path / "x"), *given, "--stream", "--recover", "1")
    assert found == (
        "error: compress: --stream holds one block at a time; got --stream with --recover or --recipe auto. "
        "Leave one of them out."
    )


def test_compress_model_with_a_keeper_returns_the_report_alone(dense: Path, tmp_path: Path) -> None:
    shards = Shards.open(dense)
    model = streaming.skeleton(dense, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    shards.fill(model.model, "model", torch.float32, without=("model.layers",))
    files = streaming.Files(shards, tmp_path, torch.float32, torch.float16, 4)
    done = compress_model(model, IDS, RECIPE, options=Options(autocast="none"), keeper=files)
    assert not done.weights and not done.low_rank and len(files.specs) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3)
    ]
