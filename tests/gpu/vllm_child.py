"""Runs vLLM on a model directory, in a process of its own: `python vllm_child.py JOB RESULT`.

JOB: a JSON file with {model, prompts (lists of token ids), tokens, engine (arguments of vLLM's LLM)}.
RESULT: a JSON file, {tokens, logprobs (of these tokens), alone (both again, of each prompt in a batch of its own),
methods}; it is missing where the engine failed.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys
from typing import Any


def methods(model: Any) -> dict[str, int]:
    """How many layers run which method, or which kernel of a method that has several; and "row-wise": ours."""
    counts: collections.Counter[str] = collections.Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if method is not None:
            counts[type(getattr(kernel, "delegate", None) or kernel or method).__name__] += 1
        counts["row-wise"] += getattr(module, "takes", False) is True
    return dict(counts)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of every prompt, and what the layers run."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=job["model"], skip_tokenizer_init=True, **job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False, logprobs=1)

    def answer(prompts: list[list[int]]) -> dict[str, list[Any]]:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        firsts = [one.outputs[0] for one in outputs]
        tokens = [list(first.token_ids) for first in firsts]
        pairs = [zip(first.token_ids, first.logprobs, strict=True) for first in firsts]
        return {"tokens": tokens, "logprobs": [[row[token].logprob for token, row in pair] for pair in pairs]}

    alone = [answer([ids]) for ids in job["prompts"]]
    parts = {name: [one[name][0] for one in alone] for name in ("tokens", "logprobs")}
    return {**answer(job["prompts"]), "alone": parts, "methods": llm.apply_model(methods)[0]}


if __name__ == "__main__":
    result = run(json.loads(pathlib.Path(sys.argv[1]).read_text()))
    pathlib.Path(sys.argv[2]).write_text(json.dumps(result))
