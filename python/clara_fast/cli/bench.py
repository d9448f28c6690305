"""``clara-fast bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clara_fast.cli.models import DeviceOption, JsonOption
from clara_fast.cli.output import note, print_json, stderr

if TYPE_CHECKING:
    from clara_fast.benchmarks.report import Report

PICTURE = Path("clara-fast-roofline.png")
WORKS = ("ops", "model", "all")


def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[ops|model|all]",
            help="The operators (about 5 minutes on a CPU), the model's work (as long again), or both.",
        ),
    ] = "ops",
    only: Annotated[str | None, typer.Option(help="Cases whose name holds these words: cosine, 'cosine int8'.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes, in a minute: shows that everything runs, not how fast.")
    ] = False,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="Cases in this dtype alone: float32, bfloat16, ...")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads on a CPU. Default: all cores.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the results here, as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help=f"Draw the operators' roofline here, .png or .svg. Default: {PICTURE}.")
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure the operators beside their peers (torch, FAISS, SDPA, ...) and this machine's ceilings.

    Every result is checked first, operators' against float64 and the model's against the baseline's; one that is wrong
    gets no speed, and the exit code is 1.
    """
    from rich.console import Console

    from clara_fast.benchmarks import report, roofline

    if what not in WORKS:
        raise ValueError(f"what to measure ({what}) must be one of {', '.join(WORKS)}")
    picture = _picture(what, plot, no_plot)
    found = _measure(what, only, device, dtype, quick=quick, threads=threads)
    if json:
        documents = [one.document() for one in found]
        print_json(documents[0] if len(documents) == 1 else documents)
    else:
        console = Console(width=max(Console().width, 140), highlight=False)
        for one in found:
            one.show(console)
    if output is not None:
        report.save(found, output)
    if picture is not None:
        try:
            roofline.draw(found[-1], picture)
            note(f"roofline drawn to {picture}")
        except roofline.NoPicture as error:
            if plot is not None:
                raise
            note(f"no roofline: {error}")
    if any(one.refused for one in found):
        raise typer.Exit(1)


def _picture(what: str, plot: Path | None, no_plot: bool) -> Path | None:
    """Where to draw; complains before anything is measured if what was asked for cannot be drawn."""
    from clara_fast.benchmarks import roofline

    if plot is None:
        return None if no_plot or what == "model" else PICTURE
    if no_plot or what == "model":
        raise ValueError(f"--plot ({plot}) does not go with {'--no-plot' if no_plot else 'model: it shows operators'}")
    roofline.require(plot)
    return plot


def _measure(
    what: str, only: str | None, device: str | None, dtype: str | None, *, quick: bool, threads: int | None
) -> list[Report]:
    import torch

    from clara_fast.benchmarks import model, ops, setting
    from clara_fast.benchmarks.harness import Options

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found: list[Any] = []
    if what in ("model", "all"):
        repetitions = 1 if quick else setting.REPETITIONS
        options = Options.of(place, dtype, threads=threads, quick=quick, repetitions=repetitions)
        found.append(model.benchmark(options, only, stderr))
    if what in ("ops", "all"):
        options = Options.of(place, dtype, threads=threads, **ops.quick_options(quick))
        found.append(ops.benchmark(options, only, stderr))
    return found
