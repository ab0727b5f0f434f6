"""Tasks of lm_eval on a model that is loaded: the numbers of the harness itself, on a task of a folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin.errors import UnsupportedError
from marlin.integrations.lm_eval import run_tasks

here = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not here, reason="needs lm_eval")
_TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.skipif(here, reason="lm_eval is installed")
def test_tasks_without_the_harness_say_how_to_get_it() -> None:
    with pytest.raises(UnsupportedError) as error:
        run_tasks(None, None, ["letters"])
    assert str(error.value) == (
        "eval tasks: lm_eval must be installed; got No module named 'lm_eval'. Install it: pip install lm_eval."
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task of ten questions, of which the model below knows seven."""
    rows = [{"text": "a", "choices": [" b", " c"], "right": int(i >= 7)} for i in range(10)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "letters.yaml").write_text(_TASK % (tmp_path / "data.jsonl"))
    return tmp_path


def _model_that_prefers_b() -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<s>", "a", "b", "c", "?"))}
    plain = Tokenizer(models.WordLevel(words, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="<s>", unk_token="?")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1)
        # All hidden states point one way, along which b is likelier than c.
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight[2].fill_(1)
    return model, tokenizer


@needs_harness
def test_tasks_give_the_numbers_of_the_harness(folder: Path) -> None:
    model, tokenizer = _model_that_prefers_b()
    found = run_tasks(model, tokenizer, ["letters"], folder=folder)
    assert found["letters"]["acc"] == pytest.approx(0.7)
    assert set(found["letters"]) == {"acc", "acc_stderr"}
    first = run_tasks(model, tokenizer, ["letters"], folder=folder, limit=5)
    assert first["letters"]["acc"] == 1.0


@needs_harness
def test_unknown_tasks_are_named(folder: Path) -> None:
    with pytest.raises(ValueError) as error:
        run_tasks(None, None, ["letters", "runes"], folder=folder)
    assert str(error.value) == (
        "eval tasks: tasks must be known to lm_eval; got runes. "
        "`lm_eval ls tasks` lists them; --task-folder adds those of a folder."
    )
