"""The kernel cache among threads and processes, on disks that fail, and with entries that lie."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from marlin.errors import CompileError
from marlin.runtime import cache, compiler

TEXT = 'extern "C" __global__ void trivial(int* x) { x[0] = 1; }\n'
SRC = Path(cache.__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache directory of the test's own (not made yet), and a process that has seen nothing."""
    chosen = tmp_path / "kernels"
    monkeypatch.setenv("MARLIN_CACHE_DIR", str(chosen))
    forget(monkeypatch)
    return chosen


def forget(monkeypatch) -> None:
    for name in ("_memo", "_key_locks"):
        monkeypatch.setattr(cache, name, {})
    monkeypatch.setattr(cache, "_warned", set())


@pytest.fixture
def compiled(monkeypatch):
    """Replaces the compiler; the list holds the name of every compilation."""
    names: list[str] = []

    def compile_cubin(text, *, name, arch, options=()):
        names.append(name)
        return compiler.Cubin(f"image of {name} for {arch}".encode(), "", None, None)

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 5))
    return names


def get(name: str = "trivial", text: str = TEXT, arch: str = "80", options: tuple[str, ...] = ()) -> bytes:
    return cache.get_cubin(text, name=name, arch=arch, options=options)


def quiet(call):
    """The call's result; any warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def entry_of(folder: Path) -> Path:
    (path,) = folder.glob("*.cubin")
    return path


# Where


@pytest.mark.parametrize(
    ("chosen", "xdg", "expected"),
    [
        ("/some/where", "/xdg", "/some/where"),
        (None, "/xdg", "/xdg/sparse-marlin"),
        ("", "/xdg", "/xdg/sparse-marlin"),
        (None, None, "/home/someone/.cache/sparse-marlin"),
        (None, "relative", "/home/someone/.cache/sparse-marlin"),
        ("~/kernels", None, "/home/someone/kernels"),
    ],
)
def test_directory_follows_the_environment(monkeypatch, chosen, xdg, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in (("MARLIN_CACHE_DIR", chosen), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache.directory() == Path(expected)


def test_get_cubin_makes_a_private_directory_and_private_entries_whatever_the_umask(folder, compiled):
    before = os.umask(0)
    try:
        quiet(get)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_get_cubin_writes_nothing_but_entry_and_lock(folder, compiled):
    get()
    key = cache.entry_key(TEXT, name="trivial", arch="80")
    assert {path.name for path in folder.iterdir()} == {f"{key}.cubin", f"{key}.lock"}


# Hits and keys


def test_get_cubin_compiles_once_and_then_answers_from_memory_and_from_disk(monkeypatch, compiled):
    first = get()
    assert get() == first == b"image of trivial for 80"
    assert compiled == ["trivial"]
    forget(monkeypatch)
    assert quiet(get) == first
    assert compiled == ["trivial"]


def test_get_cubin_with_the_real_compiler_gives_its_image_twice(monkeypatch):
    first = get()
    forget(monkeypatch)
    monkeypatch.setattr(compiler, "compile_cubin", None)
    assert quiet(get) == first and first.startswith(b"\x7fELF")


def test_entry_key_depends_on_every_input(monkeypatch):
    base = {"text": TEXT, "name": "trivial", "arch": "90", "options": ("-lineinfo",)}

    def key(**changed):
        inputs = {**base, **changed}
        return cache.entry_key(inputs.pop("text"), **inputs)

    keys = [
        key(),
        key(text=TEXT + " "),
        key(name="other"),
        key(arch="90a"),
        key(options=()),
        key(options=("-lineinfo", "-lineinfo")),
    ]
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "_FIXED_FLAGS", ("-std=c++20",))
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(cache, "FORMAT_VERSION", 2)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_entry_key_does_not_confuse_neighbouring_parts():
    one = cache.entry_key("b", name="a", arch="80", options=("x", "y"))
    assert one != cache.entry_key("b", name="a", arch="80", options=("xy",))
    assert one != cache.entry_key("yb", name="a", arch="80", options=("x",))


def test_get_cubin_keeps_no_failure(folder):
    for _ in range(2):
        with pytest.raises(CompileError, match="is undefined"):
            get(text='extern "C" __global__ void f() { nothing(); }')
    assert list(folder.glob("*.cubin")) == []


def test_put_cubin_is_found_by_get_cubin(compiled):
    assert cache.put_cubin(b"made elsewhere", TEXT, name="trivial", arch="80", options=("-lineinfo",))
    assert get(options=("-lineinfo",)) == b"made elsewhere"
    assert compiled == []


# Entries that cannot be trusted


def damage(data: bytes, how: str) -> bytes:
    flipped = bytearray(data)
    flipped[-1] ^= 1
    magic = bytearray(data)
    magic[0] ^= 1
    return {
        "empty": b"",
        "half a header": data[:20],
        "header alone": data[: cache._HEADER.size],
        "truncated": data[:-1],
        "longer": data + b"x",
        "flipped bit": bytes(flipped),
        "another magic": bytes(magic),
        "another format": data[:7] + b"\xff" + data[8:],
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "half a header",
        "header alone",
        "truncated",
        "longer",
        "flipped bit",
        "another magic",
        "another format",
    ],
)
def test_get_cubin_rebuilds_a_bad_entry_with_a_warning(folder, monkeypatch, compiled, how):
    image = get()
    path = entry_of(folder)
    good = path.read_bytes()
    path.write_bytes(damage(good, how))
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning) as caught:
        assert get() == image
    assert [str(warning.message) for warning in caught] == [
        f"kernel cache: {path} must be an intact entry; got {len(damage(good, how))} bytes that do not match their "
        "header. Compiling the kernel again."
    ]
    assert compiled == ["trivial", "trivial"]
    assert path.read_bytes() == good


def test_get_cubin_does_not_take_an_intact_entry_of_another_key(folder, monkeypatch, compiled):
    get("one")
    other = folder / f"{cache.entry_key(TEXT, name='two', arch='80')}.cubin"
    entry_of(folder).rename(other)
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match="must be an intact entry"):
        assert get("two") == b"image of two for 80"


def test_get_cubin_goes_on_when_an_entry_cannot_be_read_or_replaced(folder, compiled):
    folder.mkdir(mode=0o700)
    path = folder / f"{cache.entry_key(TEXT, name='trivial', arch='80')}.cubin"
    path.mkdir()
    with pytest.warns(RuntimeWarning) as caught:
        assert get() == b"image of trivial for 80"
    assert [str(warning.message).split(";")[0] for warning in caught] == [
        f"kernel cache: {path} must be readable",
        f"kernel cache: {folder} must be writable",
    ]


# Directories that cannot be trusted


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_get_cubin_refuses_a_world_writable_directory(folder, monkeypatch, compiled, mode):
    get()
    folder.chmod(mode)
    for path in folder.iterdir():
        path.write_bytes(b"planted")
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning) as caught:
        assert get() == get() == b"image of trivial for 80"
        assert get("second") == b"image of second for 80"
    assert [str(warning.message) for warning in caught] == [
        f"kernel cache: {folder} must not be writable by everyone; got mode {mode:04o}. "
        "Remove it; it is made anew, with mode 0700. Until then kernels are compiled anew in every process."
    ]
    assert compiled == ["trivial", "trivial", "second"]
    assert {path.read_bytes() for path in folder.iterdir()} == {b"planted"}


def owned_by(monkeypatch, folder: Path, owner: int, user: int) -> None:
    real = os.stat

    def fake(path, *args, **kwargs):
        found = real(path, *args, **kwargs)
        if path != folder:
            return found
        fields = list(found)
        fields[stat.ST_UID] = owner
        return os.stat_result(fields)

    monkeypatch.setattr(os, "stat", fake)
    monkeypatch.setattr(os, "geteuid", lambda: user)


@pytest.mark.parametrize("user", [0, 1001])
def test_get_cubin_refuses_a_directory_of_another_user(folder, monkeypatch, compiled, user):
    owned_by(monkeypatch, folder, 4321, user)
    with pytest.warns(RuntimeWarning) as caught:
        assert get() == b"image of trivial for 80"
    assert [str(warning.message) for warning in caught] == [
        f"kernel cache: {folder} must belong to the user who runs this; got owner 4321, and this is user {user}. "
        "Set MARLIN_CACHE_DIR to a directory of your own. Until then kernels are compiled anew in every process."
    ]
    assert list(folder.iterdir()) == []


def test_get_cubin_reads_a_directory_of_root(folder, monkeypatch, compiled):
    get()
    forget(monkeypatch)
    owned_by(monkeypatch, folder, 0, 1001)
    assert quiet(get) == b"image of trivial for 80"
    assert compiled == ["trivial"]


# Disks that fail


def test_get_cubin_goes_on_when_the_directory_cannot_be_made(tmp_path, monkeypatch, compiled):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MARLIN_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    with pytest.warns(RuntimeWarning, match="must be a directory or possible to make; got Not a directory") as caught:
        assert get() == b"image of trivial for 80"
        assert get("second") == b"image of second for 80"
    assert len(caught) == 1


def test_get_cubin_goes_on_without_a_home_directory(monkeypatch, compiled):
    monkeypatch.setattr(cache, "directory", lambda: None)
    with pytest.warns(RuntimeWarning, match="kernel cache: there must be a home directory; got none. Set MARLIN_CACHE"):
        assert get() == b"image of trivial for 80"


def failing(name: str, code: int, only_writes: bool = False):
    """os.<name> that fails as a disk does."""
    real = getattr(os, name)

    def fail(*args, **kwargs):
        if only_writes and not args[1] & (os.O_WRONLY | os.O_RDWR):
            return real(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    return fail


def full_after(size: int):
    """os.write that takes some bytes and then finds the disk full."""
    real, left = os.write, [size]

    def write(handle, data):
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(handle, data[: left[0]])
        left[0] -= written
        return written

    return write


@pytest.mark.parametrize(
    ("call", "fake", "reason"),
    [
        ("open", failing("open", errno.EROFS, only_writes=True), "Read-only file system"),
        ("open", failing("open", errno.EACCES, only_writes=True), "Permission denied"),
        ("replace", failing("replace", errno.EROFS), "Read-only file system"),
        ("write", failing("write", errno.ENOSPC), "No space left on device"),
        ("write", full_after(30), "No space left on device"),
    ],
    ids=["read-only", "no-permission", "no-rename", "full", "full-halfway"],
)
def test_get_cubin_warns_once_and_goes_on_when_the_disk_takes_nothing(
    folder, monkeypatch, compiled, call, fake, reason
):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, call, fake)
    with pytest.warns(RuntimeWarning) as caught:
        assert get("one") == get("one") == b"image of one for 80"
        assert get("two") == b"image of two for 80"
        assert not cache.put_cubin(b"three", TEXT, name="three", arch="80")
    monkeypatch.undo()
    assert [str(warning.message) for warning in caught] == [
        f"kernel cache: {folder} must be writable; got {reason}. Make room or give write permission, or set "
        "MARLIN_CACHE_DIR to another directory. Until then kernels are compiled anew in every process."
    ]
    assert [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] == []


def test_get_cubin_writes_everything_when_the_disk_takes_a_few_bytes_at_a_time(monkeypatch, compiled):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:7]))
    image = get()
    forget(monkeypatch)
    assert quiet(get) == image and compiled == ["trivial"]


def test_get_cubin_goes_on_where_locks_are_not_supported(monkeypatch, compiled):
    import fcntl

    def refuse(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert quiet(get) == b"image of trivial for 80"


def test_get_cubin_does_not_wait_forever_for_a_stopped_process(folder, monkeypatch, compiled):
    import fcntl

    folder.mkdir(mode=0o700)
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.1)
    key = cache.entry_key(TEXT, name="trivial", arch="80")
    with open(folder / f"{key}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        start = time.monotonic()
        assert quiet(get) == b"image of trivial for 80"
    assert 0.1 <= time.monotonic() - start < 5


# Many at once


def test_get_cubin_compiles_once_among_threads(monkeypatch, compiled):
    fast = compiler.compile_cubin

    def slow(text, **inputs):
        time.sleep(0.1)
        return fast(text, **inputs)

    monkeypatch.setattr(compiler, "compile_cubin", slow)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"image of trivial for 80"] * 8
    assert compiled == ["trivial"]


# Why the package stands in without its __init__: that imports torch, which takes seconds and nothing here needs.
WORKER = """
import os, sys, time, types
package = sys.modules["marlin"] = types.ModuleType("marlin")
package.__path__ = [os.path.join(os.environ["PYTHONPATH"], "marlin")]
from marlin.runtime import cache, compiler
real = compiler.compile_cubin
def counted(text, *, name, arch, options=()):
    with open(sys.argv[1], "a") as log:
        log.write(name + "\\n")
    time.sleep(0.3)
    return real(text, name=name, arch=arch, options=options)
