"""What a call costs beyond the kernel that it calls, in inference mode: on inputs so small that nothing else shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from clara_fast import ops
from clara_fast.benchmarks.harness import OURS, Bar, Options, Result, Verdict, judge
from clara_fast.benchmarks.machine import Ceilings
from clara_fast.benchmarks.timing import Call, Clock, Timing, WallClock, interleaved
from clara_fast.ops import ContextLayout, _library

WORK = "call overhead"
RAW = "raw kernel call"
BAR = Bar("under 5 us beyond the raw call", "seconds", 5e-6)


@dataclass(frozen=True)
class OverheadCase:
    """``contest`` makes the call of the op; the raw call is what it was seen to make in turn."""

    name: str
    call: Callable[[torch.device], Call]
    work: str = WORK

    def run(self, options: Options, clock: Clock, ceilings: Ceilings) -> Result:
        result = Result(self.work, self.name)
        with torch.inference_mode():
            call = self.call(options.device)
            raw = raw_call(call)
            if raw is None:
                why = f"{BAR.text}: not judged (it makes no single call of a kernel of ours)"
                result.absent[RAW] = "not a single call of a kernel of ours"
                result.verdicts = [Verdict(BAR.text, BAR.required, None, None, why)]
                return result
            # On a GPU the time of launching, since the kernels themselves run behind.
            wait = partial(torch.cuda.synchronize, options.device) if options.device.type == "cuda" else None
            calls = {"op": launched(call, wait), RAW: launched(raw, wait)}
            timings, _ = interleaved(calls, WallClock(0.0), repetitions=3 if options.quick else 41)
        per_call = {name: _divided(timing) for name, timing in timings.items()}
        # Of the quiet samples: microseconds drown in what else a machine does.
        beyond = per_call["op"].p20 - per_call[RAW].p20
        result.measured = {OURS: beyond, **per_call}
        result.outside = ("op", RAW)
        result.clocks = dict.fromkeys(result.measured, f"wall clock over {CALLS} calls")
        result.verdicts = [judge(BAR, result, quick=options.quick)]
        return result


CALLS = 200


def launched(call: Call, wait: Call | None) -> Call:
    def many() -> None:
        for _ in range(CALLS):
            call()

    return many if wait is None else lambda: (many(), wait())


def _divided(timing: Timing) -> Timing:
    return Timing(timing.median / CALLS, timing.p20 / CALLS, timing.p80 / CALLS, timing.repetitions)


def raw_call(call: Call) -> Call | None:
    """The one call of a native kernel or Triton launcher that ``call`` makes; None if it makes none, or several."""
    with _recording() as seen:
        call()
    return seen[0] if len(seen) == 1 else None


@contextmanager
def _recording() -> Iterator[list[Call]]:
    seen: list[Call] = []

    def recorded(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            seen.append(partial(kernel, *arguments, **named))
            return kernel(*arguments, **named)

        return call

    class Launchers:
        def __init__(self, module: Any) -> None:
            self.module = module

        def __getattr__(self, name: str) -> Any:
            return recorded(getattr(self.module, name))

    def launchers(*arguments: Any) -> Launchers | None:
        module = triton(*arguments)
        return module and Launchers(module)

    kept = {name: getattr(_library, name) for name in ("native", "native_cuda", "triton_kernels")}
    triton = _library.triton_kernels
    _library.triton_kernels = launchers
    for kernels in ("native", "native_cuda"):
        setattr(_library, kernels, {name: recorded(kernel) for name, kernel in kept[kernels].items()})
    try:
        yield seen
    finally:
        for name, value in kept.items():
            setattr(_library, name, value)


def cases(options: Options) -> Iterator[OverheadCase]:
    for name, call in (
        ("pool_memory", _pool_memory),
        ("cosine_topk", _cosine_topk),
        ("select_memory", _select_memory),
        ("compressed_context_attention", _attention),
    ):
        yield OverheadCase(name, call)


def _pool_memory(device: torch.device) -> Call:
    hidden = torch.randn(8, 16, device=device)
    offsets = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    return lambda: ops.pool_memory(hidden, offsets, 2)


def _cosine_topk(device: torch.device) -> Call:
    queries, keys = torch.randn(1, 16, device=device), torch.randn(16, 16, device=device)
    return lambda: ops.cosine_topk(queries, keys, 2)


def _select_memory(device: torch.device) -> Call:
    query, memory = torch.randn(1, 16, device=device), torch.randn(1, 4, 2, 8, device=device)
    keys = memory.flatten(2)
    return lambda: ops.select_memory(query, keys, memory, 2)


def _attention(device: torch.device) -> Call:
    query = torch.randn(2, 2, 16, device=device)
    key, value = torch.randn(2, 8, 2, 16, device=device).unbind()
    layout = ContextLayout.padded([4, 4], 4, q_lengths=1, device=device)
    return lambda: ops.compressed_context_attention(query, key, value, layout)
