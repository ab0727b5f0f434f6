"""Loading a model directory, dense or compressed, and generating from it: what the demo and the commands share.

Owns the streamer and how a prompt becomes tokens. Knows nothing of consoles; transformers is imported by the calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from marlin.errors import UnsupportedError, message, require


def quiet_transformers() -> None:
    """Import transformers without its own progress bars and notes. Raises: UnsupportedError (not installed)."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from transformers.utils import logging
    except ImportError as error:
        fix = "Install it: pip install 'sparse-marlin[transformers]'."
        raise UnsupportedError(message("marlin", "transformers must be installed", str(error), fix)) from error
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_model_directory(directory: str | Path) -> Path:
    """The path, if it is a Hugging Face model directory. Raises: ValueError."""
    path = Path(directory)
    if not (path / "config.json").is_file():
        got = f"{str(path)!r}, " + ("a directory without one" if path.is_dir() else "not a directory")
        fix = "Give the directory that save_pretrained wrote."
        raise ValueError(message("marlin", "the model must be a directory with config.json", got, fix))
    return path


def load_model(directory: str | Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) of a dense or compressed model directory, for inference on one device; reaches no network.

    Raises: ValueError (no model directory, damaged checkpoint), OSError, UnsupportedError (no transformers).
    """
    path = check_model_directory(directory)
    quiet_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from marlin.formats.checkpoint import is_directory_of_ours, open_directory

    if is_directory_of_ours(path):
        open_directory(path)  # Why: its errors name file, tensor and way out.
    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, device_map={"": str(device)}, local_files_only=True
    )
    return model.eval(), tokenizer


def path_that_runs(model: Any) -> str:
    """Which implementation computes the compressed layers of a loaded model, in words."""
    from marlin.nn import sparse_linears

    layers = [layer for _, layer in sparse_linears(model)]
    if not layers:
        return "torch, dense"
    if layers[0].codes.device.type != "cuda":
        return "CPU reference, float32: " + ", ".join(sorted({layer.kind for layer in layers}))
    from marlin.runtime import Problem, plan

    dtype = str(layers[0].scales.dtype).removeprefix("torch.")
    index = layers[0].codes.device.index or 0
    extents = {(layer.out_features, layer.in_features, layer.group_size, layer.kind) for layer in layers}
    names = {plan(Problem(1, n, k, group, dtype, kind), index).variant.name for n, k, group, kind in extents}
    return "GPU kernel: " + ", ".join(sorted(names))


class Streamer:
    """The `streamer` of transformers' generate: passes text on as tokens arrive, and keeps tokens and times."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None] = lambda text: None) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call) or new tokens."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self.times.append(time.perf_counter())
        self._show(final=False)

    def end(self) -> None:
        """Pass on what was held back."""
        self._show(final=True)

    def _show(self, final: bool) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        # Why: a character of several tokens decodes to U+FFFD until its last token is there.
        stable = text if final else text.rstrip("\ufffd")
        if len(stable) > len(self.text) and stable.startswith(self.text):
            self.write(stable[len(self.text) :])
            self.text = stable

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding: without the prompt and the first token; None for fewer than two tokens."""
        if len(self.times) < 2 or self.times[-1] == self.times[0]:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def encode_prompt(
    tokenizer: Any, prompt: str, chat: bool | None = None, system: str | None = None
) -> tuple[torch.Tensor, bool]:
    """(ids int64 [1, T], whether the chat template was used). chat None: used when the tokenizer has one.

    Raises: ValueError (chat without a template, system without chat, empty prompt).
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        requirement = "--chat needs a tokenizer with a chat template"
        raise ValueError(message("generate", requirement, "one without", "Use --no-chat."))
    use_chat = has_template if chat is None else chat
    if system and not use_chat:
        raise ValueError(message("generate", "--system needs a chat template", "plain text", "Drop --system."))
    if use_chat:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    require(len(ids) > 0, "generate", "the prompt must have at least one token", repr(prompt))
    return torch.tensor([ids], dtype=torch.int64), use_chat


def generate(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    write: Callable[[str], None] = lambda text: None,
) -> Streamer:
    """Generate from ids [1, T], passing text to `write` as it comes; temperature 0 is greedy."""
    torch.manual_seed(seed)
    streamer = Streamer(tokenizer, write)
    ids = ids.to(model.device)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            **sampling,
        )
    return streamer
