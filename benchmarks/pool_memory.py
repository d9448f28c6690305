"""``pool_memory``: memory rows and mean squared errors of packed documents, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clara_fast import ops
from clara_fast.benchmarks.harness import (
    OURS,
    Bar,
    Case,
    Contest,
    Floor,
    Options,
    Unavailable,
    accuracy_check,
    cast,
    dtype_name,
    with_gradients,
)
from clara_fast.ops import reference

WORK = "pool_memory"
Pool = Callable[..., tuple[Tensor, ...]]


def cases(options: Options) -> Iterator[Case]:
    both = (torch.float32, torch.bfloat16)
    for model, documents, hidden, usual in (("SmolLM2", 96, 576, both), ("Mistral-7B", 24, 4096, both[1:])):
        if options.quick:
            documents, hidden = 3, hidden // 9
        for dtype in options.dtypes(*usual):
            for norm in (False, True):
                name = f"{model}, {dtype_name(dtype)}, {'with RMSNorm, ' if norm else ''}{documents} documents"
                yield Case(WORK, name, partial(contest, options, documents, hidden, dtype, norm))


def indexed(offsets: Tensor, num_memory: int) -> Pool:
    """The fastest way in plain PyTorch that we know: one weighted ``index_add`` for all means.

    A slice per document, which is more obvious, writes a gradient of the whole input for each in backward.
    """
    lengths = offsets.diff().long()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    rows = (offsets[1:, None].long() + torch.arange(-num_memory, 0, device=offsets.device)).flatten()
    share = (1 / (lengths - num_memory))[segment].index_fill(0, rows, 0).unsqueeze(1)

    def pool(hidden: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        states = hidden if weight is None else reference.rms_norm(hidden, weight, 1e-6)
        memory = states.index_select(0, rows).view(len(lengths), num_memory, -1)
        document = states.new_zeros(len(lengths), states.shape[1])
        document = document.index_add(0, segment, states * share.to(states.dtype))
        return memory, (document - memory.mean(1)).float().square().mean(1)

    return pool


def contest(options: Options, documents: int, hidden: int, dtype: torch.dtype, norm: bool) -> Contest:
    device, num_memory = options.device, 4 if options.quick else 16
    lengths = torch.randint(138, 276, (documents,)) if not options.quick else torch.randint(9, 30, (documents,))
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    leaves = [torch.randn(int(lengths.sum()), hidden), *([torch.rand(hidden) + 0.5] if norm else [])]
    leaves = cast(leaves, dtype)
    upstream = [torch.randn(documents, num_memory, hidden), torch.randn(documents)]
    leaves, upstream = ([t.to(device) for t in tensors] for tensors in (leaves, upstream))

    def pooled_by(op: Callable[..., tuple[Tensor, Tensor]]) -> Pool:
        return lambda states, weight=None: op(states, offsets, num_memory, norm_weight=weight)

    eager = indexed(offsets, num_memory)
    pools = {OURS: pooled_by(ops.pool_memory), "eager": eager}
    absent = {}
    torch.compiler.reset()
    try:
        pools["torch.compile"] = options.compiled_peer(partial(torch.compile, eager, dynamic=False))
    except Unavailable as error:
        absent["torch.compile"] = str(error)
    calls = {name: partial(with_gradients, pool, leaves, upstream) for name, pool in pools.items()}
    exact = partial(with_gradients, pooled_by(reference.pool_memory), cast(leaves, torch.float64), upstream)
    check = accuracy_check(calls, calls["eager"], exact)
    bars = [Bar("5x eager", "ratio", 5, ("eager",)), Bar("1.5x torch.compile", "ratio", 1.5, ("torch.compile",))]
    if device.type == "cuda":
        bars.append(Bar("85 % of copy bandwidth", "share", 0.85))
    return Contest(calls, check, floor(leaves[0], documents * num_memory, norm), bars, absent=absent)


def floor(hidden: Tensor, memory_rows: int, norm: bool) -> Floor:
    """Forward reads every row and writes the memories; backward writes a gradient row for each.

    Without the norm that gradient does not depend on the rows; with it they have to be read once more.
    """
    total, memory = hidden.numel() * hidden.element_size(), memory_rows * hidden.shape[1] * hidden.element_size()
    passes = 2 if norm else 1
    flops = hidden.numel() * (15 if norm else 1)
    return Floor(passes * total + memory, total + memory, flops, dtype_name(hidden.dtype))
