"""Serving speed in vLLM: `python -m benchmarks.serving`, on a machine with vLLM and a GPU.

Owns what a user of vLLM feels: time per output token and prompt tokens per second of a model of Llama-3.1-8B's shape
with random weights, unquantized, as vLLM's own dense INT4, and 2:4 INT4 through the plugin, on the same engine and
settings. Each engine is a process of its own; every row is written to `records/serving-<gpu>.json` when it is measured.

Time per output token is (time for 1 + output tokens - time for 1 token) / output, so that it holds no prefill; prompt
tokens per second are those of the second term. Both are the best of the repetitions.

A record: facts of the machine (`benchmarks.machine`), kernel_hash, settings, rows. A row: engine, version, model,
quantization, kernel, tp, batch, prompt, output, ms_per_output_token, prefill_tokens_per_s.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import records
from marlin.errors import message

MODEL = "Llama-3.1-8B, random weights"
# Ours last by name, first in order of measuring: it is what the others are compared with.
QUANTIZATIONS = ("sparse_marlin", "pack-quantized", "none", "pack-quantized, marlin kernel")
GROUP_SIZE, PROMPT, OUTPUT, LONG_PROMPT = 128, 512, 128, 4096
_FIELDS = ("quantization", "tp", "batch", "prompt", "output")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model takes a function
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float16",
}


def model_config(layers: int, quantization: str) -> dict[str, Any]:
    """config.json of the model. Raises: ValueError (quantization)."""
    config = {**_LLAMA, "num_hidden_layers": layers}
    if quantization == "none":
        return config
    hidden, inner, kv = 4096, 14336, 1024
    shapes = {f"self_attn.{name}_proj": (rows, hidden) for name, rows in (("q", hidden), ("k", kv), ("v", kv))}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    names = {f"model.layers.{index}.{name}": shape for index in range(layers) for name, shape in shapes.items()}
    if quantization == "sparse_marlin":
        from marlin.formats.checkpoint import LayerSpec, describe

        specs = {name: LayerSpec("w4a16_sp24", GROUP_SIZE, *shape) for name, shape in names.items()}
        return config | {"quantization_config": describe(specs)}
    if quantization.startswith("pack-quantized"):
        from marlin.formats.published import describe_pack_quantized

        described = describe_pack_quantized(dict.fromkeys(names, GROUP_SIZE), ["lm_head"])
        return config | {"quantization_config": described}
    raise ValueError(message("serving", f"quantization must be one of {QUANTIZATIONS}", repr(quantization)))


def randomize(model: Any) -> dict[str, int]:
    """Fill integer weights with random legal bits, in place; returns how many layers run which method or kernel.

    Why: vLLM's placeholder weights leave integers as they are, and a GPU computes faster on zeros.
    """
    import torch

    legal = torch.tensor([0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110], dtype=torch.uint8)
    counts: collections.Counter[str] = collections.Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        kernel = getattr(kernel, "delegate", None) or kernel
        if method is not None:
            counts[type(kernel or method).__name__] += 1
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != torch.int32 or parameter.numel() < 64:
                continue
            if "meta" in name:
                table = legal.to(parameter.device)
                low, high = (torch.randint(0, 6, (4 * parameter.numel(),), device=table.device) for _ in range(2))
                bits = table[low] | table[high] << 4
                parameter.data.copy_(bits.view(torch.int32).view(parameter.shape))
            else:
                parameter.data.random_(-(2**31), 2**31 - 1)
    return dict(counts)


def engine_arguments(directory: str, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's engine, the same for every quantization."""
    largest = max(args.batches)
    sizes = sorted({size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= largest} | set(args.batches))
    modes = {"none": (0, "FULL_DECODE_ONLY"), "compile": (3, "FULL_AND_PIECEWISE")}
    mode, graphs = modes[args.mode]
    return {
        "model": directory,
        "load_format": "dummy",
        "dtype": "float16",
        "seed": 0,
        "tensor_parallel_size": args.tp,
        "max_model_len": 8192,
        "max_num_seqs": largest,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": args.memory,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "compilation_config": {"mode": mode, "cudagraph_capture_sizes": sizes, "cudagraph_mode": graphs},
        **({"attention_config": {"backend": args.attention}} if args.attention else {}),
    }


