"""GGUF to a plain Hugging Face directory, through transformers' own GGUF reader.

Owns the one conversion that the demo needs. Knows nothing of where the file came from.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path

from marlin.errors import UnsupportedError, message


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write config, fp16 safetensors and tokenizer of the causal language model in gguf to directory.

    The weights are the dequantized ones, rounded once to fp16. Reaches no network.
    Raises: UnsupportedError (a package is missing), OSError.
    """
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            message(
                "convert_gguf",
                "reading GGUF needs transformers, gguf and accelerate",
                f"no {', '.join(missing)}",
                "Install them: pip install 'sparse-marlin[demo]'.",
            )
        )
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Why: the GGUF reader draws its own bar on stderr, through the caller's.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Why: a model read from GGUF is flagged as quantized and refuses to be saved; a plain one of its config does not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config).to(torch.float16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.config.dtype = torch.float16
    plain.tie_weights()
    tokenizer.save_pretrained(directory)
    plain.save_pretrained(directory)
