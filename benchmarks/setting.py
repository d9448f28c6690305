"""What the benchmarks of a whole model share: their options, the base model, and the limits of agreement."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from clara_fast.benchmarks import inputs, machine
from clara_fast.benchmarks.harness import Options, dtype_name, wanted
from clara_fast.benchmarks.ops import add_options
from clara_fast.benchmarks.report import Report
from clara_fast.benchmarks.timing import clock_for

REPETITIONS = 3
# Relative errors up to which both sides count as equal. Gradients pass the softmax at temperature 0.02, which enlarges
# rounding; bfloat16 rounds in different places on the two sides.
LIMITS = {
    torch.float32: {"memory": 1e-4, "loss": 1e-5, "gradient": 2e-3},
    torch.bfloat16: {"memory": 5e-2, "loss": 2e-2, "gradient": 3e-1},
}


@dataclass(frozen=True)
class Setting:
    """What was asked for, and the base model's folder."""

    options: Options
    base: Path

    @property
    def dtype(self) -> torch.dtype:
        return self.options.dtype or torch.float32

    def again(self) -> list[str]:
        """The options that give another process the same setting."""
        options = self.options
        line = ["--base", str(self.base), "--dtype", dtype_name(self.dtype), "--device", str(options.device)]
        return [*line, "--threads", str(torch.get_num_threads()), *(["--quick"] if options.quick else [])]


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of a model has."""
    parser = argparse.ArgumentParser(description=description)
    add_options(parser)
    parser.add_argument("--only", help="cases whose name holds these words: answer, 'joint 16x', 'peak memory'")
    parser.add_argument("--base", type=Path, help="folder of a causal language model (default: a random Llama)")
    parser.add_argument("--layers", type=int, default=6, help="of the random Llama; 30 is SmolLM2-135M's shape")
    return parser


def options_of(parsed: argparse.Namespace) -> Options:
    """What was parsed, for the harness."""
    repetitions = parsed.repetitions or (1 if parsed.quick else REPETITIONS)
    return Options.of(parsed.device, parsed.dtype, threads=parsed.threads, quick=parsed.quick, repetitions=repetitions)


def check(options: Options, only: str | None, names: Sequence[str]) -> None:
    """Raises ``ValueError`` where nothing is called so, or the dtype is not one that both sides compute in."""
    if not any(wanted(only, name) for name in names):
        raise ValueError(f"--only ({only}) leaves no case; there are {', '.join(names)}")
    if options.dtype not in (None, *LIMITS):
        raise ValueError(f"--dtype ({dtype_name(options.dtype)}) must be float32 or bfloat16 for the model")


@contextmanager
def prepared(
    title: str, options: Options, base: Path | None, layers: int, size: Any, console: Console, **facts: Any
) -> Iterator[tuple[Report, Path, Path]]:
    """A report that knows its machine, the base model's folder (default: a random one's), and a scratch folder."""
    # Documents that fill the compressor's length are meant to be cut.
    warnings.filterwarnings("ignore", message=".*were cut to doc_max_length")
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        description = str(base)
        if base is None:
            base = Path(scratch) / "base"
            description = inputs.write_random_base(base, layers, tiny=options.quick)
        known = {**machine.facts(options.device), "base": description}
        known |= {"dtype": dtype_name(options.dtype or torch.float32), "quick": options.quick, "dropout": 0}
        known |= {**facts, "size": asdict(size)}
        clock = clock_for(options.device, shortest=0.0)
        ceilings = machine.measure_ceilings(options.device, clock, quick=options.quick)
        yield Report(f"{title} on {options.device.type}", known, ceilings, console), base, Path(scratch)
