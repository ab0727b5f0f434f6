"""vLLM itself on a GPU: compressed directories of every kind give the tokens that transformers gives, and are served.

The models are small Llamas with random weights. A token counts as right where transformers' logit of it, on the same
prefix, is the largest up to rounding; how many are the largest outright is asserted as well.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_published_packers import pack_gptq_marlin_24, pack_marlin_24, pack_pack_quantized
from torch import Tensor

from benchmarks.engines import case_environment, write_entry_points
from marlin.formats import CompressedWeight, DenseInt4Weight, Weight, group_scales, quantize, top2_mask
from marlin.formats.checkpoint import LayerSpec, describe
from marlin.formats.layouts import pack
from marlin.formats.published import describe_pack_quantized

# Why not importorskip: only the processes that are started need vLLM, and importing it takes seconds.
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")]

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 3, 512, 1024, 4, 2, 258
TOKENS = 24
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 128,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_SHAPES = {
    "self_attn.q_proj": (HEADS * 128, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * 128, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * 128, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * 128),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def random_linear(n: int, k: int, kind: str, group_size: int) -> Weight | Tensor:
    dense = torch.randn(n, k) / k**0.5
    if kind == "weight":
        return dense
    mask = top2_mask(dense.abs()) if kind == "w4a16_sp24" else None
    scales = group_scales(dense, group_size, mask).to(torch.float16)
    codes = quantize(dense, scales)
    if mask is None:
        return DenseInt4Weight(codes, scales, group_size)
    return CompressedWeight.from_codes(codes, mask, scales, group_size)


def mixed(name: str) -> tuple[str, int]:
    """Kinds that differ within merged layers."""
    leaf = name.rpartition(".")[2]
    table = {"k_proj": ("w4a16_dense", 128), "v_proj": ("weight", 128), "up_proj": ("w4a16_sp24", 64)}
    return table.get(leaf, ("w4a16_sp24", 128))


class Model:
    """Weights of one model, and its directories in several formats."""

    def __init__(self, kinds: Any, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.linears: dict[str, Weight | Tensor] = {}
        for index in range(LAYERS):
            for name, shape in _SHAPES.items():
                self.linears[f"model.layers.{index}.{name}"] = random_linear(*shape, *kinds(name))
        names = [f"model.layers.{i}.{leaf}" for i in range(LAYERS) for leaf in _NORMS] + ["model.norm"]
        self.others = {f"{name}.weight": torch.ones(HIDDEN, dtype=dtype) for name in names}
        self.others["model.embed_tokens.weight"] = torch.randn(VOCABULARY, HIDDEN).to(dtype)
        self.others["lm_head.weight"] = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5 * 4).to(dtype)

    def write(self, directory: pathlib.Path, pack_one: Any, quantization: dict[str, Any]) -> pathlib.Path:
        tensors = dict(self.others)
        for name, linear in self.linears.items():
            own = {"weight": linear.to(self.dtype)} if isinstance(linear, Tensor) else pack_one(linear)
            tensors |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in own.items()}
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        dtype = str(self.dtype).removeprefix("torch.")
        config = {**_CONFIG, "dtype": dtype, "quantization_config": quantization}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    def ours(self, directory: pathlib.Path) -> pathlib.Path:
        quantized = {name: linear for name, linear in self.linears.items() if not isinstance(linear, Tensor)}
        specs = {name: LayerSpec(w.kind, w.group_size, w.n, w.k) for name, w in quantized.items()}

        def tensors(weight: Weight) -> dict[str, Tensor]:
            packed = pack(weight, self.dtype)
            found = {"codes": packed.codes, "meta": packed.meta, "scales": packed.scales}
            return {leaf: tensor for leaf, tensor in found.items() if tensor is not None}

        return self.write(directory, tensors, describe(specs))


_NORMS = ("input_layernorm", "post_attention_layernorm")


def _ct_marlin_24() -> dict[str, Any]:
    described = describe_pack_quantized({"all": 128}, ["lm_head"])
    described["config_groups"]["group_0"]["format"] = described["format"] = "marlin-24"
    return described


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "checkpoint_format": "marlin_24"}
_ENGINE = {
    "max_model_len": 512,
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "compilation_config": {"mode": 0, "cudagraph_capture_sizes": [1, 2, 4, 8], "cudagraph_mode": "FULL_DECODE_ONLY"},
}
_COMPILED = {"mode": 3, "cudagraph_capture_sizes": [1, 2, 4, 8], "cudagraph_mode": "FULL_AND_PIECEWISE"}
# name: (which model, engine arguments, method that the decoder's linears must run)
JOBS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ours": ("sparse", {}, "SparseMarlinLinearMethod"),
    "mixed-bfloat16": ("mixed", {}, "SparseMarlinLinearMethod"),
    "marlin-24": ("sparse", {}, "SparseMarlinLinearMethod"),
    "gptq-marlin-24": ("sparse", {}, "SparseMarlinLinearMethod"),
    "pack-quantized-sparse": ("sparse", {}, "SparseMarlinLinearKernel"),
    "pack-quantized-dense": ("dense", {}, "MacheteLinearKernel"),
    "ours-compiled": ("sparse", {"compilation_config": _COMPILED}, "SparseMarlinLinearMethod"),
    "mixed-invariant": ("mixed", {}, "SparseMarlinLinearMethod"),
    "ours-tp2": ("sparse", {"tensor_parallel_size": 2}, "SparseMarlinLinearMethod"),
}
_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    sparse = Model(lambda _: ("w4a16_sp24", 128), torch.float16)
    dense = Model(lambda _: ("w4a16_dense", 128), torch.float16)
    plain = describe_pack_quantized(dict.fromkeys(sparse.linears, 128), ["lm_head"])
    return {
        "sparse": (ours := sparse.ours(root / "sparse")),
        "ours": ours,
        "ours-compiled": ours,
        "ours-tp2": ours,
        "mixed": (mixture := Model(mixed, torch.bfloat16).ours(root / "mixed")),
        "mixed-bfloat16": mixture,
        "mixed-invariant": mixture,
        "dense": dense.ours(root / "dense"),
        "marlin-24": sparse.write(root / "ct", pack_marlin_24, _ct_marlin_24()),
        "gptq-marlin-24": sparse.write(root / "gptq", pack_gptq_marlin_24, _GPTQ),
        "pack-quantized-sparse": sparse.write(root / "plain-sparse", pack_pack_quantized, plain),
        "pack-quantized-dense": dense.write(root / "plain-dense", pack_pack_quantized, plain),
    }


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in (5, 17, 64, 130)]


def _environment(root: pathlib.Path) -> dict[str, str]:
    write_entry_points(root)
    return case_environment("sparse_marlin", str(root), 1)


@pytest.fixture(scope="module")
def results(
    directories: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """What vLLM gave for every job whose tests are selected, each in a process of its own."""
    root = tmp_path_factory.mktemp("jobs")
    chosen = {getattr(item, "callspec", None) and item.callspec.params.get("name") for item in request.session.items}
    chosen -= {"ours-tp2"} if torch.cuda.device_count() < 2 else set()
    environment = _environment(root / "site")
    jobs = {}
    for name, (model, engine, _) in JOBS.items():
        dtype = "bfloat16" if model == "mixed" else "float16"
        job = {"name": name, "model": str(directories[name]), "prompts": _prompts(), "tokens": TOKENS}
        jobs[name] = {**job, "engine": {**_ENGINE, "dtype": dtype, **engine}}
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        runs = {name: pool.submit(_run_job, jobs[name], root, environment) for name in JOBS if name in chosen}
    return {name: run.result() for name, run in runs.items()}


def _run_job(job: dict[str, Any], root: pathlib.Path, environment: dict[str, str]) -> dict[str, Any]:
    """{tokens, methods} or {error}, after at most 100 seconds."""
    own = root / job["name"]
    own.mkdir()
    if job["name"].endswith("-invariant"):
        environment = {**environment, "VLLM_BATCH_INVARIANT": "1"}
    (own / "job.json").write_text(json.dumps(job))
    words = [sys.executable, str(pathlib.Path(__file__).with_name("vllm_child.py")), "job.json", "result.json"]
    with (own / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=own, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(100)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if (own / "result.json").exists():
        result: dict[str, Any] = json.loads((own / "result.json").read_text())
        return result
    return {"error": f"ended with status {process.returncode}; log ends:\n{(own / 'log').read_text()[-5000:]}"}


def _logits(directory: pathlib.Path, sequences: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    """transformers' logits for every position of each sequence."""
    from transformers import AutoModelForCausalLM

    import marlin  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to("cuda").eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids], device="cuda")).logits[0].float() for ids in sequences]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[_TWO_GPUS] if name.endswith("-tp2") else []) for name in JOBS]
)
def test_vllm_gives_the_tokens_of_transformers(
    name: str, results: dict[str, dict[str, Any]], directories: dict[str, pathlib.Path]
):
    result, (model, _, method) = results[name], JOBS[name]
    assert "error" not in result, result["error"]
    assert result["methods"].get(method) == 4 * LAYERS, result["methods"]
    # Two norms and an activation a layer, and the last norm.
    assert result["methods"]["row-wise"] == (3 * LAYERS + 1 if "Marlin" in method else 0), result["methods"]
    dtype = torch.bfloat16 if model == "mixed" else torch.float16
    sequences = [ids + tokens for ids, tokens in zip(_prompts(), result["tokens"], strict=True)]
    largest = total = 0
    # Rounding of a few layers in this dtype, in units of the logits' spread.
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    for ids, logits, tokens in zip(
        _prompts(), _logits(directories[model], sequences, dtype), result["tokens"], strict=True
    ):
        assert len(tokens) == TOKENS
        rows = logits[len(ids) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0]
        gap = (rows.amax(1) - chosen) / rows.std(1)
        assert float(gap.max()) <= tolerance, f"{name}: a token is {float(gap.max()):.4f} spreads below the largest"
        largest += int((gap == 0).sum())
        total += len(tokens)
    assert largest >= 0.95 * total, f"{name}: {largest} of {total} tokens are the largest"


