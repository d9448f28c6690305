"""Interleaved timing on a CPU or a GPU: median and spread of the seconds that a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Sampler = Callable[[], float]
FEWEST_SAMPLES = 3


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the repetitions."""

    median: float
    p20: float
    p80: float
    repetitions: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3], len(samples))


class WallClock:
    """For CPUs. Calls shorter than ``shortest`` seconds are repeated within a sample."""

    def __init__(self, shortest: float = 0.03) -> None:
        self.shortest = shortest

    def sampler(self, call: Call) -> tuple[Sampler, str]:
        def sample(loops: int) -> float:
            started = time.perf_counter()
            for _ in range(loops):
                call()
            return (time.perf_counter() - started) / loops

        loops = max(1, round(self.shortest / max(sample(1), 1e-7))) if self.shortest else 1
        return lambda: sample(loops), "wall clock"


class CudaClock:
    """For NVIDIA GPUs: events around one call that starts with a cold L2 cache.

    The call is replayed from a CUDA graph, so that no launch from Python is in the time; a call that cannot be
    captured, or with ``capture=False``, is launched between the events.
    """

    def __init__(self, device: torch.device, *, capture: bool = True) -> None:
        self.device, self.capture = device, capture
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # Writing more than the cache holds leaves nothing of the inputs in it.
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)

    def sampler(self, call: Call) -> tuple[Sampler, str]:
        run, clock = self._captured(call) if self.capture else (call, "CUDA events")

        def sample() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        sample()
        return sample, clock

    def _captured(self, call: Call) -> tuple[Call, str]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
            graph.replay()
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return call, "CUDA events"
        return graph.replay, "CUDA graph"


Clock = WallClock | CudaClock


def clock_for(device: torch.device, *, shortest: float = 0.03, capture: bool = True) -> Clock:
    return CudaClock(device, capture=capture) if device.type == "cuda" else WallClock(shortest)


def interleaved(
    calls: Mapping[str, Call], clock: Clock, *, repetitions: int, budget: float = float("inf")
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time the contestants in turn, so that a busy machine slows all of them; also says how each was timed.

    Args:
        calls: what to call, by name. They must be warm: checking their results before does that.
        clock: how one call is timed.
        repetitions: of the whole round; every other round runs in reverse order.
        budget: seconds after which a slow contestant, once it has a few samples, leaves the later rounds to others.
    """
    samplers, clocks = {}, {}
    for name, call in calls.items():
        samplers[name], clocks[name] = clock.sampler(call)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for repetition in range(repetitions):
        names = list(calls)
        for name in reversed(names) if repetition % 2 else names:
            if len(samples[name]) >= FEWEST_SAMPLES and spent[name] > budget:
                continue
            started = time.perf_counter()
            samples[name].append(samplers[name]())
            spent[name] += time.perf_counter() - started
    return {name: Timing.of(seconds) for name, seconds in samples.items()}, clocks


def duration(seconds: float) -> str:
    """With three digits and the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
