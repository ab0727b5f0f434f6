"""The command line: text in, text out, over the public names of the other rooms.

Owns the commands, what they print, and how an error is shown. Everything heavy (torch, transformers) is imported
inside the commands, so that `marlin --help` is immediate.
"""

from __future__ import annotations

import warnings

import typer

from marlin.cli import bench, compress, convert, demo, doctor, evaluate, generate, inspect, kernels, recover
from marlin.cli.common import Group, set_debug, version_text

app = typer.Typer(
    name="marlin",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_text())
        raise typer.Exit


@app.callback()
def root(
    debug: bool = typer.Option(False, "--debug", envvar="MARLIN_DEBUG", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """INT4 weights with 2:4 sparsity for language models: compress, save, load, generate, measure.

    \b
    Examples:
      marlin demo
      marlin compress MODEL OUT --recipe sp24-int4 --calibration text.txt
      marlin generate OUT "Why is the sky blue?"
      marlin doctor
    """
    set_debug(debug)


app.command("compress")(compress.compress)
app.command("recover")(recover.recover)
app.command("convert")(convert.convert)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.add_typer(kernels.app, name="kernels")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def main() -> None:
    """Entry point of the `marlin` command; warnings are one line each."""
    warnings.formatwarning = lambda text, category, *_: f"{category.__name__}: {text}\n"
    app()


__all__ = ["app", "main"]
