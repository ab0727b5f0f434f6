"""Kernel text: variants and entry points."""

from __future__ import annotations

import pytest

from marlin.runtime.source import ARGUMENTS, ARGUMENTS_SM90, SIGNATURES, all_variants
from marlin.runtime.wgmma import wgmma_text


def test_all_variants_have_distinct_entries() -> None:
    entries = [variant.entry for variant in all_variants()]
    assert len(entries) == len(set(entries)) > 0


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_variant_text_is_one_file_without_includes(family: str) -> None:
    text = next(variant for variant in all_variants() if variant.config.family == family).render()
    assert "#include" not in text and "#pragma once" not in text
    assert text.count('extern "C" __global__') == 1
    # Each header once.
    assert text.count("struct Schedule {") == text.count("cp_async_wait() {") == 1


def test_signature_has_a_character_for_each_argument() -> None:
    for family, arguments in (("sm80", ARGUMENTS), ("sm90", ARGUMENTS_SM90)):
        assert len(SIGNATURES[family]) == len(arguments)
        kinds = {"P": "*", "T": "TensorMap", "i": "int"}
        assert all(kind.endswith(kinds[code]) for kind, _, code in arguments)


def test_variants_name_the_architectures_they_run_on() -> None:
    targets = {
        variant.config.family: [variant.target(arch) for arch in ("80", "90", "100")] for variant in all_variants()
    }
    assert targets == {"sm80": ["80", "90", "100"], "sm90": [None, "90a", None]}


def test_wgmma_text_lists_every_register_of_a_token_tile() -> None:
    text = wgmma_text(24, bf16=True)
    for wrapper, name in zip(text.split('// "wgmma')[1:], (".sp", ""), strict=True):
        assert f"wgmma.mma_async{name}.sync.aligned.m64n24k{32 if name else 16}.f32.bf16.bf16" in wrapper
        assert "{" + ", ".join(f"%{i}" for i in range(12)) + "}" in wrapper
        assert wrapper.count('"+f"') == 12
        assert "d[2][3]" in wrapper and "d[3]" not in wrapper
