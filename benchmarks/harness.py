"""What every benchmark shares: a case, its check against float64, its floor, the bars it answers to, its result."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clara_fast.benchmarks.machine import Ceilings
from clara_fast.benchmarks.timing import Call, Clock, Timing, duration, interleaved

OURS = "clara_fast"
# Our error may be at most twice that of eager PyTorch in the same dtype. A peer may be less accurate than that, but
# must have computed the same thing.
OUR_FACTOR, PEER_FACTOR = 2, 16
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
}


class Disagreement(AssertionError):
    """A contestant computed something else, so its speed says nothing."""


class Unavailable(RuntimeError):
    """A contestant that this machine cannot run, and why."""


@dataclass(frozen=True)
class Options:
    """What the person asked for."""

    device: torch.device
    dtype: torch.dtype | None = None
    quick: bool = False
    # Peers that torch.compile makes take some 10 to 30 seconds each.
    compiled: bool = True
    # Samples of each contestant at most.
    repetitions: int = 15
    # Seconds that a contestant may take in one case once it has a few samples.
    budget: float = 0.6

    @classmethod
    def of(cls, device: str, dtype: str | None = None, *, threads: int | None = None, **others: Any) -> Options:
        """From the words of a command line; also sets the number of threads.

        Raises:
            ValueError: a device or dtype that is not there, or a number that is not positive.
        """
        try:
            place = torch.device(device)
        except RuntimeError:
            raise ValueError(f"--device ({device}) must be cpu, cuda, cuda:1, ...") from None
        cards = torch.cuda.device_count()
        if place.type != "cpu" and not (place.type == "cuda" and (place.index or 0) < cards):
            raise ValueError(f"--device ({device}) must be cpu or a CUDA GPU that torch sees ({cards})")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"--dtype ({dtype}) must be one of {', '.join(DTYPES)}")
        for name, value in (("threads", threads), ("repetitions", others.get("repetitions"))):
            if value is not None and value < 1:
                raise ValueError(f"--{name} ({value}) must be at least 1")
        if place.type == "cuda":
            torch.cuda.set_device(place)
        if threads:
            torch.set_num_threads(threads)
        return cls(place, DTYPES[dtype] if dtype else None, **{k: v for k, v in others.items() if v is not None})

    def compiled_peer(self, make: Callable[[], Any]) -> Any:
        """``make()``, unless such peers are left out."""
        if not self.compiled:
            raise Unavailable("left out, being compiled")
        return make()

    def dtypes(self, *usual: torch.dtype) -> Iterable[torch.dtype]:
        """Those of ``usual`` that were asked for."""
        return [dtype for dtype in usual if self.dtype in (None, dtype)]


@dataclass(frozen=True)
class Floor:
    """The least that any implementation must do: bytes read and written, operations, and their format."""

    read: int
    written: int = 0
    flops: int = 0
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def seconds(self, ceilings: Ceilings) -> tuple[float, str]:
        """At the measured rates, and which of them decides."""
        kind = "copy" if self.written else "read"
        moving = self.bytes / getattr(ceilings, kind)
        computing = self.flops / ceilings.matmul_rate(self.dtype)
        if moving >= computing:
            return moving, f"{kind} bandwidth"
        return computing, f"{'float32' if self.dtype == 'float32' else 'bfloat16'} matmul rate"


@dataclass(frozen=True)
class Bar:
    """A goal of design.md, section 9.

    Attributes:
        text: what it asks for, in words.
        kind: ``ratio`` (best peer / ours, at least), ``share`` (of the ceiling, at least), ``seconds`` or ``bytes``
            (of ours, at most).
        required: the number.
        peers: whom a ratio is against; all where empty.
    """

    text: str
    kind: str
    required: float
    peers: tuple[str, ...] = ()


def wanted(only: str | None, name: str) -> bool:
    """Whether a name holds all words of ``only``, each from the beginning of a word on and numbers to their end."""
    words = (only or "").lower().split()
    ends = [r"(?!\d)" if word[-1].isdigit() else "" for word in words]
    return all(
        re.search(rf"(?<![a-z0-9]){re.escape(word)}{end}", name.lower()) for word, end in zip(words, ends, strict=True)
    )


@dataclass(frozen=True)
class Verdict:
    """How a result stands to a bar; ``met`` is None where nothing could be judged, and ``text`` says why."""

    bar: str
    required: float
    value: float | None
    met: bool | None
    text: str


@dataclass
class Contest:
    """Contestants by name, ours first, on shared inputs.

    ``check(name)`` runs one of them and returns its error, if it has one of its own; it raises :class:`Disagreement`
    or :class:`Unavailable`.
    ``outside`` are contestants that compute something less than the others (rounded keys, for instance): they
    are shown, but are nobody's best peer. ``absent`` are those that are not here, and why.
    ``reading`` are passes over as many bytes as the floor reads, timed in turn with the others. The fastest is the
    ceiling then: on a machine that is shared, the bandwidth of a minute ago may be half or twice that of now.
    """

    calls: Mapping[str, Call]
    check: Callable[[str], float | None]
    floor: Floor | None = None
    bars: list[Bar] = field(default_factory=list)
    outside: tuple[str, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    reading: Mapping[str, Call] = field(default_factory=dict)


@dataclass
class Result:
    """One row. ``measured`` are timings in seconds, or bytes where ``unit`` says so; empty where it was refused."""

    work: str
    case: str
    unit: str = "seconds"
    measured: dict[str, Timing | float] = field(default_factory=dict)
    clocks: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    refused: str | None = None
    floor: Floor | None = None
    limit: str | None = None
    of_ceiling: float | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> float:
        found = self.measured[name]
        return found.median if isinstance(found, Timing) else found

    def ratio(self, peer: str) -> float:
        """How many times less ours takes."""
        return self.value(peer) / self.value(OURS) if self.value(OURS) else float("inf")

    def best_peer(self, peers: Iterable[str] = ()) -> str | None:
        known = [n for n in self.measured if n != OURS and (n in peers if peers else n not in self.outside)]
        return min(known, key=self.value, default=None)


@dataclass(frozen=True)
class Case:
    """Something to measure; its inputs are made when its turn comes."""

    work: str
    name: str
    contest: Callable[[], Contest]

    def run(self, options: Options, clock: Clock, ceilings: Ceilings) -> Result:
        contest = self.contest()
        outside = (*contest.outside, *contest.reading)
        result = Result(self.work, self.name, floor=contest.floor, outside=outside, notes=contest.notes)
        result.absent.update(contest.absent)
        if check_all(contest, result):
            calls = {name: call for name, call in contest.calls.items() if name in result.errors}
            calls |= contest.reading
            result.measured, result.clocks = interleaved(
                calls, clock, repetitions=options.repetitions, budget=options.budget
            )
            if contest.floor is not None:
                if contest.reading:
                    read = contest.floor.read / min(result.value(name) for name in contest.reading)
                    ceilings = replace(ceilings, read=read)
                seconds, result.limit = contest.floor.seconds(ceilings)
                result.of_ceiling = seconds / result.value(OURS)
        result.verdicts = [judge(bar, result, quick=options.quick) for bar in contest.bars]
        return result


def check_all(contest: Contest, result: Result) -> bool:
    """Whether ours is right. Peers that are wrong, or do not run here, are set aside with the reason."""
    for name in contest.calls:
        try:
            result.errors[name] = contest.check(name)
        except Exception as error:  # whatever a peer raises, the others still compete
            if name != OURS:
                result.absent[name] = in_one_line(error)
                continue
            result.refused = str(error) if isinstance(error, Disagreement) else f"it failed: {in_one_line(error)}"
            return False
    return True


def judge(bar: Bar, result: Result, *, quick: bool = False) -> Verdict:
    def unjudged(why: str) -> Verdict:
        return Verdict(bar.text, bar.required, None, None, f"{bar.text}: not judged ({why})")

    if result.refused:
        return unjudged("ours was refused")
    if quick:
        return unjudged("tiny sizes")
    if bar.kind == "ratio":
        peer = result.best_peer(bar.peers)
        if peer is None:
            missing = "; ".join(f"{name}: {result.absent.get(name, 'missing')}" for name in bar.peers)
            return unjudged(missing or "no peer ran")
        value, shown = result.ratio(peer), f"{result.ratio(peer):.2f}x"
    elif bar.kind == "share":
        assert result.of_ceiling is not None, "a bar on the ceiling needs a floor"
        value, shown = result.of_ceiling, f"{result.of_ceiling:.0%}"
    else:
        value = result.value(OURS)
        shown = duration(value) if bar.kind == "seconds" else size(value)
    met = value >= bar.required if bar.kind in ("ratio", "share") else value <= bar.required
    text = f"{bar.text}: {'met' if met else 'MISSED'}, {shown}"
    if not met:
        text += f" ({_short_by(bar, value)})"
    return Verdict(bar.text, bar.required, value, met, text)


def _short_by(bar: Bar, value: float) -> str:
    if bar.kind in ("ratio", "share"):
        return f"{1 - value / bar.required:.0%} short"
    return f"{value / bar.required:.1f} times as much" if bar.required else "not zero"


# Accuracy


def relative_error(mine: Tensor, other: Tensor) -> float:
    """Of the whole tensor, in the Euclidean norm."""
    mine, other = mine.detach().double(), other.detach().double()
    if mine.shape != other.shape:
        raise Disagreement(f"shapes differ: {list(mine.shape)} and {list(other.shape)}")
    scale = float(other.norm())
    error = float((mine - other).norm())
    return error / scale if scale else error


def require_close(name: str, mine: Tensor, other: Tensor, limit: float) -> float:
    """The relative error between two results; raises :class:`Disagreement` above ``limit``."""
    error = relative_error(mine, other)
    if not error <= limit:
        raise Disagreement(f"{name}: relative error {error:.2g} is above {limit:.2g}; no speed is reported")
    return error


def require_accurate(name: str, mine: Tensor, eager: Tensor, exact: Tensor, factor: float = OUR_FACTOR) -> float:
    """The error against float64 may be at most ``factor`` times that of eager PyTorch in this dtype, and rounding."""
    rounding = torch.finfo(mine.dtype).eps
    return require_close(name, mine, exact, factor * relative_error(eager, exact) + rounding)


def accuracy_check(
    calls: Mapping[str, Callable[[], tuple[Tensor, ...]]],
    eager: Callable[[], tuple[Tensor, ...]],
    exact: Callable[[], tuple[Tensor, ...]],
) -> Callable[[str], float]:
    """A check of every tensor that a contestant returns, against ``exact`` in float64 and ``eager`` in its dtype."""
    known: dict[str, tuple[Tensor, ...]] = {}

    def check(name: str) -> float:
        if not known:
            known.update(exact=exact(), eager=eager())
        mine = calls[name]()
        factor = OUR_FACTOR if name == OURS else PEER_FACTOR
        errors = [
            require_accurate(f"{name}, result {i}", *tensors, factor)
            for i, tensors in enumerate(zip(mine, known["eager"], known["exact"], strict=True))
        ]
        return max(errors)

    return check


def with_gradients(
    call: Callable[..., tuple[Tensor, ...]], leaves: Iterable[Tensor], upstream: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """Outputs and gradients of ``call(*leaves)``, computed in the dtype of the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = call(*leaves)
    gradients = torch.autograd.grad(
        outputs, leaves, [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)]
    )
    return *(out.detach() for out in outputs), *gradients


def without_gradients(call: Callable[..., tuple[Tensor, ...]], leaves: Iterable[Tensor]) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return call(*leaves)


def cast(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


# Words


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").removesuffix("_e4m3fn")


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def operations(count: float) -> str:
    for unit, factor in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} FLOP"


def in_one_line(error: Exception, longest: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(ValueError):
        text = text[: text.index(" Set TORCH")]
    return text if len(text) <= longest else text[: longest - 3] + "..."
