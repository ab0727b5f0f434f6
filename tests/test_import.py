"""When what is registered is registered: whatever is imported first, once torch is there the operators are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"


def _python(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import marlin, torch",
        "import torch, marlin",
        "import marlin; marlin.pack; import torch",
        "from marlin.formats.int4 import quantize; import torch",
        "import marlin.ops, torch",
        "import marlin.compress, torch",
        "import marlin.testing.tolerance, torch",
    ],
)
def test_operators_are_there_whatever_is_imported_first(first: str) -> None:
    _python(f"{first}\ntorch.ops.marlin.w4a16_sp24.default\ntorch.ops.marlin.w4a16_dense_out.default")


def test_package_alone_loads_no_torch() -> None:
    _python("import marlin, sys\nassert 'torch' not in sys.modules\nassert marlin.ops and 'torch' in sys.modules")


def test_classes_are_the_same_by_every_way_to_them() -> None:
    _python(
        "from marlin.formats import CompressedWeight\nimport marlin, marlin.nn, marlin.formats.weight\n"
        "assert marlin.CompressedWeight is CompressedWeight is marlin.formats.weight.CompressedWeight\n"
        "import torch; assert marlin.nn.SparseLinear is marlin.SparseLinear"
    )


def test_module_that_fails_leaves_the_registration_to_the_next() -> None:
    _python(
        "import marlin, sys\n"
        "sys.modules['numpy'] = sys.modules['safetensors'] = None\n"
        "try:\n    import marlin.formats.checkpoint\nexcept ImportError:\n    pass\n"
        "del sys.modules['numpy'], sys.modules['safetensors']\n"
        "import torch\ntorch.ops.marlin.w4a16_sp24.default"
    )
