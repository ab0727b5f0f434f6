"""Serving speed in vLLM: `python -m benchmarks.serving`, on a machine with vLLM and a GPU.

Owns what a user of vLLM feels: time per output token and prompt tokens per second of a model of Llama-3.1-8B's shape
with random weights, unquantized, as vLLM's own dense INT4, and 2:4 INT4 through the plugin (also with vLLM's own norms
and activation), on the same engine and settings. Each engine is a process of its own (`benchmarks.engines`); every row
is written to `records/serving-<gpu>.json` when it is measured.

Time per output token is (time for 1 + output tokens - time for 1 token) / output, so that it holds no prefill; prompt
tokens per second are those of the second term. Both are the best of the repetitions, of which there is one where a run
takes more than 3 seconds.

A record: facts of the machine (`benchmarks.machine`), kernel_hash, settings, rows, profiles. A row: engine, version,
model, quantization, kernel, tp, mode (of compilation), batch, prompt, output, ms_per_output_token,
prefill_tokens_per_s. A profile: the same up to mode, and what `benchmarks.serving_profile` finds.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import engines, records, serving_profile, serving_tables
from marlin.errors import message

MODEL = "Llama-3.1-8B, random weights"
QUANTIZATIONS = serving_tables.KINDS
GROUP_SIZE, PROMPT, OUTPUT, LONG_PROMPT = 128, 512, 128, 4096
_MAX_LENGTH = 8192
_PROFILED_BATCHES = (1, 64)
_FIELDS = ("model", "version", "quantization", "tp", "batch", "prompt", "output")
_PROFILE_FIELDS = ("model", "version", "quantization", "tp", "batch")
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
    if quantization not in QUANTIZATIONS:
        raise ValueError(message("serving", f"quantization must be one of {QUANTIZATIONS}", repr(quantization)))
    if quantization == "none":
        return config
    hidden, inner, kv = 4096, 14336, 1024
    shapes = {f"self_attn.{name}_proj": (rows, hidden) for name, rows in (("q", hidden), ("k", kv), ("v", kv))}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    names = {f"model.layers.{index}.{name}": shape for index in range(layers) for name, shape in shapes.items()}
    if quantization.startswith("sparse_marlin"):
        from marlin.formats.checkpoint import LayerSpec, describe

        specs = {name: LayerSpec("w4a16_sp24", GROUP_SIZE, *shape) for name, shape in names.items()}
        return config | {"quantization_config": describe(specs)}
    from marlin.formats.published import describe_pack_quantized

    described = describe_pack_quantized(dict.fromkeys(names, GROUP_SIZE), ["lm_head"])
    return config | {"quantization_config": described}


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


def cache_bytes(args: argparse.Namespace) -> int:
    """Keys and values of the largest batch, or of one sequence of the largest length, on one GPU."""
    heads = max(_LLAMA["num_key_value_heads"] // args.tp, 1)
    token = 2 * 2 * heads * _LLAMA["head_dim"] * args.layers
    # Why 64: blocks are filled in part, and some are kept free.
    tokens = max(args.batches) * (args.prompt + args.output + 64) + args.long_prompt
    return int(token * max(tokens, 2 * _MAX_LENGTH))


def engine_arguments(directory: str, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's engine, the same for every quantization."""
    modes = {"none": (0, "FULL_DECODE_ONLY"), "compile": (3, "FULL_AND_PIECEWISE")}
    mode, graphs = modes[args.mode]
    sizes = sorted(set(args.batches))
    return {
        "model": directory,
        "load_format": "dummy",
        "dtype": "float16",
        "seed": 0,
        "tensor_parallel_size": args.tp,
        "max_model_len": _MAX_LENGTH,
        "max_num_seqs": max(args.batches),
        "max_num_batched_tokens": _MAX_LENGTH,
        # What the start asks for; the cache itself has a stated size, so that no engine has to measure what is left.
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": cache_bytes(args),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "compilation_config": {
            "mode": mode,
            "cudagraph_capture_sizes": sizes,
            "cudagraph_mode": graphs,
        },
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
            if 3 < best < float("inf"):
                break
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
    """One engine, once a line comes in: print a line `ROW {...}` for each point, `PROFILE {...}` for each profile."""
    import vllm

    if not sys.stdin.readline():
        return
    with tempfile.TemporaryDirectory() as directory:
        config = model_config(args.layers, args.case)
        pathlib.Path(directory, "config.json").write_text(json.dumps(config))
        began = time.monotonic()
        llm = vllm.LLM(**engine_arguments(directory, args))
        counts = llm.apply_model(randomize)[0]
        print(f"{args.case}: {counts}, up in {time.monotonic() - began:.0f} s", flush=True)
        kernel = max((name for name in counts if "Embedding" not in name), key=lambda name: counts[name])
        name = MODEL if args.layers == _LLAMA["num_hidden_layers"] else f"{MODEL}, {args.layers} layers"
        head = {"engine": "vllm", "version": vllm.__version__, "model": name, "quantization": args.case}
        head |= {"kernel": kernel, "tp": args.tp, "mode": args.mode}
        _measure(llm, 1, 64, 4, 1)
        for batch, prompt, output in points(args):
            # Prompts of all lengths are computed in pieces of one size; only the first of that size is slow.
            _measure(llm, batch, min(prompt, _MAX_LENGTH // batch), min(output, 2), 1)
            ms, prefill = _measure(llm, batch, prompt, output, args.repetitions)
            row = {**head, "batch": batch, "prompt": prompt, "output": output}
            row |= {"ms_per_output_token": ms, "prefill_tokens_per_s": prefill}
            print(f"ROW {json.dumps(row)}", flush=True)
        # Last, since a profiler stays in the process.
        for batch in _PROFILED_BATCHES if args.profile and args.tp == 1 else ():
            if batch in args.batches:
                found = serving_profile.profile(llm, batch, _LLAMA["vocab_size"])
                print(f"PROFILE {json.dumps({**head, **found})}", flush=True)


def points(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(batch, prompt, output) of every row; output 0 where only the prompt is measured."""
    found = [(batch, args.prompt, args.output) for batch in args.batches]
    # The long prompt before the largest batch, which takes the longest.
    found.insert(max(len(found) - 1, 1), (1, args.long_prompt, 0))
    return found


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """new, plus what old has of points that new did not measure, where GPU, driver and torch are the same.

    Of other kernels of ours than new's, only what runs without them is kept.
    """
    same = ("gpu", "driver", "torch")
    if old is None or any(old.get(name) != new[name] for name in same) or _settings(old) != _settings(new):
        return new
    kernels, kept = old.get("kernel_hash") == new["kernel_hash"], {}
    for part, names in (("profiles", _PROFILE_FIELDS), ("rows", _FIELDS)):
        measured = {_key(row, new, names) for row in new[part]}
        rows = [row for row in old.get(part, []) if kernels or "marlin" not in row["quantization"]]
        kept[part] = [row for row in rows if _key(row, old, names) not in measured] + new[part]
    return {**new, **kept}


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record["settings"].items() if name != "mode"}


def _key(row: dict[str, Any], record: dict[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    # Why: records before rows had a mode say it once for all of them.
    return (row.get("mode", record["settings"].get("mode", "none")), *(row[name] for name in names))


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments; `words` are those that an engine's process is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--cases", default=";".join(QUANTIZATIONS), help="quantizations, separated by semicolons")
    parser.add_argument("--seconds", type=float, default=1800.0, help="for all engines together")
    parser.add_argument("--log", help="file for everything that the engines print")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    own = parser.add_argument_group("engine")
    own.add_argument("--batches", type=_ints, default=[1, 16, 64, 256])
    for name, default in (("layers", 32), ("prompt", PROMPT), ("output", OUTPUT), ("long-prompt", LONG_PROMPT)):
        own.add_argument(f"--{name}", type=int, default=default)
    own.add_argument("--repetitions", type=int, default=2)
    own.add_argument("--tp", type=int, default=1)
    own.add_argument("--mode", choices=("none", "compile"), default="none", help="vLLM's compilation mode")
    own.add_argument("--profile", action="store_true", help="GPU time of a decode step by kernel, at the end")
    own.add_argument("--attention", default="", help="vLLM's attention backend, e.g. FLASH_ATTN")
    args = parser.parse_args(argv)
    names = ("layers", "prompt", "output", "long_prompt", "repetitions", "tp", "mode", "attention")
    args.words = [f"--batches={','.join(map(str, args.batches))}"]
    args.words += [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    args.words += ["--profile"] if args.profile else []
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0 when every engine gave all of its rows, else 1."""
    args = parse(argv)
    if args.case:
        run_case(args)
        return 0
    from benchmarks import machine

    facts = machine.facts()
    settings = {"group_size": GROUP_SIZE, "repetitions": args.repetitions}
    new: dict[str, Any] = {**facts, "kernel_hash": records.kernel_hash(), "settings": settings}
    new |= {"profiles": [], "rows": []}
    name = f"serving-{machine.slug(facts['gpu'])}.json"
    folders = [records.RECORDS, *(pathlib.Path(folder) for folder in [os.environ.get("OUT")] if folder)]
    old, cases = records.read(records.RECORDS / name), args.cases.split(";")
    for kind, found in engines.measure_all(cases, args):
        new["rows" if kind == "ROW" else "profiles"].append(found)
        if kind == "ROW":
            print(f"{kind} {json.dumps(found)}", flush=True)
        for folder in folders:
            records.write(folder / name, merge(old, new))
    print(serving_tables.render(new))
    return 0 if len(new["rows"]) == len(cases) * len(points(args)) else 1


if __name__ == "__main__":
    sys.exit(main())
