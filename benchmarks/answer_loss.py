"""The answers' cross-entropy from the decoder's states and a frozen head: time, and memory beyond its inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clara_fast.benchmarks import machine
from clara_fast.benchmarks.harness import (
    DTYPES,
    OURS,
    Case,
    Contest,
    Floor,
    Options,
    Result,
    Unavailable,
    accuracy_check,
    dtype_name,
    with_gradients,
)
from clara_fast.benchmarks.machine import Ceilings
from clara_fast.benchmarks.timing import Clock
from clara_fast.modeling import answer_head

WORK = "answer_loss"
ALL_LOGITS, TORCH, LIGER = "all logits", "torch", "Liger"
Loss = Callable[[Tensor, Tensor, nn.Linear], Tensor]


def cases(options: Options) -> Iterator[Case]:
    vocabulary, hidden = (300, 32) if options.quick else (49152, 576)
    sizes = (8,) if options.quick else (64, 512)
    for dtype in options.dtypes(torch.float32, torch.bfloat16):
        for tokens in sizes:
            shape = (tokens, hidden, vocabulary)
            yield Case(WORK, f"{dtype_name(dtype)}, {tokens} tokens", partial(contest, options, shape, dtype))
    for dtype in options.dtypes(torch.float32):
        shape = (8 if options.quick else 4096, hidden, vocabulary)
        what = partial(contest, options, shape, dtype)
        yield MemoryCase(WORK, f"{dtype_name(dtype)}, {shape[0]} tokens, memory", what, shape, dtype)


def all_logits(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return F.cross_entropy(head(hidden).to(wide), labels, reduction="sum")


def by_torch(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head.weight, labels, reduction="sum", options=options)


def by_liger(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    if not hidden.is_cuda:
        raise Unavailable("its kernels are CUDA's")
    return answer_head.liger_cross_entropy(hidden, labels, head)


CONTESTANTS: dict[str, Loss] = {
    OURS: answer_head.answer_cross_entropy,
    ALL_LOGITS: all_logits,
    TORCH: by_torch,
    LIGER: by_liger,
}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, nn.Linear]:
    tokens, hidden, vocabulary = shape
    head = nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False).to(device, dtype)
    return torch.randn(tokens, hidden).to(device, dtype), torch.randint(vocabulary, (tokens,)).to(device), head


def contest(options: Options, shape: tuple[int, int, int], dtype: torch.dtype) -> Contest:
    states, labels, head = inputs(shape, dtype, options.device)
    exact_head = nn.Linear(shape[1], shape[2], bias=False, dtype=torch.float64, device=options.device)
    exact_head.requires_grad_(False).weight.copy_(head.weight)
    upstream = [torch.rand(()).to(options.device) + 0.5]

    def graded(loss: Loss, states: Tensor, head: nn.Linear) -> tuple[Tensor, ...]:
        return with_gradients(lambda hidden: (loss(hidden, labels, head),), [states], upstream)

    calls = {name: partial(graded, loss, states, head) for name, loss in CONTESTANTS.items()}
    check = accuracy_check(calls, calls[ALL_LOGITS], partial(graded, all_logits, states.double(), exact_head))
    tokens, hidden, vocabulary = shape
    # The head is read for the logits and again for the gradient.
    read = 2 * head.weight.numel() * head.weight.element_size()
    return Contest(calls, check, Floor(read, 0, 4 * tokens * hidden * vocabulary, dtype_name(dtype)))


@dataclass(frozen=True)
class MemoryCase(Case):
    """Peaks beyond the inputs, each contestant alone in a process of its own."""

    shape: tuple[int, int, int] = (0, 0, 0)
    dtype: torch.dtype = torch.float32

    def run(self, options: Options, clock: Clock, ceilings: Ceilings) -> Result:
        result = Result(self.work, self.name, unit="bytes")
        for name in CONTESTANTS:
            command = [sys.executable, "-m", "clara_fast.benchmarks.answer_loss", name, *map(str, self.shape)]
            command += [dtype_name(self.dtype), str(options.device)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                result.absent[name] = done.stderr.splitlines()[-1].split(": ", 1)[-1]
            else:
                result.measured[name] = float(json.loads(done.stdout.splitlines()[-1]))
        if OURS not in result.measured:
            result.refused = f"it failed: {result.absent.pop(OURS)}"
        return result


def peak(name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> int:
    """Bytes beyond the inputs of one loss with its gradient, after one on a single row has loaded what it needs."""
    machine.return_freed_memory()
    states, labels, head = inputs(shape, dtype, device)
    for rows in (1, shape[0]):
        leaf = states[:rows].clone().requires_grad_()
        found = machine.peak_of(partial(_step, CONTESTANTS[name], leaf, labels[:rows], head), device)
    return found["peak"] - found["before"]


def _step(loss: Callable[..., Tensor], *arguments: Tensor) -> None:
    loss(*arguments).backward()


if __name__ == "__main__":
    name, *numbers, dtype, device = sys.argv[1:]
    print(
        json.dumps(peak(name, (int(numbers[0]), int(numbers[1]), int(numbers[2])), DTYPES[dtype], torch.device(device)))
    )
