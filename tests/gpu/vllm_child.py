"""Runs vLLM on one model directory after another, in a process of its own: `python vllm_child.py JOBS RESULTS`.

JOBS: a JSON list of {name, model, prompts (lists of token ids), tokens, engine (arguments of vLLM's LLM)}.
RESULTS: a file that gets one JSON line per job: {name, tokens, methods} or {name, error}.
"""

from __future__ import annotations

import collections
import gc
import json
import pathlib
import sys
import traceback
from typing import Any


def methods(model: Any) -> dict[str, int]:
    """How many layers run which method, or which kernel of a method that has several."""
    counts: collections.Counter[str] = collections.Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if method is not None:
            counts[type(getattr(kernel, "delegate", None) or kernel or method).__name__] += 1
    return dict(counts)


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=job["model"], skip_tokenizer_init=True, **job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    result = {"tokens": [list(one.outputs[0].token_ids) for one in outputs], "methods": llm.apply_model(methods)[0]}
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


if __name__ == "__main__":
    with pathlib.Path(sys.argv[2]).open("w") as results:
        for job in json.loads(pathlib.Path(sys.argv[1]).read_text()):
            try:
                row = run(job)
            except Exception:
                row = {"error": traceback.format_exc()}
            print(json.dumps({"name": job["name"], **row}), file=results, flush=True)
            print(f"{job['name']}: {row.get('methods') or row['error']}", flush=True)
