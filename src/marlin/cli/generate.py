"""`marlin generate`: text from a dense or compressed model directory, streamed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import typer

from marlin.cli.common import choose_device, choose_dtype, note, print_json


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
    from marlin.demo import models

    models.check_model_directory(directory)
    chosen = choose_device(device)
    model, tokenizer = models.load_model(directory, chosen, choose_dtype(dtype, chosen))
    text = sys.stdin.read() if prompt == "-" else prompt
    ids, used_chat = models.encode_prompt(tokenizer, text, chat, system)
    path = models.path_that_runs(model)
    if not as_json:
        note(f"path: {path}")
    started = time.perf_counter()
    streamer = models.generate(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        write=(lambda _: None) if as_json else _write,
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
