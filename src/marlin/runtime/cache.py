"""Compiled kernels on disk and in memory, shared safely by threads and processes.

Owns the directory, the form of an entry and the key, which covers everything that decides the machine code. A cache
that cannot be used never stops a kernel from running: it warns once and compiles. Knows nothing of GPUs.

An entry is `<key>.cubin`: magic, length of the image (uint64, little-endian), sha256 of key and image, image. It is
written aside and renamed, so a reader sees all of it or none; what the header does not vouch for is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from marlin.errors import message
from marlin.runtime import compiler

FORMAT_VERSION = 1
LOCK_TIMEOUT_S = 120.0
_MAGIC = b"MARLIN\x00" + bytes([FORMAT_VERSION])
_HEADER = struct.Struct("<8sQ32s")
_OWN_FILE = re.compile(r"[0-9a-f]{64}\.(?:cubin|lock)|\.[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
_ELSEWHERE = "Set MARLIN_CACHE_DIR to a directory of your own."

_memo: dict[str, bytes] = {}
_key_locks: dict[str, threading.Lock] = {}
_warned: set[str] = set()


@dataclass(frozen=True)
class CacheInfo:
    """What `marlin kernels` and `marlin doctor` show. problem: why nothing is kept on disk, None when all is well."""

    directory: str | None
    problem: str | None
    entries: int
    bytes: int


def directory() -> Path | None:
    """Where entries go: MARLIN_CACHE_DIR, else XDG_CACHE_HOME/sparse-marlin, else ~/.cache/sparse-marlin.

    None when there is no home directory. Touches nothing.
    """
    chosen = os.environ.get("MARLIN_CACHE_DIR")
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG rule: a relative path is ignored
        base = os.path.expanduser("~/.cache")
    return Path(base) / "sparse-marlin" if os.path.isabs(base) else None


def _why_unusable(folder: Path | None) -> str | None:
    """Make the directory if there is none; the reason why it cannot be trusted or used, if any."""
    if folder is None:
        return message("kernel cache", "there must be a home directory", "none", _ELSEWHERE)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.stat(folder)
    except OSError as error:
        return message("kernel cache", f"{folder} must be a directory or possible to make", _reason(error), _ELSEWHERE)
    # Why root may own it: an image built by root may carry a filled cache, and root can change anything anyway.
    if status.st_uid not in (os.geteuid(), 0):
        got = f"owner {status.st_uid}, and this is user {os.geteuid()}"
        return message("kernel cache", f"{folder} must belong to the user who runs this", got, _ELSEWHERE)
    if status.st_mode & stat.S_IWOTH:
        got = f"mode {stat.S_IMODE(status.st_mode):04o}"
        return message(
            "kernel cache",
            f"{folder} must not be writable by everyone",
            got,
            "Remove it; it is made anew, with mode 0700.",
        )
    return None


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _warn_once(topic: str, text: str) -> None:
    if topic not in _warned:
        _warned.add(topic)
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _usable_directory() -> Path | None:
    folder = directory()
    problem = _why_unusable(folder)
    if problem is not None:
        _warn_once(f"unusable {folder}", f"{problem} Until then kernels are compiled anew in every process.")
        return None
    return folder


def entry_key(text: str, *, name: str, arch: str, options: tuple[str, ...] = ()) -> str:
    """Hash of everything that decides the machine code: text, name, flags, compiler, and the form of an entry.

    Raises: UnsupportedError (no NVRTC, so no compiler version).
    """
    parts = (str(FORMAT_VERSION), str(compiler.nvrtc_version()), name, arch, *compiler.flags(arch, options), text)
    digest = hashlib.sha256()
    for part in parts:  # length before content, so that no two lists of parts run together alike
        data = part.encode()
        digest.update(struct.pack("<Q", len(data)) + data)
    return digest.hexdigest()


def _digest(key: str, image: bytes) -> bytes:
    return hashlib.sha256(key.encode() + image).digest()


def _read(folder: Path, key: str) -> bytes | None:
    """The image of an entry; None when there is none, or none that can be trusted (with a warning)."""
    path = folder / f"{key}.cubin"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        text = message("kernel cache", f"{path} must be readable", _reason(error), "Compiling the kernel again.")
        _warn_once(f"unreadable {key}", text)
        return None
    image = data[_HEADER.size :]
    if len(data) >= _HEADER.size and _HEADER.unpack_from(data) == (_MAGIC, len(image), _digest(key, image)):
        return image
    got = f"{len(data)} bytes that do not match their header"
    text = message("kernel cache", f"{path} must be an intact entry", got, "Compiling the kernel again.")
    _warn_once(f"corrupt {key}", text)
    return None


def _write_aside(folder: Path, key: str, data: bytes) -> Path:
    """Write a new temporary file in the same directory, readable by the owner alone. Raises: OSError (nothing left)."""
    temporary = folder / f".{key}.{secrets.token_hex(8)}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(handle)
    return temporary


def _write(folder: Path, key: str, image: bytes) -> bool:
    """Write aside and rename; on any failure warn once, leave nothing behind, and say False."""
    try:
        temporary = _write_aside(folder, key, _HEADER.pack(_MAGIC, len(image), _digest(key, image)) + image)
        try:
            os.replace(temporary, folder / f"{key}.cubin")
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        problem = _unwritable(folder, error)
        _warn_once(f"unwritable {folder}", f"{problem} Until then kernels are compiled anew in every process.")
        return False
    return True


def _unwritable(folder: Path, error: OSError) -> str:
    fix = "Make room or give write permission, or set MARLIN_CACHE_DIR to another directory."
    return message("kernel cache", f"{folder} must be writable", _reason(error), fix)


@contextmanager
def _file_lock(folder: Path, key: str) -> Iterator[None]:
    """Hold the key against other processes; without the lock (no support, timeout) the work is merely done twice."""
    try:
        import fcntl

        handle = os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (ImportError, OSError):
        yield
        return
    try:
        # Why polling: a blocking lock would wait forever on a process that was stopped while it compiled.
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
            else:
                break
        yield
    finally:
        os.close(handle)


def get_cubin(text: str, *, name: str, arch: str, options: tuple[str, ...] = ()) -> bytes:
    """Machine code of a kernel: from memory, from disk, or compiled now and kept.

    Arguments and errors: as `compiler.compile_cubin`. What ails the disk is a RuntimeWarning, never an error.
    """
    key = entry_key(text, name=name, arch=arch, options=options)
    image = _memo.get(key)
    if image is not None:
        return image
    with _key_locks.setdefault(key, threading.Lock()):
        image = _memo.get(key)
        if image is None:
            image = _from_disk_or_compiler(key, text, name, arch, options)
            _memo[key] = image
    return image


def _from_disk_or_compiler(key: str, text: str, name: str, arch: str, options: tuple[str, ...]) -> bytes:
    folder = _usable_directory()
    if folder is None:
        return compiler.compile_cubin(text, name=name, arch=arch, options=options).image
    image = _read(folder, key)
    if image is not None:
        return image
    with _file_lock(folder, key):
        image = _read(folder, key)
        if image is None:
            image = compiler.compile_cubin(text, name=name, arch=arch, options=options).image
            _write(folder, key, image)
    return image


def put_cubin(image: bytes, text: str, *, name: str, arch: str, options: tuple[str, ...] = ()) -> bool:
    """Keep machine code that was compiled elsewhere with these inputs; says whether it is on disk now."""
    key = entry_key(text, name=name, arch=arch, options=options)
    folder = _usable_directory()
    return folder is not None and _write(folder, key, image)


def _own_files(folder: Path) -> list[Path]:
    """Entries, locks, and what a killed writer left; never another program's files."""
    try:
        return [path for path in folder.iterdir() if _OWN_FILE.fullmatch(path.name)]
    except OSError:
        return []


def info() -> CacheInfo:
    """Location, health and size. Makes the directory if there is none, and tries to write to it."""
    folder = directory()
    problem, sizes = _why_unusable(folder), []
    if folder is not None and problem is None:
        try:
            _write_aside(folder, "0" * 64, b"probe").unlink()
        except OSError as error:
            problem = _unwritable(folder, error)
    for path in _own_files(folder) if folder is not None else []:
        if path.suffix == ".cubin":
            with suppress(OSError):
                sizes.append(path.stat().st_size)
    return CacheInfo(None if folder is None else str(folder), problem, len(sizes), sum(sizes))


def clear() -> int:
    """Forget every kernel, in memory and on disk; returns how many entries were removed from disk.

    Touches only the cache's own files, and none in a directory that cannot be trusted. Safe while others use it.
    """
    _memo.clear()
    folder = directory()
    if folder is None or not folder.is_dir() or _why_unusable(folder) is not None:
        return 0
    removed = 0
    for path in _own_files(folder):
        with suppress(OSError):
            path.unlink()
            removed += path.suffix == ".cubin"
    return removed
