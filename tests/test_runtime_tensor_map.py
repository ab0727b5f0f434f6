"""Descriptions for the copy engine, against a stand-in for libcuda."""

from __future__ import annotations

import ctypes
import re

import pytest

from marlin.errors import LaunchError
from marlin.runtime import driver, tensor_map


class FakeLibrary:
    """Fills the description with bytes 0..127, and keeps what it was asked for."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.asked: list[tuple[object, ...]] = []

    def cuTensorMapEncodeTiled(self, out, dtype, rank, pointer, extents, strides, box, steps, *rest):
        assert out.value % 64 == 0
        ctypes.memmove(out, bytes(range(128)), 128)
        self.asked.append((dtype, rank, pointer.value, [*extents], [*strides], [*box], [*steps], *rest))
        return self.code


@pytest.fixture
def fake(monkeypatch):
    library = FakeLibrary()
    monkeypatch.setattr(driver, "libcuda", lambda: library)
    return library


def test_encode_describes_activations_in_swizzled_panels(fake):
    found = tensor_map.encode(4096, "bfloat16", (64, 7, 3), (384, 128), (64, 16, 2))
    assert found == bytes(range(128))
    assert fake.asked == [(9, 3, 4096, [64, 7, 3], [384, 128], [64, 16, 2], [1, 1, 1], 0, 3, 3, 0)]


def test_encode_does_not_swizzle_packed_words(fake):
    tensor_map.encode(8192, "uint64", (128, 4, 2), (1024, 4096), (128, 2, 1))
    assert [(asked[0], asked[8]) for asked in fake.asked] == [(4, 0)]


def test_encode_gives_the_drivers_word(fake, monkeypatch):
    fake.code = 1
    monkeypatch.setattr(driver, "error_name", lambda code: f"error {code}")
    expected = (
        "tensor_map: the driver must describe the tensor; got error 1 for uint64 (16, 1, 1), strides (128, 128), box "
        "(16, 1, 1), at 0x8. marlin doctor checks driver, compiler and GPU."
    )
    with pytest.raises(LaunchError, match=f"^{re.escape(expected)}$"):
        tensor_map.encode(8, "uint64", (16, 1, 1), (128, 128), (16, 1, 1))


def test_codes_are_those_of_the_driver():
    bindings = pytest.importorskip("cuda.bindings.driver")
    types = bindings.CUtensorMapDataType
    names = {"uint64": "UINT64", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
    ours = {names[name]: code for name, code in tensor_map._DTYPES.items()}
    assert ours == {name: int(getattr(types, f"CU_TENSOR_MAP_DATA_TYPE_{name}")) for name in ours}
    assert tensor_map._SWIZZLE_128_BYTES == int(bindings.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B)
    assert tensor_map._PROMOTE_256_BYTES == int(bindings.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B)
