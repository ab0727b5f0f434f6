"""The plugin for vLLM: serves compressed models and published 2:4 checkpoints, and 2:4 weights found in ordinary ones.

Owns the moment of registration and the word on versions. Importing this package imports no vLLM. vLLM calls `plugin` in
each of its processes, through the entry point `sparse_marlin` of the group `vllm.general_plugins`.

    config      which layers of a model are ours, for our directories and for marlin-24 checkpoints
    leaves      tensors of each format: which dimension is N, which is K, and in what steps they can be cut
    parameters  a parameter that holds the parts of a merged layer and cuts what is loaded for a rank
    linear      the linear method: create, load, process, apply
    kernel      the kernel that takes over layers of ordinary INT4 checkpoints
    rowwise     norms and SiLU-and-multiply of models whose linear layers are ours
"""

from __future__ import annotations

import importlib.metadata
import logging

from marlin.errors import UnsupportedError, message

TESTED_VERSIONS = ("0.26.0", "0.33.0")
_OP = "marlin.integrations.vllm"


def installed_version() -> str:
    """vLLM's version, or "none"."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def register() -> None:
    """Enter the method, the kernel and the row-wise operators in vLLM's registries; repeated calls change nothing.

    With VLLM_BATCH_INVARIANT=1, batch-invariant mode is switched on.
    Raises: UnsupportedError (no vLLM, or one whose interface is another; the text names the tested versions).
    """
    try:
        from vllm import envs

        from marlin.integrations.vllm import config, kernel, rowwise
        from marlin.settings import set_batch_invariant

        config.register()
        kernel.register()
        rowwise.register()
        if envs.VLLM_BATCH_INVARIANT:
            set_batch_invariant(True)
    except (ImportError, AttributeError, TypeError) as error:
        need = f"vLLM must have the interface of the tested versions {', '.join(TESTED_VERSIONS)}"
        got = f"vLLM {installed_version()} ({type(error).__name__}: {error})"
        raise UnsupportedError(message(_OP, need, got, f"Install vllm=={TESTED_VERSIONS[-1]}.")) from error


def plugin() -> None:
    """`register`, as vLLM calls it: a failure is logged, and vLLM goes on without us."""
    # Why: vLLM calls every installed plugin, whatever it is about to serve.
    try:
        register()
    except UnsupportedError as error:
        logging.getLogger("vllm.sparse_marlin").error("%s Compressed models cannot be served.", error)
