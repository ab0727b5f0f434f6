"""The second model of the quality benchmark: fetched in parts, joined, converted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quality_data
from marlin.demo import data
from tests.test_demo import _member, _text_source, _wheel


def _parts(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []
    for index, content in enumerate((b"one ", b"two ", b"three ", b"four")):
        _wheel(wheels, f"part{index}", {"p": content})
        sources.append(data.Source(f"part{index}", "1.0", None, (_member("p", f"model.gguf.part{index}", content),)))
    monkeypatch.setattr(quality_data, "_source", lambda index: sources[index])


def test_the_second_model_is_joined_and_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path / "cache" / "demo"))
    _text_source(tmp_path / "wheels", monkeypatch)
    _parts(tmp_path / "wheels", monkeypatch)
    seen = []

    def convert(gguf: Path, directory: Path) -> None:
        seen.append(gguf.read_bytes())
        if len(seen) == 1:
            raise OSError("disk full")
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr("marlin.demo.convert.convert_gguf", convert)
    with pytest.raises(OSError, match="disk full"):
        quality_data.prepare(quality_data.GEMMA)
    folder = quality_data.prepare(quality_data.GEMMA)
    assert folder == tmp_path / "cache" / "gemma-3-270m" and seen == [b"one two three four"] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["model", "text"]
    texts = sorted(path.name.partition("-")[0] for path in (folder / "text").iterdir())
    assert texts == ["calibration", "news", "wiki"]
    monkeypatch.setattr(data, "fetch", lambda *_: pytest.fail("nothing must be fetched"))
    assert quality_data.prepare(quality_data.GEMMA) == folder and len(seen) == 2


def test_the_parts_are_those_of_one_file() -> None:
    sources = [quality_data._source(index) for index in range(4)]
    assert [source.members[0].name for source in sources] == [f"model.gguf.part{index}" for index in range(4)]
    assert sum(source.members[0].num_bytes for source in sources) == 253113024
    assert len({source.sha256 for source in sources} | {source.members[0].sha256 for source in sources}) == 8


def test_unknown_names_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError) as caught:
        quality_data.prepare("Gemma-4")
    need = "--name must be of SmolLM2-135M, Gemma-3-270M"
    fix = "Give the folder of another model with --data."
    assert str(caught.value) == f"benchmarks.quality: {need}; got Gemma-4. {fix}"
