"""One decoder block on one device or several: each has a replica and a fixed share of the calibration batches.

Owns the replicas, the shares and the threads. Work is given out by device and comes back in the order of the shares, so
that sums over all batches are taken in one order. Knows nothing of what is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

from marlin.compress.blocks import BlockRunner

Found = TypeVar("Found")


def owner(index: int, count: int, devices: int) -> int:
    """Which of so many devices has batch `index` of `count`: each a run of neighbours, as even as can be."""
    return index * devices // count


class Replicas:
    """Runners of one block, the first of the block itself, the others of copies that `follow` it."""

    def __init__(self, block: nn.Module, devices: Sequence[torch.device], autocast: torch.dtype | None) -> None:
        block.to(devices[0])
        blocks = [block, *(copy.deepcopy(block).to(device) for device in devices[1:])]
        self.runs = [BlockRunner(each, device, autocast) for each, device in zip(blocks, devices, strict=True)]

    def follow(self, layers: Iterable[str] | None = None) -> None:
        """Give the copies the values of the first: of the modules of these names, or of all."""
        if len(self.runs) == 1:
            return
        first = self.runs[0].block
        for name in [""] if layers is None else layers:
            values = dict(first.get_submodule(name).named_parameters())
            for run in self.runs[1:]:
                for leaf, parameter in run.block.get_submodule(name).named_parameters():
                    parameter.data.copy_(values[leaf])

    def spread(self, work: Callable[[BlockRunner, list[int]], Found], count: int) -> list[Found]:
        """work(run, the batches of its share) on each device that has some, side by side; results in order of devices.

        An exception of any of them is raised, the first device's first.
        """
        shares: list[list[int]] = [[] for _ in self.runs]
        for index in range(count):
            shares[owner(index, count, len(self.runs))].append(index)
        given = [(run, share) for run, share in zip(self.runs, shares, strict=True) if share]
        if len(given) == 1:
            return [work(*given[0])]

        def alone(run: BlockRunner, share: list[int]) -> Found:
            # Why: whether gradients are kept is a matter of each thread.
            with torch.no_grad():
                return work(run, share)

        with ThreadPoolExecutor(len(given)) as pool:
            return [future.result() for future in [pool.submit(alone, run, share) for run, share in given]]

    def each(self, work: Callable[[BlockRunner, int], Found], count: int) -> list[Found]:
        """work(run, batch) of every batch, in order."""
        parts = self.spread(lambda run, share: [work(run, index) for index in share], count)
        return [found for part in parts for found in part]
