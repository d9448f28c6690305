"""The commands put together, and how they fail."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from clara_fast.cli import (
    ask,
    bench,
    compress,
    convert,
    demo,
    evaluate,
    explain,
    index,
    info,
    inspect,
    search,
    synthesize,
    train,
)
from clara_fast.cli.output import error_line, show_warning

RUNTIME_ERROR, BAD_INPUT, INTERRUPTED = 1, 2, 130
DEBUG = "CLARA_FAST_DEBUG"

app = typer.Typer(
    name="clara-fast",
    help="Compress documents into memory tokens once; search them and answer from them in that form.",
    epilog=f"Exit codes: 0 done, {RUNTIME_ERROR} failed, {BAD_INPUT} wrong use or bad input, {INTERRUPTED} "
    "interrupted. Results go to stdout; progress, warnings and errors to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (demo, compress, search, index, ask, explain, inspect, info, bench, synthesize):
    app.command()(getattr(module, module.__name__.rpartition(".")[2]))
app.command("eval")(evaluate.evaluate)
for command in (convert.convert, convert.compact, convert.delete):
    app.command()(command)
app.add_typer(train.app, name="train")


def _print_version(wanted: bool) -> None:
    if wanted:
        from clara_fast import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.", envvar=DEBUG)] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before any command."""
    if debug:
        os.environ[DEBUG] = "1"


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never raises.

    Args:
        args: command line without the program's name; default ``sys.argv[1:]``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        warnings.showwarning = show_warning
        try:
            code = app(args=args, prog_name="clara-fast", standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except BrokenPipeError:  # the reader of our output has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return RUNTIME_ERROR
        except Exception as error:
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                traceback.print_exc()
            return _report(error)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code, without a word
        error_line("interrupted")
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    """Print ``error`` in one line; the exit code that it means."""
    if hasattr(error, "format_message"):  # the command line was not understood
        if message := error.format_message():  # empty where the help has been printed instead
            context = getattr(error, "ctx", None)
            error_line(message + (f" (see {context.command_path} --help)" if context else ""))
        return BAD_INPUT
    ours = type(error).__module__.startswith("clara_fast.")
    explained = ours or isinstance(error, ValueError | OSError | ImportError)
    error_line(str(error) if explained else f"{type(error).__name__}: {error} (clara-fast --debug shows where)")
    bad_input = ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError
    return BAD_INPUT if isinstance(error, bad_input) else RUNTIME_ERROR
