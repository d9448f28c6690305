"""The store at size: opening, searching from the disk's pages, and what that keeps in memory.

    python benchmarks/store.py [--quick] [--only words] [--folder FOLDER] [--json FILE]

Random memories are written to a folder first (up to 2 GB, removed afterwards), then searched through the memory map
as any store is: as is usual, with nothing kept mapped between searches, and with all of it. Beside that: the same
numbers held in memory, given to the operator alone and multiplied by torch. For what the formats cost in ranking and
answers, see store_formats.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from clara_fast import MemoryStore, ops
from clara_fast.benchmarks import machine
from clara_fast.benchmarks.harness import (
    OURS,
    Bar,
    Case,
    Contest,
    Disagreement,
    Floor,
    Options,
    Result,
    in_one_line,
    judge,
    wanted,
)
from clara_fast.benchmarks.ops import add_options, quick_options
from clara_fast.benchmarks.report import Report
from clara_fast.benchmarks.timing import clock_for
from clara_fast.store.formats import format_of

K = 10
KEEPING_NOTHING, KEEPING_ALL = "clara_fast, nothing kept", "clara_fast, all kept"
BARE, PEER = "the operator, in memory", "torch bfloat16, in memory"
BATCHES = (1, 8, 64)
OPEN_BAR, SHARE_BAR, MEMORY_BAR = 1.0, 0.8, 256e6


@dataclass(frozen=True)
class Size:
    """A store of ``documents`` memories of ``[num_memory, hidden_size]`` in shards of ``shard`` documents."""

    documents: int
    num_memory: int
    hidden_size: int
    shard: int
    dtype: str = "bfloat16"

    @property
    def columns(self) -> int:
        return self.num_memory * self.hidden_size

    @property
    def name(self) -> str:
        count = f"{self.documents // 1000}k" if self.documents >= 1000 else str(self.documents)
        return f"{self.dtype}, {count} documents of {self.columns}"


SIZES = [
    Size(100_000, 1, 576, 1 << 16),
    Size(1_000_000, 1, 576, 1 << 16),
    Size(100_000, 16, 576, 1 << 13),
    Size(1_000_000, 1, 576, 1 << 16, "int8"),
]
QUICK = [Size(300, 2, 64, 100), Size(300, 2, 64, 100, "int8")]


class Stored:
    """A store of random memories, made when it is first asked for."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size, self.path = size, folder / size.name.replace(" ", "-").replace(",", "")

    @cached_property
    def store(self) -> MemoryStore:
        size = self.size
        config = SimpleNamespace(num_memory=size.num_memory, hidden_size=size.hidden_size)
        writer = SimpleNamespace(fingerprint="benchmark", config=config)
        generator = torch.Generator().manual_seed(0)
        shape = (size.num_memory, size.hidden_size)
        base = torch.randn(size.shard, *shape, generator=generator).bfloat16()
        with MemoryStore.create(self.path, WeakWriter(writer), dtype=size.dtype) as store:
            for start in range(0, size.documents, size.shard):
                names = [str(i) for i in range(start, min(start + size.shard, size.documents))]
                # Other signs for each shard: as good as new numbers, and a tenth of the time.
                signs = torch.randint(0, 2, shape, generator=generator).bfloat16() * 2 - 1
                store.add(names, [f"Document {name}." for name in names], base[: len(names)] * signs)
        return MemoryStore.open(self.path)

    def blocks(self) -> Iterator[Tensor]:
        """What is stored, ``[n, R]`` at a time, in the dtype that ``memory`` gives."""
        for start in range(0, self.size.documents, 1 << 14):
            rows = range(start, min(start + (1 << 14), self.size.documents))
            yield self.store.memory(rows).flatten(1)

    def copied(self) -> tuple[Tensor, Tensor | None]:
        """Keys ``[n, R]`` and scales ``[n, m]`` as they are stored, in memory."""
        shards = [shard.rows for shard in self.store._snapshot.shards]
        scales = [rows.scales for rows in shards if rows.scales is not None]
        return torch.cat([rows.memory.flatten(1) for rows in shards]), torch.cat(scales) if scales else None

    def remove(self) -> None:
        self.__dict__.pop("store", None)
        shutil.rmtree(self.path, ignore_errors=True)


class WeakWriter:
    """What a store asks of a model."""

    def __init__(self, facts: SimpleNamespace) -> None:
        self.fingerprint, self.config = facts.fingerprint, facts.config