def _measure(llm: Any, batch: int, prompt: int, output: int, repetitions: int) -> tuple[float | None, float]:
    """(ms per output token or None where output is 0, prompt tokens per second)."""
    import torch
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(2, _LLAMA["vocab_size"], (batch, prompt), generator=generator)
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]

    def seconds(tokens: int) -> float:
        best = float("inf")
        for _ in range(repetitions):
            sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            began = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            best = min(best, time.perf_counter() - began)
            assert all(len(one.outputs[0].token_ids) == tokens for one in outputs)
        return best

    first = seconds(1)
    prefill = batch * prompt / first
    return ((seconds(1 + output) - first) / output * 1e3 if output else None), prefill


def run_case(args: argparse.Namespace) -> None:
    """One engine: print a line `ROW {...}` for each point."""
    import vllm

    with tempfile.TemporaryDirectory() as directory:
        config = model_config(args.layers, args.case)
        pathlib.Path(directory, "config.json").write_text(json.dumps(config))
        llm = vllm.LLM(**engine_arguments(directory, args))
        counts = llm.apply_model(randomize)[0]
        print(f"{args.case}: {counts}", flush=True)
        kernel = max((name for name in counts if "Embedding" not in name), key=lambda name: counts[name])
        name = MODEL if args.layers == _LLAMA["num_hidden_layers"] else f"{MODEL}, {args.layers} layers"
        _measure(llm, 1, 64, 4, 1)
        points = [(batch, args.prompt, args.output) for batch in args.batches]
        # The long prompt before the largest batch, which takes the longest.
        points.insert(max(len(points) - 1, 1), (1, args.long_prompt, 0))
        for batch, prompt, output in points:
            _measure(llm, batch, prompt, min(output, 2), 1)
            ms, prefill = _measure(llm, batch, prompt, output, args.repetitions)
            row = {"engine": "vllm", "version": vllm.__version__, "model": name, "quantization": args.case}
            row |= {"kernel": kernel, "tp": args.tp, "batch": batch, "prompt": prompt, "output": output}
            row |= {"ms_per_output_token": ms, "prefill_tokens_per_s": prefill}
            print(f"ROW {json.dumps(row)}", flush=True)


def case_environment(case: str, entry_points: str, tp: int) -> dict[str, str]:
    """Environment of one engine. The plugin is loaded where it is measured, and nowhere else."""
    paths = [entry_points, str(records.ROOT / "src"), str(records.ROOT), os.environ.get("PYTHONPATH", "")]
    plugin = {"VLLM_PLUGINS": "sparse_marlin" if "marlin" in case else ""}
    dense = {"MARLIN_VLLM_DENSE": "1"} if case.endswith("marlin kernel") else {}
    single = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if tp == 1 else {}
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **_ENVIRONMENT, **plugin, **dense, **single, **own}


def write_entry_points(directory: pathlib.Path) -> None:
    """Metadata by which vLLM finds the plugin of a checkout that is not installed."""
    info = directory / "sparse_marlin-0.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparse-marlin\nVersion: 0.0.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nsparse_marlin = marlin.integrations.vllm:plugin\n")


