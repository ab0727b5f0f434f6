"""Writing a directory so that it is there whole or not at all.

Owns: the temporary name, the exchange by rename, and the rule for what may be replaced. Knows nothing of its content.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from marlin.errors import message


def _make_beside(target: Path, label: str) -> Path:
    """A new directory `<target>.<label>-<pid>` on the file system of target."""
    for attempt in itertools.count():
        suffix = f".{label}-{os.getpid()}" + (f"-{attempt}" if attempt else "")
        beside = target.with_name(target.name + suffix)
        try:
            beside.mkdir()
        except FileExistsError:
            continue
        return beside
    raise AssertionError("unreachable")


def _sync(directory: Path) -> None:
    """Hand files and directories to the disk, so that a crash after the rename leaves no empty file."""
    for path in [*directory.rglob("*"), directory, directory.parent]:
        if path.is_symlink():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_replaceable(target: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Whether target may be written: absent, empty, one of ours, or any directory under overwrite.

    Raises: FileExistsError, NotADirectoryError.
    """
    op = f"save {target}"
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise NotADirectoryError(message(op, "the target must be a directory", "a file", "Choose another path."))
    if overwrite or is_ours(target) or next(target.iterdir(), None) is None:
        return
    raise FileExistsError(
        message(
            op,
            "an existing directory must be empty or a previous save",
            f"other content ({len(list(target.iterdir()))} entries)",
            "Choose another path, or pass overwrite=True to replace it with everything in it.",
        )
    )


@contextmanager
def replace_directory(
    target: Path | str, *, overwrite: bool = False, is_ours: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """A temporary directory that becomes target when the block ends well, and vanishes when it does not.

    The temporary directory lies beside target, `<target>.tmp-<pid>`. An existing target stays untouched until the
    new one is complete, then goes. is_ours: says whether an existing directory is a previous save.
    Raises: FileExistsError, NotADirectoryError (see `check_replaceable`), OSError (the disk's).
    """
    target = Path(target).resolve()
    check_replaceable(target, overwrite, is_ours)
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _make_beside(target, "tmp")
    try:
        yield temporary
        _sync(temporary)
        _exchange(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and next(parent.iterdir(), None) is None:
                parent.rmdir()
        raise


def _exchange(temporary: Path, target: Path) -> None:
    """Rename temporary to target; a target that is there comes back if that fails, and goes if it succeeds."""
    if not target.exists():
        os.rename(temporary, target)
        return
    old = _make_beside(target, "old")
    os.rename(target, old)  # Invariant: old is empty, so rename replaces it.
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