@pytest.mark.parametrize("name", ["mixed-invariant"])
def test_batch_invariant_mode_gives_a_prompt_alone_what_it_gets_in_a_batch(
    name: str, results: dict[str, dict[str, Any]]
):
    result = results[name]
    assert "error" not in result, result["error"]
    assert result["tokens"] == result["alone"]["tokens"]
    assert result["logprobs"] == result["alone"]["logprobs"]


def _tokenizer(directory: pathlib.Path) -> None:
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{character: i + 2 for i, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))


@pytest.fixture(scope="module")
def server(directories: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `vllm serve` on the compressed directory."""
    directory, root = directories["sparse"], tmp_path_factory.mktemp("server")
    _tokenizer(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory), "--host=127.0.0.1"]
    words += [f"--port={port}", "--max-model-len=512", "--gpu-memory-utilization=0.05", "--enforce-eager"]
    words += [f"--kv-cache-memory-bytes={256 << 20}", "--served-model-name=small"]
    environment = _environment(root / "site")
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    address = f"http://127.0.0.1:{port}"
    with (root / "log").open("w") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                alive = process.poll() is None and time.monotonic() < end
                assert alive, f"vllm serve did not come up; log ends:\n{(root / 'log').read_text()[-6000:]}"
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _complete(address: str, prompt: str, stream: bool) -> str:
    body = {"model": "small", "prompt": prompt, "max_tokens": 16, "temperature": 0, "stream": stream}
    body |= {"ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        if not stream:
            return json.loads(response.read())["choices"][0]["text"]
        text = ""
        for line in response:
            if line.startswith(b"data: ") and b"[DONE]" not in line:
                text += json.loads(line[6:])["choices"][0]["text"]
        return text


def test_server_streams_to_several_clients_what_it_answers_to_one(server: str):
    prompts = [f"Prompt number {index}" for index in range(6)]
    alone = [_complete(server, prompt, stream=False) for prompt in prompts]
    assert len(set(alone)) > 1 and all(alone)
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: _complete(server, prompt, stream=True), prompts))
    # Near-ties may fall otherwise in a batch.
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= len(prompts) - 1