def rows_of(case: str, args: argparse.Namespace, limit: float) -> Iterator[dict[str, Any]]:
    """Rows of one engine's process as they are measured; it is ended after `limit` seconds."""
    with tempfile.TemporaryDirectory() as directory:
        write_entry_points(pathlib.Path(directory))
        words = [sys.executable, "-m", "benchmarks.serving", "--case", case, *args.words]
        process = subprocess.Popen(
            words,
            cwd=records.ROOT,
            env=case_environment(case, directory, args.tp),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        timer = threading.Timer(max(limit, 1.0), process.kill)
        timer.start()
        assert process.stdout is not None
        tail: collections.deque[str] = collections.deque(maxlen=40)
        for line in process.stdout:
            tail.append(line)
            if line.startswith("ROW "):
                yield json.loads(line[4:])
            elif line.startswith(case):
                print(line, end="", flush=True)
        timer.cancel()
        if process.wait():
            print(f"{case}: ended with status {process.returncode}\n{''.join(tail)}", flush=True)


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """new, plus the rows of old at points that new did not measure, where GPU, driver and kernels are the same."""
    same = ("gpu", "driver", "torch", "kernel_hash", "settings")
    if old is None or any(old.get(name) != new[name] for name in same):
        return new
    key = lambda row: tuple(row[name] for name in ("model", "version", *_FIELDS))  # noqa: E731
    measured = {key(row) for row in new["rows"]}
    return {**new, "rows": [row for row in old["rows"] if key(row) not in measured] + new["rows"]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line for each point, ms per output token and prefill rate of each quantization."""
    kinds = [kind for kind in QUANTIZATIONS if any(row["quantization"] == kind for row in rows)]
    header = ["batch, prompt", *(f"{kind}, ms" for kind in kinds), *(f"{kind}, prompt tokens/s" for kind in kinds)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for point in dict.fromkeys((row["batch"], row["prompt"]) for row in rows):
        found = {row["quantization"]: row for row in rows if (row["batch"], row["prompt"]) == point}
        times = [found[kind]["ms_per_output_token"] if kind in found else None for kind in kinds]
        rates = [found[kind]["prefill_tokens_per_s"] if kind in found else None for kind in kinds]
        cells = ["-" if one is None else f"{one:.2f}" for one in times]
        cells += ["-" if one is None else f"{one:.0f}" for one in rates]
        lines.append([f"{point[0]}, {point[1]}", *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments; `words` are those that an engine's process is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--cases", default=";".join(QUANTIZATIONS), help="quantizations, separated by semicolons")
    parser.add_argument("--seconds", type=float, default=1800.0, help="for all engines together")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    own = parser.add_argument_group("engine")
    own.add_argument("--batches", type=_ints, default=[1, 16, 64, 256])
    for name, default in (("layers", 32), ("prompt", PROMPT), ("output", OUTPUT), ("long-prompt", LONG_PROMPT)):
        own.add_argument(f"--{name}", type=int, default=default)
    own.add_argument("--repetitions", type=int, default=2)
    own.add_argument("--tp", type=int, default=1)
    own.add_argument("--memory", type=float, default=0.6, help="share of the GPU's memory that vLLM takes")
    own.add_argument("--mode", choices=("none", "compile"), default="none", help="vLLM's compilation mode")
    own.add_argument("--attention", default="", help="vLLM's attention backend, e.g. FLASH_ATTN")
    args = parser.parse_args(argv)
    names = ("layers", "prompt", "output", "long_prompt", "repetitions", "tp", "memory", "mode", "attention")
    args.words = [f"--batches={','.join(map(str, args.batches))}"]
    args.words += [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0 when every engine gave all of its rows, else 1."""
    args = parse(argv)
    if args.case:
        run_case(args)
        return 0
    from benchmarks import machine

    facts = machine.facts()
    settings = {"mode": args.mode, "group_size": GROUP_SIZE, "repetitions": args.repetitions}
    new: dict[str, Any] = {**facts, "kernel_hash": records.kernel_hash(), "settings": settings, "rows": []}
    name = f"serving-{machine.slug(facts['gpu'])}.json"
    folders = [records.RECORDS, *(pathlib.Path(folder) for folder in [os.environ.get("OUT")] if folder)]
    old, end = records.read(records.RECORDS / name), time.monotonic() + args.seconds
    complete = True
    for case in args.cases.split(";"):
        count = 0
        for row in rows_of(case, args, end - time.monotonic()):
            count += 1
            new["rows"].append(row)
            print(json.dumps(row), flush=True)
            for folder in folders:
                records.write(folder / name, merge(old, new))
        complete &= count == len(args.batches) + 1
    print(table(new["rows"]))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
