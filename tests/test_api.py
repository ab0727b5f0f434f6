"""compress, save_pretrained and load: one way from a dense model to a directory and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from marlin import api, nn  # noqa: E402
from marlin.compress import LayerRecipe, Options, Recipe  # noqa: E402
from marlin.errors import CheckpointError  # noqa: E402
from marlin.formats.checkpoint import open_directory  # noqa: E402

IDS = torch.arange(24).view(2, 12) * 5 % 64
RECIPE = Recipe(
    rules=(("*.down_proj", LayerRecipe("w4a16_dense", 32)), ("*.0.self_attn.o_proj", LayerRecipe("skip"))),
    default=LayerRecipe(group_size=64),
)


class Words:
    """A tokenizer of the least kind: one id per character."""

    def __init__(self, bos_token_id: int | None = None) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        begin = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return {"input_ids": begin + [ord(c) % 64 for c in text]}

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.json").write_text("{}")


def tiny_model() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64, max_position_embeddings=64)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def compressed() -> tuple[Any, Any]:
    model = tiny_model()
    return model, api.compress(model, torch.randint(0, 64, (4, 32)), RECIPE)


def test_compress_replaces_what_the_recipe_names(compressed: tuple[Any, Any]) -> None:
    model, result = compressed
    layers = dict(nn.sparse_linears(model))
    assert layers.keys() == result.weights.keys() and len(layers) == 13
    assert {layer.kind for name, layer in layers.items() if "down_proj" in name} == {"w4a16_dense"}
    dense = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert dense == ["model.layers.0.self_attn.o_proj", "lm_head"]
    for name, layer in layers.items():
        assert torch.equal(layer.to_weight().to_dense(), result.weights[name].to_dense(torch.float32))


def test_compress_casts_the_model_to_dtype() -> None:
    model = tiny_model()
    api.compress(model, torch.randint(0, 64, (4, 32)), "sp24-int4-magnitude", dtype=torch.bfloat16)
    floating = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    assert floating == {torch.bfloat16} and model.dtype == torch.bfloat16


def test_compress_takes_text_with_a_tokenizer() -> None:
    text = ["The quick brown fox jumps over the lazy dog. " * 8, "Pack my box with five dozen liquor jugs. " * 8]
    options = Options(seed=5)
    a, b = tiny_model(), tiny_model()
    api.compress(a, text, RECIPE, tokenizer=Words(), samples=4, length=32, options=options)
    stream = api.tokenize(text, Words())
    assert stream.tolist() == [ord(c) % 64 for c in "".join(text)]
    api.compress(b, api.calibration_windows(stream, 4, 32, 5), RECIPE, options=options)
    assert torch.equal(logits(a), logits(b))


def test_compress_begins_windows_as_the_tokenizer_begins_texts() -> None:
    assert [api.beginning(each) for each in (None, Words(), Words(3))] == [None, None, 3]
    text, (a, b) = "The quick brown fox jumps over the lazy dog. " * 16, (tiny_model(), tiny_model())
    api.compress(a, text, RECIPE, tokenizer=Words(3), samples=4, length=32)
    api.compress(b, api.calibration_windows(api.tokenize(text, Words(3)), 4, 32, begin=3), RECIPE)
    assert torch.equal(logits(a), logits(b))


def test_tokenize_refuses_text_without_a_tokenizer() -> None:
    with pytest.raises(TypeError) as caught:
        api.compress(tiny_model(), "some text")
    need = "texts must be strings and come with a tokenizer"
    assert str(caught.value) == f"tokenize: {need}; got no tokenizer. Pass tokenizer=..."
    with pytest.raises(TypeError, match=r"got a list with \['int', 'str'\]"):
        api.tokenize(["a", 3], Words())  # type: ignore[list-item]
    with pytest.raises(ValueError, match="texts must hold at least one token; got none"):
        api.tokenize("", Words())


def test_save_and_load_give_the_same_logits(compressed: tuple[Any, Any], tmp_path: Path) -> None:
    model, result = compressed
    numbers = {"perplexity of dense": 12.34567, "perplexity of this": 15, "window": "1024 tokens"}
    target = tmp_path / "out"
    options = {"tokenizer": Words(), "report": result, "recipe": RECIPE, "numbers": numbers}
    assert api.save_pretrained(model, target, **options, max_shard_size="40KB") == target
    loaded = api.load(target)
    assert torch.equal(logits(loaded), logits(model))
    assert {layer.kind for _, layer in nn.sparse_linears(loaded)} == {"w4a16_sp24", "w4a16_dense"}
    files = {path.name for path in target.iterdir() if path.suffix != ".safetensors"}
    expected = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert files == expected | {"compression_report.json", "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads((target / "compression_report.json").read_text())
    assert report["numbers"] == numbers and report["recipe"] == json.loads(RECIPE.to_json())
    assert report["layers"] == json.loads(result.report_json())["layers"]


def test_card_shows_layers_numbers_and_recipe(compressed: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = compressed
    api.save_pretrained(model, tmp_path / "tiny", recipe=RECIPE, numbers={"perplexity": 12.34567})
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# tiny\n" in card
    assert 'from_pretrained("tiny", device_map="auto")' in card
    layers = dict(nn.sparse_linears(model))
    for kind, count in (("w4a16_sp24", 11), ("w4a16_dense", 2)):
        same = [layer for layer in layers.values() if layer.kind == kind]
        weights = sum(layer.in_features * layer.out_features for layer in same)
        bits = 8 * sum(layer.packed.nbytes for layer in same) / weights
        assert f"| {kind} | {count} | {weights:,} | {bits:.2f} |" in card
    assert "| perplexity | 12.35 |" in card and '"pattern": "*.down_proj"' in card
    assert str(tmp_path) not in card


def test_save_of_a_model_replaced_by_hand_is_complete(tmp_path: Path) -> None:
    model = tiny_model()
    name = "model.layers.1.mlp.up_proj"
    layer = nn.SparseLinear.from_dense(model.get_submodule(name), group_size=32)
    nn.replace_linears(model, {name: layer.to_weight()})
    api.save_pretrained(model, tmp_path / "out")
    assert list(open_directory(tmp_path / "out").layers) == [name]
    assert torch.equal(logits(api.load(tmp_path / "out")), logits(model))


def test_load_casts_and_places(compressed: tuple[Any, Any], tmp_path: Path) -> None:
    api.save_pretrained(compressed[0], tmp_path / "out")
    loaded = api.load(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
    assert {t.dtype for t in loaded.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}


def test_load_refuses_what_is_no_directory_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        api.load(tmp_path / "none")
    path = tmp_path / "none" / "config.json"
    need = "the file must be readable"
    assert str(caught.value) == f"{path}: {need}; got No such file or directory. Check the path."


def test_save_replaces_a_previous_save_and_nothing_else(compressed: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = compressed
    target = tmp_path / "out"
    api.save_pretrained(model, target, max_shard_size="40KB")
    api.save_pretrained(model, target)
    assert (target / "model.safetensors").exists() and not list(target.glob("*-of-*"))
    other = tmp_path / "notes"
    other.mkdir()
    (other / "thesis.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="an existing directory must be empty or a previous save"):
        api.save_pretrained(model, other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    api.save_pretrained(model, other, overwrite=True)
    assert not (other / "thesis.txt").exists() and (other / "config.json").exists()


def test_save_of_a_loaded_model_over_itself_keeps_its_tensors(compressed: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = compressed
    api.save_pretrained(model, tmp_path / "out")
    loaded = api.load(tmp_path / "out")
    api.save_pretrained(loaded, tmp_path / "out")
    assert torch.equal(logits(api.load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_failed_save_leaves_nothing_behind(
    compressed: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    model, _ = compressed
    target = tmp_path / "out"
    if existing:
        api.save_pretrained(model, target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(api, "_card", fail)
    with pytest.raises(OSError, match="No space left"):
        api.save_pretrained(model, target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


def test_save_refuses_a_model_with_bad_values_before_writing(tmp_path: Path) -> None:
    model = tiny_model()
    api.compress(model, torch.randint(0, 64, (4, 32)), "sp24-int4-magnitude")
    model.model.layers[0].mlp.up_proj.scales[0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layer model\.layers\.0\.mlp\.up_proj: scales must be finite"):
        api.save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_refuses_what_it_cannot_save(compressed: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError) as caught:
        api.save_pretrained(compressed[0].model.layers[0].mlp, tmp_path / "out")
    assert str(caught.value) == (
        "save_pretrained: model must be a transformers.PreTrainedModel; got LlamaMLP. "
        "Save other modules with torch.save(model.state_dict())."
    )
    with pytest.raises(ValueError) as refused:
        api.save_pretrained(tiny_model(), tmp_path / "out")
    need = "model must have a compressed layer"
    assert str(refused.value) == f"save_pretrained: {need}; got none. Call marlin.compress first."
    with pytest.raises(TypeError, match="report and numbers must be JSON"):
        api.save_pretrained(compressed[0], tmp_path / "out", numbers={"x": object()})
    assert not list(tmp_path.iterdir())