def search_contest(stored: Stored, batch: int) -> Contest:
    """Search through the map, its pages in the system's cache, beside torch on normalised keys that it holds."""
    size, store = stored.size, stored.store
    queries = torch.randn(batch, size.columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    others = {
        name: MemoryStore.open(store.path).to("cpu", resident_bytes=room)
        for name, room in ((KEEPING_NOTHING, 0), (KEEPING_ALL, 1 << 62))
    }
    keys, scales = stored.copied()
    calls = {
        OURS: lambda: store.topk(queries, K),
        **{name: partial(other.topk, queries, K) for name, other in others.items()},
        BARE: lambda: ops.cosine_topk(queries, keys, K, key_scales=scales),
    }
    if size.dtype == "bfloat16":
        unit = torch.cat([F.normalize(keys.float()).bfloat16() for keys in stored.blocks()])
        unit_queries = F.normalize(queries.float()).bfloat16()
        calls[PEER] = lambda: (unit_queries @ unit.T).topk(K, dim=1)
    wide = F.normalize(queries.double())
    cosines = torch.cat([wide @ F.normalize(keys.double()).T for keys in stored.blocks()], dim=1)
    exact = cosines.topk(K, dim=1)

    def check(name: str) -> float:
        scores, rows = calls[name]()
        error = float((scores.double() - exact.values).abs().max())
        allowed = 2e-2 if name == PEER else 2e-6
        if not error <= allowed:
            raise Disagreement(f"{name}: scores differ by {error:.1g}; no speed is reported")
        if name != PEER and float((cosines.gather(1, rows) - exact.values).abs().max()) > allowed:
            raise Disagreement(f"{name}: the rows are not those of the scores; no speed is reported")
        return error

    width = format_of(size.dtype).dtype.itemsize
    read = size.documents * (size.columns * width + (4 * size.num_memory if width == 1 else 0))
    floor = Floor(read, flops=2 * batch * size.documents * size.columns, dtype="bfloat16")
    bars = [Bar("80 % of the read bandwidth", "share", SHARE_BAR)] if batch == 1 else []
    reading = machine.passes_of_reading(read, torch.device("cpu")) if bars else {}
    outside = (KEEPING_NOTHING, KEEPING_ALL, BARE)
    return Contest(calls, check, floor=floor, bars=bars, outside=outside, reading=reading)


def open_contest(stored: Stored) -> Contest:
    path, count = stored.store.path, stored.size.documents

    def check(name: str) -> None:
        if len(MemoryStore.open(path)) != count:
            raise Disagreement("the store does not hold what was written")

    calls = {OURS: lambda: MemoryStore.open(path)}
    return Contest(calls, check, bars=[Bar("under a second", "seconds", OPEN_BAR)])


def memory_result(stored: Stored, *, quick: bool) -> Result:
    """How far the resident set of this process rises while everything is searched, twice."""
    queries = torch.randn(1, stored.size.columns)
    result = Result("store", f"memory of a search, {stored.size.name}", unit="bytes")
    path = stored.store.path
    for name, room in ((OURS, None), (KEEPING_NOTHING, 0), (KEEPING_ALL, 1 << 62)):
        store = MemoryStore.open(path).to("cpu", resident_bytes=room)
        store.topk(queries, K, where={"id": ["0"]})  # what is loaded at first use is not meant
        before = machine.reset_peak_memory()
        for _ in range(2):
            store.topk(queries, K)
        result.measured[name] = float(max(machine.peak_memory() - before, 0))
        result.notes["bytes searched"] = store.stats()["memory_bytes"]
    result.outside = (KEEPING_NOTHING, KEEPING_ALL)
    result.verdicts = [judge(Bar("256 MB whatever the size", "bytes", MEMORY_BAR), result, quick=quick)]
    return result


def works(stored: Stored, options: Options) -> Iterator[tuple[str, Callable[..., Result]]]:
    """Names of what is measured, and what measures it from options, clock and ceilings."""
    name = stored.size.name
    memory = partial(memory_result, stored, quick=options.quick)
    yield f"memory of a search, {name}", lambda *_: memory()
    yield f"open, {name}", Case("store", f"open, {name}", partial(open_contest, stored)).run
    for batch in BATCHES:
        case = f"search, {name}, B = {batch}"
        yield case, Case("store", case, partial(search_contest, stored, batch)).run


def benchmark(options: Options, only: str | None, folder: Path, console: Console) -> Report:
    """Measure, store after store; each is removed before the next is written.

    Raises:
        ValueError: nothing is called so.
    """
    clock = clock_for(options.device, shortest=0.0 if options.quick else 0.03)
    facts = {**machine.facts(options.device), "quick": options.quick}
    found = Report("The store", facts, machine.measure_ceilings(options.device, clock, quick=options.quick), console)
    for size in QUICK if options.quick else SIZES:
        stored = Stored(size, folder)
        try:
            for name, measure in works(stored, options):
                if not wanted(only, f"store: {name}"):
                    continue
                try:
                    found.add(measure(options, clock, found.ceilings))
                except Exception as error:  # one that cannot even be set up must not hide the others
                    found.add(Result("store", name, refused=f"it failed: {in_one_line(error)}"))
        finally:
            stored.remove()
    if not found.results:
        raise ValueError(f"--only ({only}) leaves nothing")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--only", help="cases whose name holds these words: search, 'int8 B = 1'")
    parser.add_argument("--folder", type=Path, help="where the stores are written; default: the system's temporary one")
    parsed = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 160), highlight=False)
    try:
        others = quick_options(parsed.quick)
        if parsed.repetitions is not None:
            others["repetitions"] = parsed.repetitions
        options = Options.of(parsed.device, None, threads=parsed.threads, **others)
        if options.device.type != "cpu":
            raise ValueError("--device: the store is searched through the memory map here, on the CPU")
        with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
            found = benchmark(options, parsed.only, Path(folder), console)
    except ValueError as error:
        parser.error(str(error))
    return found.finish(console, parsed.json)


if __name__ == "__main__":
    sys.exit(main())
