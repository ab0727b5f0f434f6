"""The rules of the tree, held as data: which room may import which, how large things may grow, nothing at import.

The table is the one of docs/architecture.md; a new file or a new dependency is a decision to write down here.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "marlin"
FILES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((PACKAGE / "kernels").glob("*.cuh"))

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8


@dataclass(frozen=True)
class Room:
    """What a module or folder of marlin may import: rooms (dotted; one includes what is below it) and packages."""

    ours: tuple[str, ...] = ()
    third_party: tuple[str, ...] = ()
    except_ours: tuple[str, ...] = ()


ANY = ("*",)
ROOMS = {
    "errors": Room(),
    "settings": Room(("errors",)),
    "formats": Room(("errors",), ("torch", "numpy", "safetensors")),
    "compress": Room(("errors", "formats"), ("torch", "safetensors"), except_ours=("formats.layouts",)),
    "evaluate": Room(("errors",), ("torch",)),
    "kernels": Room(),
    "runtime": Room(("errors",), ("cuda",)),
    "ops": Room(("errors", "settings", "formats", "runtime"), ("torch",)),
    "nn": Room(("errors", "formats", "ops"), ("torch",)),
    "experts": Room(("errors",), ("torch",)),
    "compat": Room(("errors", "formats", "ops"), ("torch",)),
    "_semi_structured_conversions": Room(("errors", "formats"), ("torch",)),
    "integrations": Room(("errors",)),
    "integrations.vllm": Room(("errors", "settings", "formats", "ops"), ("torch", "vllm")),
    "integrations.lm_eval": Room(("errors",), ("lm_eval",)),
    "integrations.peft": Room(("errors", "nn"), ("torch", "peft")),
    "integrations.transformers": Room(
        ("errors", "experts", "formats", "nn", "ops", "integrations.peft"), ("torch", "transformers")
    ),
    # The public verbs, which put rooms together.
    "api": Room(
        ("errors", "experts", "formats", "compress", "nn", "integrations.transformers"),
        ("torch", "safetensors", "transformers"),
    ),
    "convert": Room(("errors", "formats", "nn", "api"), ("torch", "safetensors")),
    "shards": Room(("formats",), ("torch", "safetensors")),
    "streaming": Room(
        ("errors", "experts", "formats", "shards", "compress", "api"), ("torch", "safetensors", "transformers")
    ),
    "testing": Room(("errors", "formats"), ("torch", "numpy"), except_ours=("formats.layouts",)),
    "cli": Room(ANY, ("torch", "transformers", "typer", "rich", "benchmarks")),
    "demo": Room(ANY, ("torch", "transformers", "rich")),
    "": Room(ANY),  # marlin/__init__.py, whose names are lazy
}

# Beside src/: measures what users call, and must not know how weights are compressed; quality.py measures just that.
BENCHMARKS = ("errors", "settings", "formats", "ops", "nn", "runtime", "testing")
QUALITY = (*BENCHMARKS, "", "compress", "evaluate", "demo", "api")

# Imported inside functions only, so that nothing pays for what it does not use. (A room of its own framework is itself
# imported late.)
LATE = ("accelerate", "cuda", "gguf", "lm_eval", "matplotlib", "peft", "transformers", "triton", "vllm")

# What `import marlin` loads: the operators under torch.ops, and the hook that waits for transformers.
EAGER = {"marlin.integrations.transformers.register_lazily"}

# Interfaces that are wider than MAX_PARAMETERS, and why.
WIDE = {
    "compat.mul": "the published signature",
    "compat.mul_2_4": "the published signature",
    "runtime.launch.launch": "one keyword for each pointer of the kernel; a dataclass a launch would cost more than it",
}
WIDE_ROOMS = {"cli": "parameters of a command are its options"}


@dataclass(frozen=True)
class Import:
    """One import of a file: the dotted module (with the name, in `from a import b`), its line, and where it stands."""

    target: str
    line: int
    late: bool


def _module(path: Path) -> str:
    """Dotted name below marlin: "formats.int4", "formats" for its __init__, "" for the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str | None:
    """The most specific room of the table that holds module."""
    parts = module.split(".") if module else []
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in ROOMS:
            return ".".join(parts[:length])
    return "" if not parts else None


def _imports(tree: ast.AST, package: str, late: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*above, base]))
            yield from (Import(f"{base}.{alias.name}", node.lineno, late) for alias in node.names)
        else:
            yield from _imports(node, package, late or _is_late(node))


