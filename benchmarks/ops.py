"""The operators alone, each beside what one would write without them.

    python benchmarks/ops.py [--only cosine] [--device cuda] [--quick] [--json FILE] [--plot FILE]

Results are checked against float64 before anything is timed: our error may be at most twice that of eager PyTorch in
the same dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from clara_fast.benchmarks import (
    answer_loss,
    call_overhead,
    compressed_context_attention,
    cosine_topk,
    few_rows_linear,
    machine,
    pool_memory,
    roofline,
    select_memory,
)
from clara_fast.benchmarks.harness import Options, Result, in_one_line, wanted
from clara_fast.benchmarks.report import Report
from clara_fast.benchmarks.timing import clock_for

MODULES = (
    call_overhead,
    pool_memory,
    select_memory,
    compressed_context_attention,
    cosine_topk,
    few_rows_linear,
    answer_loss,
)


def all_cases(options: Options, only: str | None = None) -> Iterator:
    """Those whose name holds every word of ``only``."""
    for module in MODULES:
        for case in module.cases(options):
            if wanted(only, f"{case.work}: {case.name}"):
                yield case


def benchmark(options: Options, only: str | None, console: Console) -> Report:
    """Run the cases; progress goes to ``console``.

    Raises:
        ValueError: no case is called so.
    """
    cases = list(all_cases(options, only))
    if not cases:
        raise ValueError(f"--only ({only}) and --dtype leave no case; the works are {', '.join(works())}")
    clock = clock_for(options.device, shortest=0.0 if options.quick else 0.03)
    facts = {**machine.facts(options.device), "quick": options.quick}
    found = Report(
        f"Operators on {options.device.type}",
        facts,
        machine.measure_ceilings(options.device, clock, quick=options.quick),
        console,
    )
    for case in cases:
        torch.manual_seed(0)
        try:
            result = case.run(options, clock, found.ceilings)
        except Exception as error:  # one that cannot even be set up must not hide the others
            result = Result(case.work, case.name, refused=f"it failed: {in_one_line(error)}")
        found.add(result)
    return found


def works() -> list[str]:
    return [module.WORK for module in MODULES]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that every script here has."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--dtype", help="cases in this dtype alone: float32, bfloat16, int8, float8")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--repetitions", type=int, help="samples of each contestant at most")
    parser.add_argument("--json", type=Path, help="also write the results here")


def quick_options(quick: bool) -> dict[str, Any]:
    """Of a run that only shows that everything works."""
    return {"quick": True, "compiled": False, "repetitions": 2} if quick else {}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--only", help="cases whose name holds these words: cosine, or 'cosine int8'")
    parser.add_argument("--plot", type=Path, help="also draw the roofline here (.png or .svg)")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="with torch.compile and FlexAttention (not if --quick)",
    )
    parsed = parser.parse_args(arguments)
    chosen = {"compiled": parsed.compiled, "repetitions": parsed.repetitions}
    console = Console(width=max(Console().width, 160), highlight=False)
    try:
        if parsed.plot:
            roofline.require(parsed.plot)
        others = quick_options(parsed.quick) | {name: value for name, value in chosen.items() if value is not None}
        options = Options.of(parsed.device, parsed.dtype, threads=parsed.threads, **others)
        found = benchmark(options, parsed.only, console)
    except (ValueError, roofline.NoPicture) as error:
        parser.error(str(error))
    code = found.finish(console, parsed.json)
    if parsed.plot:
        roofline.draw(found, parsed.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
