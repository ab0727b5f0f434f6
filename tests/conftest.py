"""What all tests share: seeds, threads, and the marker `gpu`, which skips with a reason where there is no GPU."""

from __future__ import annotations

import random

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("marlin", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("marlin")

# Why: tensors here are small. More threads gain little on an idle machine and wait for each other on a busy one, where
# two threads on two shared cores take ten times as long as one.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail instead of skipping GPU tests where there is no usable GPU"
    )


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU: torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"needs compute capability 8.0 or newer: this GPU has {major}.{minor}"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if gpu_items else None
    if reason is None:
        return
    if config.getoption("--require-gpu"):
        raise pytest.UsageError(f"--require-gpu: {reason}")
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test draws the same numbers, in whatever order tests run."""
    random.seed(0)
    torch.manual_seed(0)
