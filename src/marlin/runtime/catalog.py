"""Every kernel that can run: of products, those that expand, those between products. Built ahead of time and in CI."""

from __future__ import annotations

from marlin.runtime.expansion import ExpandVariant, all_expand_variants
from marlin.runtime.rowwise import RowwiseVariant, all_rowwise_variants
from marlin.runtime.source import Variant, all_variants

AnyVariant = Variant | ExpandVariant | RowwiseVariant


def all_kernels() -> list[AnyVariant]:
    """Kernels of products first."""
    return [*all_variants(), *all_expand_variants(), *all_rowwise_variants()]
