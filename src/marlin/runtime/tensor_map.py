"""Descriptions of tensors for the copy engine of Hopper GPUs, as kernels take them.

Knows pointers and extents; nothing of what a tensor holds.
"""

from __future__ import annotations

import ctypes

from marlin.errors import LaunchError, message
from marlin.runtime import driver

NUM_BYTES = 128  # of a CUtensorMap
# CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
_DTYPES = {"uint64": 4, "float16": 6, "bfloat16": 9}
_SWIZZLE_128_BYTES, _PROMOTE_256_BYTES = 3, 3


def encode(
    pointer: int, dtype: str, extents: tuple[int, int, int], strides: tuple[int, int], box: tuple[int, int, int]
) -> bytes:
    """A tensor of three dimensions, innermost first; the copy engine writes zeros beyond its extents.

    pointer: address on the device, a multiple of 16; dtype: "float16" or "bfloat16" (a box is 128 bytes wide and
    swizzled) or "uint64" (not swizzled); extents, box: elements, the box at most 256 each; strides: bytes, of the
    second and third dimension, multiples of 16. Source: CUDA Driver API, cuTensorMapEncodeTiled.
    Raises: LaunchError (the driver's word), UnsupportedError (no driver).
    """
    memory = ctypes.create_string_buffer(NUM_BYTES + 64)
    address = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
    words = ctypes.c_uint32 * 3
    code = driver.libcuda().cuTensorMapEncodeTiled(
        *(ctypes.c_void_p(address), _DTYPES[dtype], 3, ctypes.c_void_p(pointer)),
        *((ctypes.c_uint64 * 3)(*extents), (ctypes.c_uint64 * 2)(*strides), words(*box), words(1, 1, 1)),
        *(0, 0 if dtype == "uint64" else _SWIZZLE_128_BYTES, _PROMOTE_256_BYTES, 0),
    )
    if code:
        got = f"{driver.error_name(code)} for {dtype} {extents}, strides {strides}, box {box}, at {pointer:#x}"
        fix = "marlin doctor checks driver, compiler and GPU."
        raise LaunchError(message("tensor_map", "the driver must describe the tensor", got, fix))
    return ctypes.string_at(address, NUM_BYTES)
