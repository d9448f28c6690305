"""``few_rows_linear``: a decoded token's way through linear layers with LoRA adapters, beside torch's products.

As many layers as no cache holds, since each token reads all of a model's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clara_fast.benchmarks.harness import OURS, Bar, Case, Contest, Floor, Options, accuracy_check, cast, dtype_name
from clara_fast.ops.few_rows_linear import few_rows_linear

WORK = "few_rows_linear"
RANK, SCALING, EAGER, MERGED = 16, 2.0, "eager", "eager, merged weights"


def cases(options: Options) -> Iterator[Case]:
    if options.device.type != "cpu":  # the op is one for CPUs
        return
    layers, columns, outputs = (2, 64, 96) if options.quick else (32, 576, 1536)
    for dtype in options.dtypes(torch.float32, torch.bfloat16):
        for rows in (1, 4):
            name = f"{dtype_name(dtype)}, {rows} rows, {layers} layers {columns} to {outputs}, r = {RANK}"
            yield Case(WORK, name, partial(contest, layers, columns, outputs, dtype, rows))


def contest(layers: int, columns: int, outputs: int, dtype: torch.dtype, rows: int) -> Contest:
    leaves = [torch.randn(rows, columns), torch.randn(layers, outputs, columns)]
    leaves += [torch.randn(layers, RANK, columns), torch.randn(layers, outputs, RANK)]
    x, weights, downs, ups = cast(leaves, dtype)
    exact_weights = [t.double() for t in (weights, downs, ups)]

    @torch.no_grad()
    def ours() -> tuple[Tensor, ...]:
        every = zip(weights, downs, ups, strict=True)
        # Never None here: see few_rows_linear.
        return tuple(few_rows_linear(x, w, None, a, b, SCALING) for w, a, b in every)  # type: ignore[misc]

    @torch.no_grad()
    def eager(x: Tensor = x, weights=weights, downs=downs, ups=ups) -> tuple[Tensor, ...]:
        every = zip(weights, downs, ups, strict=True)
        return tuple(F.linear(x, w) + F.linear(F.linear(x, a), b) * SCALING for w, a, b in every)

    calls = {OURS: ours, EAGER: eager}
    if dtype == torch.float32:  # in bfloat16 what the adapter adds would round away
        merged = torch.baddbmm(weights, ups, downs, alpha=SCALING)
        calls[MERGED] = torch.no_grad()(lambda: tuple(F.linear(x, w) for w in merged))
    check = accuracy_check(calls, eager, lambda: eager(x.double(), *exact_weights))
    size = x.element_size() * layers
    moved = size * (outputs * columns + RANK * (outputs + columns) + rows * (outputs + columns))
    flops = 2 * rows * layers * (outputs * columns + RANK * (outputs + columns))
    floor = Floor(moved, size * rows * outputs, flops, dtype_name(dtype))
    return Contest(calls, check, floor, [Bar("never slower", "ratio", 1)])
