"""A compressed directory in use: generate with every cache, sampling and padding, and torch.compile without breaks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache  # noqa: E402

from marlin import api, nn  # noqa: E402
from marlin.compress import LayerRecipe, Recipe  # noqa: E402

PAD, VOCABULARY = 0, 96
PROMPTS = torch.arange(1, 37).view(3, 12) * 7 % 89 + 2
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
NEW = GREEDY["max_new_tokens"]
# Why: 2.4 refuses the decorators that transformers puts around forward.
compiles = pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="torch 2.4 cannot trace transformers")
recompiling_fails = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks: 2:4 INT4 with dense INT4 down projections, in shards."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(1)
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=VOCABULARY, max_position_embeddings=64)
    config.bos_token_id = config.eos_token_id = None
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # Why: as drawn by default, the next token is always the last one.
    rules = (("*.down_proj", LayerRecipe("w4a16_dense", 32, "rtn")),)
    recipe = Recipe(rules, LayerRecipe(group_size=64, method="magnitude"))
    result = api.compress(model, torch.randint(0, VOCABULARY, (2, 16)), recipe)
    target = tmp_path_factory.mktemp("generate") / "model"
    api.save_pretrained(model, target, report=result, recipe=recipe, max_shard_size="60KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, device_map="auto")


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def attended(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@torch.no_grad()
def greedy_by_hand(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What generate must say, from whole forward passes without a cache."""
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_load_of_shards_by_auto_map_takes_a_dtype(directory: Path, dtype: torch.dtype | None) -> None:
    options = {} if dtype is None else {"dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="auto", **options)
    floating = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    assert floating == {dtype or torch.float32}
    assert {layer.kind for _, layer in nn.sparse_linears(model)} == {"w4a16_sp24", "w4a16_dense"}
    assert model.generate(**attended(PROMPTS), **GREEDY).shape == (3, 12 + NEW)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_tokens_of_whole_passes(model: Any, cache: str) -> None:
    wanted = greedy_by_hand(model, PROMPTS)
    assert len(set(wanted[:, 12:].flatten().tolist())) > 5
    assert torch.equal(model.generate(**attended(PROMPTS), **GREEDY, cache_implementation=cache), wanted)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batch_gives_the_tokens_of_each_prompt_alone(model: Any, cache: str) -> None:
    lengths = (12, 7, 3)
    batch = torch.full((3, 12), PAD)
    for row, length in enumerate(lengths):
        batch[row, 12 - length :] = PROMPTS[row, :length]
    together = model.generate(**attended(batch), **GREEDY, cache_implementation=cache)
    for row, length in enumerate(lengths):
        alone = model.generate(**attended(PROMPTS[row : row + 1, :length]), **GREEDY)
        assert torch.equal(together[row, 12:], alone[0, length:]), length


def test_sampling_follows_the_seed(model: Any) -> None:
    options = {**GREEDY, "do_sample": True, "temperature": 1.5, "top_k": 40, "num_return_sequences": 2}
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(model.generate(**attended(PROMPTS), **options))
    assert runs[0].shape == (6, 12 + NEW)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@compiles
def test_compiled_forward_is_one_graph_for_every_batch_and_length(model: Any, fresh_compiler: None) -> None:
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), recompiling_fails:
        for batch, length in ((2, 9), (3, 12), (5, 7)):
            ids = torch.randint(2, VOCABULARY, (batch, length))
            got = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@compiles
def test_compiled_decode_step_on_a_static_cache_is_one_graph(model: Any, fresh_compiler: None) -> None:
    """One token of each sequence at a time: positions change, the graph does not."""
    wanted = greedy_by_hand(model, PROMPTS)
    cache = StaticCache(config=model.config, max_cache_len=12 + NEW)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = model(PROMPTS, past_key_values=cache, use_cache=True)
        tokens = [out.logits[:, -1:].argmax(-1)]
        with recompiling_fails:
            for step in range(1, NEW):
                positions = torch.full((3, 1), 12 + step - 1)
                out = compiled(input_ids=tokens[-1], position_ids=positions, past_key_values=cache, use_cache=True)
                tokens.append(out.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), wanted[:, 12:])


@compiles
def test_generate_through_a_compiled_forward_with_a_static_cache(
    model: Any, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model.generate(**attended(PROMPTS), **GREEDY)
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph

    compiled = torch.compile(model.forward, backend=counting, fullgraph=True)
    monkeypatch.setattr(model, "forward", compiled)
    got = model.generate(**attended(PROMPTS), **GREEDY, cache_implementation="static")
    assert torch.equal(got, wanted)
    assert 1 <= len(graphs) <= 2  # the prompt and the single token


@pytest.mark.skipif(shutil.which("g++") is None, reason="the CPU compiler of torch needs g++")
def test_inductor_compiles_a_compressed_block_part(model: Any, fresh_compiler: None) -> None:
    mlp = model.model.layers[0].mlp
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True)
    with torch.no_grad(), recompiling_fails:
        for batch in (2, 5):
            act = torch.randn(batch, 3, 128)
            torch.testing.assert_close(compiled(act), mlp(act), rtol=1e-5, atol=1e-4)


def test_card_tells_use_calibration_results_and_recipe(directory: Path, model: Any, tmp_path: Path) -> None:
    card = (directory / "README.md").read_text()
    wanted = [
        "## Layers",
        "## Calibration",
        "## Recipe",
        'AutoModelForCausalLM.from_pretrained("model", device_map="au',
    ]
    assert [text for text in wanted if text not in card] == []
    assert "| w4a16_sp24 | magnitude | 12 | " in card and "| w4a16_dense | rtn | 2 | " in card
    values = ((0, 0.1, 2000), (1, 0.3, 10), (2, None, 0))
    rows = [{"kind": "sp", "method": "m", "name": f"l{i}", "relative_error": e, "tokens": t} for i, e, t in values]
    report = {"calibration": {"text": "a novel", "windows": 16}, "layers": rows}
    api.save_pretrained(model, tmp_path / "facts", report=report, numbers={"perplexity": 30.123456})
    card = (tmp_path / "facts" / "README.md").read_text()
    assert "## Calibration\n\n| | |\n|---|---:|\n| text | a novel |\n| windows | 16 |\n" in card
    assert "| sp | m | 2 | 10 to 2,000 | 0.2 | 0.3, l1 |" in card
    assert "## Results\n\n| | |\n|---|---:|\n| perplexity | 30.12 |\n" in card and "## Recipe" not in card
