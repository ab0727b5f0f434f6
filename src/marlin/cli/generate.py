"""`marlin generate`: text from a dense or compressed model directory, streamed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from marlin.cli.common import (
    choose_device,
    choose_dtype,
    load_model,
    note,
    path_that_runs,
    print_json,
)
from marlin.errors import message, require

if TYPE_CHECKING:
    import torch


class Streamer:
    """The `streamer` of transformers' generate: writes text as tokens arrive, counts them and their time."""

    def __init__(self, tokenizer: Any, write: Any) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # transformers puts the prompt first
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self.times.append(time.perf_counter())
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True), final=False)

    def _show(self, text: str, final: bool) -> None:
        # Why: a character of several tokens decodes to U+FFFD until its last token is there.
        stable = text if final else text.rstrip("\ufffd")
        if len(stable) > len(self.text) and stable.startswith(self.text):
            self.write(stable[len(self.text) :])
            self.text = stable

    def end(self) -> None:
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True), final=True)

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding: without the prompt and the first token; None for fewer than two tokens."""
        if len(self.times) < 2 or self.times[-1] == self.times[0]:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def encode_prompt(
    tokenizer: Any, prompt: str, chat: bool | None, system: str | None = None
) -> tuple[torch.Tensor, bool]:
    """(ids int64 [1, T], whether the chat template was used). chat None: used when the tokenizer has one.

    Raises: ValueError (chat asked for without a template, system without chat, empty prompt).
    """
    import torch

    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        fix = "Use --no-chat."
        raise ValueError(message("generate", "--chat needs a tokenizer with a chat template", "one without", fix))
    use_chat = has_template if chat is None else chat
    if system and not use_chat:
        raise ValueError(message("generate", "--system needs a chat template", "plain text generation"))
    if use_chat:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    require(len(ids) > 0, "generate", "the prompt must have at least one token", repr(prompt))
    return torch.tensor([ids], dtype=torch.int64), use_chat


def run_generation(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    write: Any = None,
) -> Streamer:
    """Generate from ids [1, T] and return the finished streamer; temperature 0 is greedy."""
    import torch

    torch.manual_seed(seed)
    streamer = Streamer(tokenizer, write or (lambda text: None))
    ids = ids.to(model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def generate(
    directory: Path = typer.Argument(..., help="Model directory, dense or compressed."),
    prompt: str = typer.Argument(..., help="The prompt; - reads it from stdin."),
    max_new_tokens: int = typer.Option(128, "--max-new-tokens", "-n", min=1, help="Most tokens to generate."),
    chat: bool | None = typer.Option(
        None, "--chat/--no-chat", help="Wrap the prompt in the chat template; default: when there is one."
    ),
    system: str | None = typer.Option(None, "--system", help="System message of the chat."),
    temperature: float = typer.Option(0.0, "--temperature", "-t", min=0.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, "--top-p", min=0.0, max=1.0, help="Nucleus sampling, with --temperature."),
    seed: int = typer.Option(0, "--seed", help="Of sampling."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    dtype: str = typer.Option("auto", "--dtype", help="auto, float16, bfloat16 or float32."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of streaming."),
) -> None:
    """Generate text, streamed to stdout; speed and path go to stderr.

    \b
    Examples:
      marlin generate demo-out/mixed "Why is the sky blue?"
      marlin generate OUT "Once upon a time" --no-chat -n 64 -t 0.7 --top-p 0.9
    """
    chosen = choose_device(device)
    model, tokenizer = load_model(directory, chosen, choose_dtype(dtype, chosen))
    text = sys.stdin.read() if prompt == "-" else prompt
    ids, used_chat = encode_prompt(tokenizer, text, chat, system)
    path = path_that_runs(model)
    if not as_json:
        note(f"path: {path}")
    started = time.perf_counter()
    streamer = run_generation(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        write=None if as_json else _write,
    )
    rate = streamer.tokens_per_second
    if as_json:
        print_json(
            {
                "text": streamer.text,
                "prompt_tokens": ids.shape[1],
                "new_tokens": len(streamer.ids),
                "seconds": round(time.perf_counter() - started, 3),
                "tokens_per_second": None if rate is None else round(rate, 2),
                "chat": used_chat,
                "path": path,
            }
        )
        return
    _write("\n")
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    note(f"{ids.shape[1]} prompt tokens, {len(streamer.ids)} new tokens{speed}")
