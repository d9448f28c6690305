"""``select_memory``: straight-through top-k beside the dense formulation, and how much memory each takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clara_fast import ops
from clara_fast.benchmarks import machine
from clara_fast.benchmarks.harness import (
    OURS,
    Bar,
    Case,
    Contest,
    Floor,
    Options,
    Result,
    accuracy_check,
    cast,
    dtype_name,
    judge,
    with_gradients,
)
from clara_fast.benchmarks.machine import Ceilings
from clara_fast.benchmarks.timing import Clock
from clara_fast.ops import reference

WORK = "select_memory"
DENSE = "dense straight-through"
TEMPERATURE = 0.02


def cases(options: Options) -> Iterator[Case | MemoryCase]:
    both = (torch.float32, torch.bfloat16)
    for model, hidden, candidates, k, usual in (
        ("SmolLM2", 576, 20, 5, both),
        ("SmolLM2", 576, 200, 10, both[:1]),
        ("Mistral-7B", 4096, 20, 5, both[1:]),
    ):
        if options.quick:
            hidden, candidates, k = hidden // 18, 12, min(k, 6)
        for dtype in options.dtypes(*usual):
            shape = (4, candidates, 16, hidden)
            name = f"{model}, {dtype_name(dtype)}, 4 questions x {candidates} memories, k = {k}"
            yield Case(WORK, name, partial(contest, options, shape, k, dtype))
    if torch.float32 in options.dtypes(torch.float32):
        yield MemoryCase()


def dense(query: Tensor, memory: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Soft weights ``[B, k, N]`` with hard values, for all questions at once; selected memories and cosines."""
    scores = F.cosine_similarity(query.unsqueeze(1), memory.flatten(2), dim=-1)
    logits, slots = scores / TEMPERATURE, []
    for _ in range(k):
        soft = logits.softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        slots.append(hard + soft - soft.detach())
        logits = logits.masked_fill(hard.bool(), -torch.inf)
    return torch.einsum("bkn,bnmd->bkmd", torch.stack(slots, 1), memory), scores


def selected_by(op: Callable[..., tuple[Tensor, Tensor, Tensor]], k: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def select(query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        selected, _, scores = op(query, memory.flatten(2), memory, k, temperature=TEMPERATURE)
        return selected, scores

    return select


def contest(options: Options, shape: tuple[int, int, int, int], k: int, dtype: torch.dtype) -> Contest:
    batch, candidates, num_memory, hidden = shape
    shared = torch.randn(num_memory, hidden)
    # Memories share a large mean, so that the softmax at temperature 0.02 is not one-hot.
    leaves = [(3 * shared + torch.randn(batch, num_memory, hidden)).flatten(1), 3 * shared + torch.randn(*shape)]
    leaves = [leaf.to(options.device) for leaf in cast(leaves, dtype)]
    upstream = [torch.randn(batch, k, num_memory, hidden), torch.randn(batch, candidates)]
    upstream = [gradient.to(options.device) for gradient in upstream]
    calls = {
        OURS: partial(with_gradients, selected_by(ops.select_memory, k), leaves, upstream),
        DENSE: partial(with_gradients, partial(dense, k=k), leaves, upstream),
    }
    reference_op = selected_by(reference.select_memory, k)
    eager = partial(with_gradients, reference_op, leaves, upstream)
    exact = partial(with_gradients, reference_op, cast(leaves, torch.float64), upstream)
    bars = [Bar("5x the dense formulation", "ratio", 5, (DENSE,))]
    return Contest(calls, accuracy_check(calls, eager, exact), floor(leaves[1], k), bars)


def floor(memory: Tensor, k: int) -> Floor:
    """Forward reads the candidates (keys and memories are one) and writes k; backward reads them and k gradients.

    Backward writes one gradient of the candidates. Operations: a product and a norm for each candidate, k products
    with incoming gradients, and three terms of the gradient.
    """
    batch, _, num_memory, hidden = memory.shape
    whole = memory.numel() * memory.element_size()
    chosen = batch * k * num_memory * hidden * memory.element_size()
    flops = memory.numel() * (4 + 2 * k + 6)
    return Floor(2 * whole + 2 * chosen, whole + chosen, flops, dtype_name(memory.dtype))


# Extra memory: what a step takes at its peak beyond inputs and outputs, for few and for many slots


@dataclass(frozen=True)
class MemoryCase:
    """Narrow memories and many candidates, so that a tensor ``[B, k, N]`` would stand out."""

    work: str = WORK
    name: str = "extra memory, 8 questions x 4096 memories, k = 64 beyond k = 8"
    shape: tuple[int, int, int, int] = (8, 4096, 1, 8)
    slots: tuple[int, int] = (8, 64)

    def run(self, options: Options, clock: Clock, ceilings: Ceilings) -> Result:
        grid = 4 * self.shape[0] * (self.slots[1] - self.slots[0]) * self.shape[1]
        bar = Bar("independent of k*N (a tenth of [B, k, N])", "bytes", 0.1 * grid)
        result = Result(self.work, self.name, unit="bytes", notes={"one [B, k, N]": grid})
        extra = self._extra(options)
        result.notes["extra bytes"] = extra
        few, many = map(str, self.slots)
        result.measured = {name: float(max(found[many] - found[few], 0)) for name, found in extra.items()}
        result.clocks = dict.fromkeys(extra, "CUDA allocator" if options.device.type == "cuda" else "resident set")
        result.verdicts = [judge(bar, result)]
        return result

    def _extra(self, options: Options) -> dict[str, dict[str, int]]:
        if options.device.type == "cuda":
            return {name: self.extra_of(name, options.device) for name in (OURS, DENSE)}
        # Each contestant in a process of its own: what is freed has to leave the resident set, which is slow.
        found = {}
        for name in (OURS, DENSE):
            command = [sys.executable, "-m", "clara_fast.benchmarks.select_memory", name, str(torch.get_num_threads())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"extra memory of {name} was not measured:\n{done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
        return found

    def extra_of(self, name: str, device: torch.device) -> dict[str, int]:
        """Bytes by number of slots: the peak of forward and backward less inputs, outputs and gradients."""
        leaves = [torch.randn(self.shape[0], self.shape[2] * self.shape[3]), torch.randn(*self.shape)]
        leaves = [leaf.to(device) for leaf in leaves]
        found = {}
        # From one slot up: what an allocator keeps of a smaller step cannot hide what a larger one takes.
        for k in (1, *self.slots):
            select = selected_by(ops.select_memory, k) if name == OURS else partial(dense, k=k)
            upstream = [torch.randn(self.shape[0], k, *self.shape[2:]), torch.randn(*self.shape[:2])]
            upstream = [gradient.to(device) for gradient in upstream]
            found[str(k)] = _peak(partial(with_gradients, select, leaves, upstream), device)
        return found


def _peak(step: Callable[[], Any], device: torch.device) -> int:
    outputs: list[Any] = []
    found = machine.peak_of(lambda: outputs.extend(step()), device)
    return found["peak"] - found["before"] - sum(out.numel() * out.element_size() for out in outputs)


def _measure_alone(name: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    machine.return_freed_memory()
    print(json.dumps(MemoryCase().extra_of(name, torch.device("cpu"))))


if __name__ == "__main__":
    _measure_alone(*sys.argv[1:])
