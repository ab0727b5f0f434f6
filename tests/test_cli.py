"""The commands, on tiny random models with a tokenizer built here: output, files, exit codes. No network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

from marlin.cli import app, common

SOURCE = Path(__file__).parents[1] / "src"
WORDS = ["the", "of", "a", "light", "surface", "is", "reflects", "snow", "charcoal", "bright", "dark", "share", "sun"]
TEXT = " ".join(WORDS[(i * i + i // 3) % len(WORDS)] for i in range(1600))
COMMANDS = ["compress", "generate", "eval", "inspect", "kernels", "bench", "doctor", "demo"]


def _text(output: str) -> str:
    """Output without line breaks and styling, since consoles wrap."""
    return " ".join(output.split())


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("FORCE_COLOR", "MARLIN_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MARLIN_DEMO_DATA", str(tmp_path / "no-demo-data"))
    yield
    common.set_debug(False)


def run(*arguments: str | Path, code: int = 0, text: str | None = None) -> Any:
    """Invoke the app; the exit code must be `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def error_of(*arguments: str | Path) -> str:
    """The one line that a refused command prints; nothing else is on stdout."""
    result = run(*arguments, code=2)
    assert "Traceback" not in result.stderr and result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "user", "assistant", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"
    return fast


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64, max_position_embeddings=128, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compressed(dense: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("out") / "sparse"
    result = run(
        "compress", dense, folder, "-c", text_file, "--samples", "4", "--length", "64", "-g", "32", "--device", "cpu",
        "--json",
    )  # fmt: skip
    return folder, json.loads(result.stdout)


# Help, version, start-up


@pytest.mark.parametrize(
    "command", [[c] for c in COMMANDS] + [["kernels", c] for c in ("list", "build", "emit", "explain")]
)
def test_help_has_examples(command: list[str]) -> None:
    output = run(*command, "--help").stdout
    if command == ["kernels"]:
        assert all(name in output for name in ("list", "build", "emit", "explain"))
    else:
        assert "Examples:" in output and f"marlin {' '.join(command)}" in output


def test_help_lists_every_command() -> None:
    output = run("--help").stdout
    assert all(f" {command} " in output for command in COMMANDS)


def test_version_names_the_distribution() -> None:
    assert run("--version").stdout.startswith("sparse-marlin ")


def test_command_modules_import_neither_torch_nor_transformers() -> None:
    probe = (
        "import sys, types; package = types.ModuleType('marlin'); "
        f"package.__path__ = [{str(SOURCE / 'marlin')!r}]; sys.modules['marlin'] = package; "
        "import marlin.cli; print(sorted({'torch', 'transformers', 'numpy', 'cuda'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr


# Compress, inspect, eval, generate


def test_compress_writes_a_directory_and_says_what_it_holds(compressed: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = compressed
    assert summary["layers"] == {"w4a16_sp24": 14} and summary["recipe"] == "sp24-int4"
    assert summary["bits_per_weight"] == pytest.approx(3.5) and 0 < summary["worst_relative_error"] < 1
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "compression_report.json", "README.md"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sparse_marlin"


def test_compress_takes_a_recipe_file_and_replaces_an_earlier_result(
    dense: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.json"
    rules = [{"pattern": "*.down_proj", "kind": "w4a16_dense", "group_size": 64, "method": "rtn"}]
    default = {"kind": "w4a16_sp24", "group_size": 32, "method": "magnitude"}
    recipe.write_text(json.dumps({"version": 1, "rules": rules, "default": default}))
    arguments = ("compress", dense, tmp_path / "o", "-r", recipe, "-c", text_file, "--samples", "1", "--length", "32")
    for _ in range(2):
        output = _text(run(*arguments, "--device", "cpu").stdout)
        assert output.startswith(f"wrote {tmp_path / 'o'}: 2 w4a16_dense, 12 w4a16_sp24; ")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("o")] == ["o"]


def test_compress_continues_from_its_resume_folder(dense: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ["compress", dense, "-c", text_file, "--samples", "2", "--length", "32", "-g", "32", "--device", "cpu"]
    run(*arguments[:2], tmp_path / "a", *arguments[2:], "--resume-dir", tmp_path / "r")
    assert len(list((tmp_path / "r").glob("block_*.safetensors"))) == 2
    run(*arguments[:2], tmp_path / "b", *arguments[2:], "--resume-dir", tmp_path / "r")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    line = error_of(
        *arguments[:2], tmp_path / "c", *arguments[2:], "--seed", "1", "--json", "--resume-dir", tmp_path / "r"
    )
    assert line.startswith("error: resume: the folder must belong to the same run; got another calibration, options")


def test_inspect_shows_layers_bytes_bits_zeros_and_kernels(compressed: tuple[Path, dict[str, Any]]) -> None:
    report = json.loads(run("inspect", compressed[0], "--gpu", "a100", "-m", "16", "--json").stdout)
    assert len(report["layers"]) == 14 and report["gpu"] == "NVIDIA A100 80GB SXM"
    row = next(layer for layer in report["layers"] if layer["name"] == "model.layers.1.mlp.down_proj")
    assert (row["n"], row["k"], row["kind"], row["group_size"]) == (64, 128, "w4a16_sp24", 32)
    assert 0.5 <= row["zero_fraction"] < 0.7 and row["bits_per_weight"] == pytest.approx(3.5)
    assert row["kernel"].startswith("sm80_w4a16_sp24_fp16_g32_")
    assert report["total_bytes"] == report["quantized_bytes"] + report["unquantized_bytes"]
    table = run("inspect", compressed[0], "--gpu", "a100").stdout
    assert "model.layers.0.self_attn.q_proj" in table and "14 compressed layers (14 w4a16_sp24)" in table


def test_eval_of_a_compressed_directory_matches_the_fake_quantized_model(
    dense: Path, compressed: tuple[Path, dict[str, Any]], text_file: Path
) -> None:
    arguments = ("--text", text_file, "--window", "64", "--limit", "4", "--device", "cpu")
    result = json.loads(run("eval", compressed[0], *arguments, "--json").stdout)
    assert result["windows"] == 4 and result["path"] == "CPU reference, float32: w4a16_sp24"
    reference = json.loads(run("eval", dense, *arguments, "--json").stdout)
    assert reference["path"] == "torch, dense"
    assert result["perplexity"] != reference["perplexity"]
    assert 0.5 < result["perplexity"] / reference["perplexity"] < 2
    line = _text(run("eval", dense, *arguments).stdout)
    assert line == f"perplexity {reference['perplexity']:.3f} on {text_file}: 4 windows of 64 tokens, float32"


def test_generate_streams_what_json_reports(compressed: tuple[Path, dict[str, Any]]) -> None:
    arguments = ("generate", compressed[0], "the light of snow", "-n", "6", "--device", "cpu")
    report = json.loads(run(*arguments, "--json").stdout)
    assert report["chat"] is True and report["prompt_tokens"] == 6 and 1 <= report["new_tokens"] <= 6
    streamed = run(*arguments)
    assert streamed.stdout == report["text"] + "\n"
    assert "path: CPU reference, float32: w4a16_sp24" in streamed.stderr
    assert f"6 prompt tokens, {report['new_tokens']} new tokens" in streamed.stderr


def test_generate_reads_stdin_and_can_leave_out_the_chat_template(compressed: tuple[Path, dict[str, Any]]) -> None:
    arguments = ("generate", compressed[0], "-", "--no-chat", "-n", "2", "--device", "cpu", "--json")
    report = json.loads(run(*arguments, text="the light of snow").stdout)
    assert report["chat"] is False and report["prompt_tokens"] == 4


def test_generate_samples_alike_for_one_seed(compressed: tuple[Path, dict[str, Any]]) -> None:
    def sample(seed: int) -> str:
        arguments = (
            "generate",
            compressed[0],
            "snow",
            "-n",
            "12",
            "-t",
            "5",
            "--seed",
            seed,
            "--device",
            "cpu",
            "--json",
        )
        return json.loads(run(*map(str, arguments)).stdout)["text"]

    assert sample(1) == sample(1) != sample(2)


def test_streamer_holds_back_half_a_character() -> None:
    from marlin.demo.models import Streamer

    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    written: list[str] = []
    streamer = Streamer(Bytes(), written.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for byte in "aé".encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert written == ["a", "é"] and streamer.text == "aé" and streamer.tokens_per_second is not None


# Errors: one line, exit code 2


def test_errors_are_one_line_with_what_to_do(dense: Path, text_file: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert error_of("eval", nowhere, "--text", text_file) == (
        f"error: marlin: the model must be a directory with config.json; got {str(nowhere)!r}, not a directory. "
        "Give the directory that save_pretrained wrote."
    )
    assert error_of("eval", dense) == (
        "error: eval: there must be a text to evaluate on; got no --text and no demo text. "
        "Pass --text FILE, or run `marlin demo` once, which prepares a held-out text."
    )
    assert error_of("eval", dense, "--text", nowhere) == f"error: {nowhere}: No such file or directory"
    assert error_of("compress", dense, tmp_path / "o", "-c", text_file, "-r", "nonsense").startswith(
        "error: compress: --recipe must be one of sp24-int4, int4, "
    )
    assert error_of("compress", dense, tmp_path / "o", "-c", text_file, "-r", "sp24") == (
        "error: compress: the recipe must have a kind that is saved packed (w4a16_sp24 or w4a16_dense); got sp24. "
        "Use --recipe sp24-int4."
    )
    assert error_of("compress", dense, tmp_path / "o") == (
        "error: compress: there must be a text to calibrate on; got no --calibration and no demo text. "
        "Pass --calibration FILE, or run `marlin demo` once, which prepares one."
    )
    assert error_of("compress", dense, dense, "-c", text_file).startswith(f"error: save {dense}: ")
    assert error_of("inspect", dense).startswith(
        f"error: {dense / 'config.json'}: the model must be compressed (key quantization_config); got no such key."
    )
    assert not (tmp_path / "o").exists()


def test_errors_name_the_device_and_dtype_that_cannot_be(dense: Path, text_file: Path) -> None:
    assert error_of("eval", dense, "--text", text_file, "--device", "tpu") == (
        "error: --device: must be auto, cpu, cuda or cuda:N; got 'tpu'."
    )
    assert error_of("eval", dense, "--text", text_file, "--device", "cpu", "--dtype", "int8") == (
        "error: --dtype: must be auto or one of float16, bfloat16, float32; got 'int8'."
    )
    if not torch.cuda.is_available():
        assert error_of("eval", dense, "--text", text_file, "--device", "cuda") == (
            "error: --device: the GPU must be there; got 'cuda', not found by torch. "
            "Run `marlin doctor`, or use --device cpu."
        )


def test_errors_of_a_damaged_checkpoint_name_the_file(compressed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in compressed[0].iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in (("inspect", damaged), ("generate", damaged, "snow", "--device", "cpu")):
        assert str(weights) in error_of(*command)


def test_debug_keeps_the_traceback(dense: Path) -> None:
    result = CliRunner().invoke(app, ["--debug", "eval", str(dense)])
    assert isinstance(result.exception, ValueError) and result.exit_code == 1


# Kernels, doctor, bench


def test_kernels_list_and_its_filter() -> None:
    rows = json.loads(run("kernels", "list", "--json").stdout)
    assert {"sm80_w4a16_sp24", "sm80_w4a16_dense"} <= {row["name"] for row in rows}
    assert len({row["entry"] for row in rows}) == len(rows)
    some = json.loads(run("kernels", "list", "--only", "sp24_fp16_g128", "--json").stdout)
    assert 0 < len(some) < len(rows) and all("sp24_fp16_g128" in row["entry"] for row in some)
    assert error_of("kernels", "list", "--only", "nothing") == (
        "error: kernels: --only must be part of an entry's name; got 'nothing'. See marlin kernels list."
    )


def test_kernels_emit_writes_one_file_that_includes_nothing_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cu"
    run("kernels", "emit", "sm80_w4a16_sp24", "-o", path)
    text = path.read_text()
    assert 'extern "C"' in text and '#include "' not in text
    assert run("kernels", "emit", "sm80_w4a16_sp24").stdout.strip() == text.strip()
    assert [entry.name for entry in tmp_path.iterdir()] == ["kernel.cu"]
    assert error_of("kernels", "emit", "nope").startswith("error: kernels emit: NAME must be one of ")


@pytest.mark.parametrize("on", [False, True])
def test_kernels_explain_says_when_batch_invariant_mode_is_on(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setattr("marlin.settings._batch_invariant", on)
    output = run("kernels", "explain", "300", "4096", "4096", "--gpu", "h100", "--all").output
    assert ("batch-invariant mode (MARLIN_BATCH_INVARIANT=1)" in output) is on
    assert ("adds along K in another order" in " ".join(output.split())) is on


def test_kernels_explain_marks_the_cheapest_as_chosen() -> None:
    arguments = ("kernels", "explain", "16", "4096", "4096", "--gpu", "h100")
    report = json.loads(run(*arguments, "--json").stdout)
    chosen = [row for row in report["candidates"] if row["chosen"]]
    estimates = [row["estimate_us"] for row in report["candidates"] if row["estimate_us"] is not None]
    assert len(chosen) == 1 and chosen[0]["estimate_us"] == min(estimates)
    assert chosen[0]["config"] in report["entry"] and chosen[0]["kernel"] == report["kernel"]
    assert report["estimate_us"] == chosen[0]["estimate_us"] >= report["floor_us"] > 0
    text = run(*arguments).stdout
    assert report["entry"] in text and f"{len(report['candidates']) - 6} more with --all" in text
    assert text.count("times\n") + text.count("chosen") == 6
    every = run(*arguments, "--all").stdout
    assert all(row["config"] in every for row in report["candidates"]) and "more with --all" not in every
    assert error_of("kernels", "explain", "16", "4100", "4096", "--gpu", "h100") == (
        "error: w4a16_sp24: N must be a positive multiple of 8; got N=4100. Pad the rows."
    )
    assert error_of("kernels", "explain", "1", "8", "32", "--gpu", "abacus") == (
        "error: marlin: --gpu must be one of h100, a100, rtx4090, rtx3090; got 'abacus'."
    )


def test_kernels_build_reports_rows_and_fails_on_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    from marlin.runtime import build

    def fake(variants: Any, archs: list[str], jobs: int | None, progress: Any) -> list[build.BuildRow]:
        assert archs == ["80", "90a"] and jobs is None
        spills = [0, 4]
        rows = [
            build.BuildRow(v.name, v.entry, a, 96, spill, 0, v.smem_bytes, v.threads, 10, 0.5, stored=True)
            for v, (a, spill) in zip(list(variants)[:2], zip(archs, spills, strict=True), strict=True)
        ]
        for row in rows:
            progress(row)
        return rows

    monkeypatch.setattr(build, "build_all", fake)
    result = run("kernels", "build", "--arch", "sm_80,9.0a", code=1)
    assert "cached" in result.stdout and "spills 4 bytes" in result.stdout
    assert "kernels have problems" in result.stderr
    rows = json.loads(run("kernels", "build", "--arch", "80,90a", "--json", code=1).stdout)
    assert [row["problems"] for row in rows] == [[], ["spills 4 bytes"]]


def test_doctor_passes_where_only_a_gpu_is_missing_and_fails_on_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from marlin.runtime import diagnose, driver

    checks = [diagnose.Check("python", True, "3"), diagnose.Check("driver", False, "none", "Install it.", "gpu")]
    monkeypatch.setattr(diagnose, "diagnose", lambda: checks)
    monkeypatch.setattr(driver, "driver_version", lambda: None)
    rows = json.loads(run("doctor", "--json").stdout)
    assert [row["ok"] for row in rows[:2]] == [True, None]
    tests = [row for row in rows if row["name"].startswith("self-test")]
    assert len(tests) >= 4 and all(row["ok"] for row in tests)
    monkeypatch.setattr(driver, "driver_version", lambda: (12, 0))
    result = run("doctor", code=1)
    assert "FAIL driver none" in _text(result.stdout) and "Install it." in result.stdout


def test_doctor_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from marlin.cli import doctor
    from marlin.testing import oracle

    honest = oracle.dequantize
    monkeypatch.setattr(oracle, "dequantize", lambda *arguments: honest(*arguments) * 1.02)
    rows = list(doctor.self_test(torch.device("cpu")))
    assert all(row.ok is False and "outside the bound" in row.detail for row in rows)


def test_bench_needs_a_checkout_and_passes_arguments_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from marlin.cli import bench

    monkeypatch.setattr(bench, "checkout", lambda: None)
    assert error_of("bench", "gemm") == (
        "error: bench: the benchmarks live in a source checkout; got none here. Clone the repository and run it there."
    )
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "gemm.py").write_text("def main(argv):\n    print('ran', argv)\n    return 3\n")
    (package / "decode.py").write_text(
        "import argparse\ndef main(argv):\n    argparse.ArgumentParser().parse_args(argv)\n"
    )
    monkeypatch.setattr(bench, "checkout", lambda: tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    assert "ran ['--quick', '--shapes', 'block']" in run("bench", "gemm", "--quick", "--shapes", "block", code=3).stdout
    assert "show this help message" in run("bench", "decode", "--help").stdout
    run("bench", "decode", "--nope", code=2)
    assert error_of("bench", "tiles").startswith("error: bench: benchmarks must be importable; got no benchmarks.tiles")


def test_bench_offers_what_the_checkout_has() -> None:
    from marlin.cli import bench

    root = bench.checkout()
    assert root is not None
    assert all((root / "benchmarks" / f"{module}.py").is_file() for module, _ in bench.BENCHMARKS.values())
    text = run("bench", "--help").stdout
    assert all(name in text for name in bench.BENCHMARKS) and "marlin bench gemm --quick" in text


@pytest.mark.parametrize("arguments", [["--help"], ["kernels", "explain", "16", "4096", "4096", "--gpu", "h100"]])
def test_command_that_needs_no_torch_does_not_wait_for_it(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['marlin', *{arguments!r}]\n"
        "from marlin.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'a heavy import'"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_module_form_of_the_command_runs() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "marlin.cli", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0 and result.stdout.startswith("sparse-marlin ")


@pytest.mark.gpu
def test_commands_run_the_kernel_on_a_gpu(compressed: tuple[Path, dict[str, Any]], text_file: Path) -> None:
    arguments = ("eval", compressed[0], "--text", text_file, "--window", "64", "--limit", "4", "--json")
    on_cpu, on_gpu = (json.loads(run(*arguments, "--device", name).stdout) for name in ("cpu", "cuda"))
    assert on_gpu["path"].startswith("GPU kernel: sm") and on_gpu["dtype"] == "float16"
    assert on_gpu["perplexity"] == pytest.approx(on_cpu["perplexity"], rel=0.02)
    report = json.loads(run("generate", compressed[0], "snow", "-n", "4", "--device", "cuda", "--json").stdout)
    assert report["path"] == on_gpu["path"] and report["new_tokens"] >= 1
    rows = json.loads(run("doctor", "--json").stdout)
    assert all(row["ok"] is not False for row in rows)
    assert sum(row["name"].startswith("self-test") for row in rows) >= 8


@pytest.mark.gpu
def test_compress_on_a_gpu_writes_a_directory_that_generates(dense: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("-c", text_file, "--samples", "4", "--length", "64", "-g", "32", "--device", "cuda")
    run("compress", dense, tmp_path / "o", *arguments)
    assert "GPU kernel" in run("generate", tmp_path / "o", "snow", "-n", "4", "--device", "cuda").stderr