def _is_late(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return True
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports_of(path: Path) -> list[Import]:
    module = _module(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return _imports_of_file(path, f"marlin.{package}".rstrip("."))


def _imports_of_file(path: Path, package: str) -> list[Import]:
    return list(_imports(_parse(path), package))


def _within(module: str, rooms: tuple[str, ...]) -> bool:
    return rooms == ANY or any(module == room or module.startswith(f"{room}.") for room in rooms)


def _why_refused(path: Path, found: Import) -> str | None:
    """Why the file may not import this, or None."""
    module = _module(path)
    home = _room(module)
    assert home is not None
    room = ROOMS[home]
    top, _, below = found.target.partition(".")
    if top in sys.stdlib_module_names:
        return None
    if top != "marlin":
        return None if top in room.third_party else f"{home or 'marlin'} may not import {top}"
    other = _room(below)
    if other is None:
        return None if home == "" or room.ours == ANY else f"{below or 'marlin'} is in no room"
    if other != home and any(part.startswith("_") and part not in ROOMS for part in below.split(".")):
        return f"{below} is private to {other}"
    same_room = other == home or _within(below, (home,)) if home else False
    if same_room or (_within(below, room.ours) and not _within(below, room.except_ours)):
        return None
    return f"{home} may not import {below}"


def _functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """(dotted name, node, whether a caller from outside can see it) of all functions, nested ones included."""

    def walk(node: ast.AST, prefix: str, public: bool) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}"
                seen = public and (not child.name.startswith("_") or child.name == "__init__")
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, name, seen)
                else:
                    yield name, child, seen  # type: ignore[misc]
                    yield from walk(child, name, False)
            else:
                yield from walk(child, prefix, public)

    yield from walk(_parse(path), _module(path), True)


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_file_lives_in_a_room(path: Path):
    assert _room(_module(path)) is not None, f"{_relative(path)}: add its room to the table"


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_file_imports_only_what_its_room_may(path: Path):
    refused = [
        f"{_relative(path)}:{found.line}: {why}" for found in _imports_of(path) if (why := _why_refused(path, found))
    ]
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize(
    ("file", "target", "allowed"),
    [
        ("formats/int4.py", "marlin.errors.require", True),
        ("formats/int4.py", "marlin.formats.sparsity", True),
        ("formats/int4.py", "marlin.runtime.plan", False),
        ("formats/int4.py", "json", True),
        ("formats/int4.py", "triton", False),
        ("compress/solvers.py", "marlin.formats.quantize", True),
        ("compress/solvers.py", "marlin.formats.layouts.pack", False),
        ("runtime/plan.py", "torch", False),
        ("runtime/plan.py", "marlin.formats.int4", False),
        ("nn.py", "marlin.ops.linear", True),
        ("nn.py", "marlin.runtime.plan", False),
        ("nn.py", "marlin.ops._register", False),
        ("errors.py", "marlin.formats", False),
        ("testing/emulator.py", "marlin.formats.layouts.fragment", False),
        ("cli/doctor.py", "marlin.runtime.driver", True),
        ("cli/doctor.py", "marlin.runtime.driver._open", False),
    ],
)
def test_table_refuses_what_it_should(file: str, target: str, allowed: bool):
    why = _why_refused(PACKAGE / file, Import(target, 1, late=False))
    assert (why is None) is allowed, why


def test_every_room_exists():
    homes = {_room(_module(path)) for path in FILES} | {"kernels"}
    assert homes == set(ROOMS)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=_relative)
def test_benchmarks_import_only_what_users_call_and_truth(path: Path):
    found = [(found.line, found.target.partition(".")) for found in _imports_of_file(path, "benchmarks")]
    allowed = QUALITY if path.name.startswith("quality") else BENCHMARKS
    refused = [
        f"{_relative(path)}:{line}: {below}"
        for line, (top, _, below) in found
        if top == "marlin" and _room(below) is not None and not _within(below, allowed)
    ]
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_file_imports_optional_packages_late(path: Path):
    early = [
        f"{_relative(path)}:{found.line}: import {found.target} inside the function that needs it"
        for found in _imports_of(path)
        if not found.late and found.target.split(".")[0] in LATE and not _module(path).startswith("integrations.")
    ]
    assert not early, "\n".join(early)


def test_package_init_loads_only_what_registers_something():
    early = [found.target for found in _imports_of(PACKAGE / "__init__.py") if not found.late]
    ours = {target for target in early if target.split(".")[0] == "marlin"}
    assert ours <= EAGER, f"marlin/__init__.py must look these up when they are asked for: {sorted(ours - EAGER)}"


def test_testing_shares_no_code_with_what_it_checks():
    for path in sorted((PACKAGE / "testing").glob("*.py")):
        names = {found.target for found in _imports_of(path) if found.target.startswith("marlin.formats")}
        types = {f"marlin.formats.{name}" for name in ("CompressedWeight", "DenseInt4Weight", "Weight")}
        assert names <= types, f"{_relative(path)} imports functions of formats: {sorted(names - types)}"


@pytest.mark.parametrize("path", FILES + KERNELS, ids=_relative)
def test_file_is_short(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{_relative(path)} has {lines} lines, more than {MAX_FILE_LINES}"


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_functions_are_short(path: Path):
    long = [
        f"{name}: {length} lines"
        for name, node, _ in _functions(path)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, f"more than {MAX_FUNCTION_LINES}: {long}"


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_public_functions_have_few_parameters(path: Path):
    wide = []
    for name, node, public in _functions(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        if public and count > MAX_PARAMETERS and name not in WIDE and _room(_module(path)) not in WIDE_ROOMS:
            wide.append(f"{name}: {count} parameters")
    assert not wide, f"more than {MAX_PARAMETERS}, take a dataclass: {wide}"


@pytest.mark.parametrize("path", KERNELS, ids=_relative)
def test_kernel_text_includes_only_our_headers(path: Path):
    own = {header.name for header in KERNELS}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("#include"):
            name = line.split('"')[1] if '"' in line else line
            assert name in own, f"{_relative(path)}: {line}"


def test_kernels_exist():
    assert KERNELS


_IMPORT_PROBE = """
import sys
import torch
before = set(sys.modules)
import marlin
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(" ".join(sorted(new)))
print(torch.cuda.is_initialized())
"""


def test_import_loads_nothing_optional_and_writes_no_file(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": str(PACKAGE.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "TMPDIR": str(home),
    }
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_PROBE], cwd=home, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    modules, cuda_initialized = result.stdout.splitlines()
    assert "marlin" in modules.split()
    loaded = {*modules.split()} & {*LATE, "typer", "rich", "numpy.testing", "benchmarks"}
    assert not loaded, f"import marlin loads {sorted(loaded)}"
    assert cuda_initialized == "False"
    assert not list(home.rglob("*")), "import marlin writes files"
