"""Where the time of a decode step in vLLM goes: GPU time of kernels by what they do.

Owns the classes and the measurement, in the engine's process. A class takes kernels by their names; what no class
takes is listed under "other" with its largest names, so that nothing hides there.

Times of kernels that overlap (an early launch waits inside its kernel) are added up, so the sum can exceed the step.
"""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Iterable
from typing import Any

STEPS, WARM_UP, PROMPT = 12, 4, 64
OTHER = "other"
# In this order: the first pattern that is found in a kernel's name decides.
CLASSES: tuple[tuple[str, str], ...] = (
    ("linear, ours", r"sm\d+_w4a16_"),
    ("linear, vLLM INT4", r"(?i)machete|marlin|gptq|dequant"),
    ("attention", r"(?i)flash|fmha|attention|attn|reshape_and_cache|prepare_varlen"),
    ("norms", r"(?i)rms_?norm|layer_?norm"),
    ("activation", r"(?i)act_and_mul|silu|gelu"),
    ("rotary", r"(?i)rotary|rope"),
    ("linear, fp16", r"(?i)gemm|nvjet|gemv|cublas|splitk|cutlass"),
    ("sampling", r"(?i)argmax|arg_?max|softmax|sampl|topk|top_k|reduce_kernel|radix|sort"),
    ("copies", r"(?i)^mem(cpy|set)|copy|cat_|CatArray|index|gather|scatter|fill|embedding"),
)


def classify(name: str) -> str:
    """The class of a kernel's name."""
    return next((label for label, pattern in CLASSES if re.search(pattern, name)), OTHER)


def summarize(kernels: Iterable[tuple[str, float, int]], steps: int) -> list[dict[str, Any]]:
    """Classes by time: {class, us_per_step, launches_per_step, largest}. kernels: (name, us and launches in all)."""
    found: dict[str, list[tuple[str, float, int]]] = collections.defaultdict(list)
    for name, us, launches in kernels:
        found[classify(name)].append((name, us, launches))
    rows = []
    for label, members in found.items():
        members.sort(key=lambda member: -member[1])
        us, launches = sum(member[1] for member in members), sum(member[2] for member in members)
        row = {"class": label, "us_per_step": us / steps, "launches_per_step": launches / steps}
        rows.append({**row, "largest": [member[0][:80] for member in members[:3]]})
    return sorted(rows, key=lambda row: -row["us_per_step"])


def profile(llm: Any, batch: int, vocabulary: int) -> dict[str, Any]:
    """Decode steps of `batch` sequences under torch's profiler: {batch, prompt, steps, step_us, classes}.

    step_us: wall time of a step, the profiler's own cost included. Needs an engine in this process.
    """
    import torch
    from vllm import SamplingParams

    engine, generator = llm.llm_engine, torch.Generator().manual_seed(batch)
    sampling = SamplingParams(temperature=0, max_tokens=WARM_UP + STEPS + 8, ignore_eos=True, detokenize=False)
    for index, ids in enumerate(torch.randint(2, vocabulary, (batch, PROMPT), generator=generator).tolist()):
        engine.add_request(f"profile-{batch}-{index}", {"prompt_token_ids": ids}, sampling)
    # Prompts of up to 8192 tokens take a step of their own, so that steps after the warm-up hold no prefill.
    for _ in range(WARM_UP + batch * PROMPT // 8192):
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as recorded:
        began = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    while engine.has_unfinished_requests():
        engine.step()
    kernels = [(event.key, event.self_device_time_total, event.count) for event in recorded.key_averages()]
    classes = summarize((kernel for kernel in kernels if kernel[1] > 0), STEPS)
    return {"batch": batch, "prompt": PROMPT, "steps": STEPS, "step_us": wall / STEPS * 1e6, "classes": classes}