compiler.compile_cubin = counted
compiler.nvrtc_version()
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
for name in sys.argv[2:]:
    image = cache.get_cubin('extern "C" __global__ void k(int* x) { x[0] = 1; }', name=name, arch="80")
    assert image.startswith(b"\\x7fELF")
"""


def start_worker(log: Path, *names: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", WORKER, str(log), *names]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def test_get_cubin_compiles_each_kernel_once_among_processes(tmp_path, folder):
    log = tmp_path / "compilations"
    workers = [start_worker(log, "one", "two"), start_worker(log, "two", "one"), start_worker(log, "one", "two")]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n", worker.communicate()[1]
    ends = []
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        ends.append((worker.communicate(timeout=120)[1], worker.returncode))
    assert ends == [("", 0)] * 3
    assert sorted(log.read_text().split()) == ["one", "two"]
    assert len(list(folder.glob("*.cubin"))) == 2 and list(folder.glob(".*.tmp")) == []


def test_get_cubin_takes_over_from_a_process_that_was_killed_while_compiling(tmp_path, folder, compiled):
    log = tmp_path / "compilations"
    worker = start_worker(log, "trivial")
    worker.stdout.readline()
    worker.stdin.write("go\n")
    worker.stdin.flush()
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.kill()
    worker.communicate()
    assert quiet(get) == b"image of trivial for 80"
    assert compiled == ["trivial"]


# Size and removal


def test_info_tells_place_and_size(folder, compiled):
    assert cache.info() == cache.CacheInfo(str(folder), None, 0, 0)
    get("one")
    get("two", arch="90")
    sizes = sum(path.stat().st_size for path in folder.glob("*.cubin"))
    assert cache.info() == cache.CacheInfo(str(folder), None, 2, sizes)
    assert list(folder.glob(".*")) == []


def test_info_tells_why_nothing_is_kept(folder, monkeypatch):
    cache.info()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing("open", errno.ENOSPC, only_writes=True))
        assert cache.info().problem == (
            f"kernel cache: {folder} must be writable; got No space left on device. Make room or give write "
            "permission, or set MARLIN_CACHE_DIR to another directory."
        )
    folder.chmod(0o777)
    assert cache.info().problem == (
        f"kernel cache: {folder} must not be writable by everyone; got mode 0777. "
        "Remove it; it is made anew, with mode 0700."
    )


def test_clear_removes_what_is_ours_and_nothing_else(folder, compiled):
    get("one")
    get("two")
    key = cache.entry_key(TEXT, name="one", arch="80")
    (folder / f".{key}.0123456789abcdef.tmp").write_bytes(b"left by a killed process")
    foreign = {"notes.lock", "data.tmp", "other.cubin", "README"}
    for name in foreign:
        (folder / name).write_text("not ours")
    assert cache.clear() == 2
    assert {path.name for path in folder.iterdir()} == foreign
    get("one")
    assert compiled == ["one", "two", "one"]


def test_clear_makes_no_directory_and_leaves_one_that_is_not_trusted(folder, compiled):
    assert cache.clear() == 0 and not folder.exists()
    get()
    folder.chmod(0o777)
    assert cache.clear() == 0 and len(list(folder.glob("*.cubin"))) == 1


def test_importing_the_runtime_touches_no_disk_and_loads_no_cuda(folder):
    code = (
        "import sys, marlin; before = set(sys.modules); "
        "from marlin.runtime import cache, compiler, driver, build, diagnose; "
        "sys.exit(any(name.startswith(('cuda', 'torch')) for name in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SRC)}, timeout=120)
    assert done.returncode == 0 and not folder.exists()
