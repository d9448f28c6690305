"""``compressed_context_attention`` on the CPU beside what one would call instead, layout by layout.

    python benchmarks/attention.py [--only WORD] [--dtype float32] [--model smollm2] [--json FILE]

Peers: SDPA one segment at a time; SDPA on padded segments with a mask (padding not counted); FlexAttention compiled
with a block mask (compiling not counted; forward alone, as it has no backward on CPUs); plain products and softmax one
segment at a time. Results are checked against float64 first. FLOPs count only pairs that see each other, and are
compared with the rate of a large matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from harness import OURS, Report, duration

from clara_fast import ops
from clara_fast.ops import ContextLayout, reference

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MODELS = {"smollm2": (9, 3, 64), "mistral": (32, 8, 128)}  # query heads, key heads, head size


@dataclass
class Piece:
    """One segment: its query rows, the key rows it sees, and the mask ``[rows, keys]`` that SDPA needs, if any."""

    rows: slice
    keys: slice | Tensor
    causal: bool
    mask: Tensor | None


def pieces_of(layout: ContextLayout) -> list[Piece]:
    q_start, q_len, kv_start, kv_len, contexts = (tensor.tolist() for tensor in layout.tensors())
    pieces = []
    for segment, others in enumerate(contexts):
        ranges = [(kv_start[s], kv_start[s] + kv_len[s]) for s in (*others, segment) if s >= 0]
        joined = ranges[:1]
        for start, stop in ranges[1:]:
            if joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        keys = slice(*joined[0]) if len(joined) == 1 else torch.cat([torch.arange(*r) for r in joined])
        rows, count = q_len[segment], sum(stop - start for start, stop in ranges)
        causal = rows == count and rows > 1
        mask = None
        if rows > 1 and not causal:
            mask = torch.ones(rows, count, dtype=torch.bool).tril(count - rows)
        pieces.append(Piece(slice(q_start[segment], q_start[segment] + rows), keys, causal, mask))
    return pieces


def sdpa_each(pieces: list[Piece]) -> Attention:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        for piece in pieces:
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query[piece.rows], key[piece.keys], value[piece.keys]))
            out = F.scaled_dot_product_attention(q, k, v, piece.mask, is_causal=piece.causal, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    return call


def products_each(pieces: list[Piece]) -> Attention:
    hidden = [
        torch.zeros(p.rows.stop - p.rows.start, len(range(10**9)[p.keys]) if isinstance(p.keys, slice) else len(p.keys))
        for p in pieces
    ]
    for piece, mask in zip(pieces, hidden):
        if piece.causal:
            mask.masked_fill_(torch.ones(mask.shape, dtype=torch.bool).triu_(1), -math.inf)
        elif piece.mask is not None:
            mask.masked_fill_(~piece.mask, -math.inf)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        for piece, mask in zip(pieces, hidden):
            q = query[piece.rows].unflatten(1, (heads, groups)).permute(1, 2, 0, 3)  # [Hkv, G, L, E]
            k, v = (t[piece.keys].transpose(0, 1).unsqueeze(1) for t in (key, value))
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + mask.to(q.dtype)
            parts.append((scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(1, 2))
        return torch.cat(parts)

    return call


def sdpa_padded(pieces: list[Piece], query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """Padded beforehand: the time is that of the kernel alone."""
    rows = max(p.rows.stop - p.rows.start for p in pieces)
    taken = [(query[p.rows], key[p.keys], value[p.keys]) for p in pieces]
    keys = max(len(k) for _, k, _ in taken)
    mask = torch.zeros(len(pieces), 1, rows, keys, dtype=torch.bool)
    padded = [t.new_zeros(len(pieces), n, *t.shape[1:]) for t, n in ((query, rows), (key, keys), (value, keys))]
    for i, parts in enumerate(taken):
        for target, part in zip(padded, parts):
            target[i, : len(part)] = part
        own, seen = len(parts[0]), len(parts[1])
        mask[i, :, :own, :seen] = torch.ones(own, seen, dtype=torch.bool).tril(seen - own)
        mask[i, :, own:, 0] = True
    q, k, v = (t.transpose(1, 2) for t in padded)
    whole = bool((mask | torch.ones(rows, keys, dtype=torch.bool).triu(1)).all()) and rows == keys

    def call() -> Tensor:
        if whole:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    return call


def flex(layout: ContextLayout, rows: int, keys: int) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen = reference.attention_mask(layout, rows, keys)
    block_mask = create_block_mask(lambda b, h, q, k: seen[q, k], None, None, rows, keys, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=True)[0].transpose(0, 1)

    return call


def layouts() -> Iterator[tuple[str, ContextLayout, int, bool]]:
    """Name, layout, key rows, and whether it is trained on."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, low: int, high: int) -> list[int]:
        return torch.randint(low, high + 1, (count,), generator=generator).tolist()

    def own(layout: ContextLayout) -> int:
        return int(layout.kv_len.sum())

    for name, layout in (
        ("packed: 16 documents of 80 to 275 rows", ContextLayout.packed(draw(16, 80, 275))),
        ("packed: 64 segments of 8 to 20 rows", ContextLayout.packed(draw(64, 8, 20))),
        ("packed: one segment of 1024 rows", ContextLayout.packed([1024])),
        ("packed: one segment of 4096 rows", ContextLayout.packed([4096])),
        ("branches: 8 of 32 on a context of 128", ContextLayout.branches([128], [[32] * 8])),
        ("branches: 32 of 24 to 48 on a context of 256", ContextLayout.branches([256], [draw(32, 24, 48)])),
        ("tree: 40 rows, 4 contexts of 80, 8 branches of 32 each", tree()),
    ):
        yield name, layout, own(layout), True
    for batch, low, high in ((1, 300, 300), (1, 2000, 2000), (8, 300, 2000), (32, 300, 2000)):
        lengths = draw(batch, low, high)
        yield (
            f"decode: {batch} rows over caches of {low} to {high}",
            ContextLayout.padded(lengths, max(lengths), q_lengths=1),
            batch * max(lengths),
            False,
        )
    for rows in (4, 32):
        yield (
            f"prefill: {rows} rows over a cache of 2000",
            ContextLayout.padded([2000], 2000, q_lengths=rows),
            2000,
            False,
        )


def tree(contexts: int = 4, branches: int = 8) -> ContextLayout:
    """As training packs prompts: an instruction, contexts that go on from it, branches that read both."""
    lengths, reads = [40], [[]]
    for _ in range(contexts):
        context = len(lengths)
        lengths += [80, *[32] * branches]
        reads += [[0], *([0, context] for _ in range(branches))]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return ContextLayout.from_lists(starts, lengths, starts, lengths, reads)


def pairs(layout: ContextLayout) -> int:
    q_len, kv_len, contexts = (tensor.tolist() for tensor in (layout.q_len, layout.kv_len, layout.contexts))
    total = 0
    for s, others in enumerate(contexts):
        total += q_len[s] * sum(kv_len[other] for other in others if other >= 0)
        total += sum(max(kv_len[s] - i, 0) for i in range(q_len[s]))
    return total


def matmul_rate(dtype: torch.dtype) -> float:
    a = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / min(harness._seconds(lambda: a @ a)[0] for _ in range(9))


def with_backward(call: Attention, leaves: list[Tensor], upstream: Tensor) -> Callable[[], object]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return lambda: torch.autograd.grad(call(*leaves), leaves, upstream)


def check(name: str, call: Attention, peer: Attention, exact: Attention, inputs: list[Tensor], backward: bool) -> float:
    def results(function: Attention, values: list[Tensor]) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (function(*values),)
        values = [value.detach().requires_grad_() for value in values]
        out = function(*values)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, values, upstream)

    truth = results(exact, [x.double() for x in inputs])
    usual, mine = results(peer, inputs), results(call, inputs)
    return max(harness.require_accurate(name, *three) for three in zip(mine, usual, truth))


def measure(report: Report, model: str, dtype: torch.dtype, only: str, repetitions: int, with_flex: bool) -> None:
    q_heads, heads, size = MODELS[model]
    rate = matmul_rate(dtype)
    for name, layout, keys, trained in layouts():
        if only not in name:
            continue
        torch.manual_seed(0)
        rows = int(layout.q_len.sum())
        inputs = [torch.randn(n, h, size).to(dtype) for n, h in ((rows, q_heads), (keys, heads), (keys, heads))]
        pieces = pieces_of(layout)
        calls: dict[str, Attention] = {
            OURS: lambda q, k, v, layout=layout: ops.compressed_context_attention(q, k, v, layout),
            "SDPA each": sdpa_each(pieces),
            "products each": products_each(pieces),
        }
        error = check(name, calls[OURS], calls["products each"], calls["products each"], inputs, trained)
        for backward in (False, True) if trained else (False,):
            if backward:
                upstream = torch.randn(rows, q_heads, size).to(dtype)
                timed = {n: with_backward(call, inputs, upstream) for n, call in calls.items()}
            else:
                if with_flex and rows * keys < 2**25:
                    calls["FlexAttention"] = flex(layout, rows, keys)
                timed = {n: partial(call, *inputs) for n, call in calls.items()}
                timed["SDPA padded"] = sdpa_padded(pieces, *inputs)
                calls.pop("FlexAttention", None)
            with torch.set_grad_enabled(backward):
                for call in timed.values():
                    call()
                timings = harness.interleaved(timed, repetitions, shortest=0.005)
            mine = timings[OURS]
            flops = (14 if backward else 4) * pairs(layout) * q_heads * size
            best = min((n for n in timings if n != OURS), key=lambda n: timings[n].median)
            work = f"{model}, {dtype}, {name}, {'both' if backward else 'forward'}".replace("torch.", "")
            others = ", ".join(f"{n} {duration(t.median)}" for n, t in timings.items() if n != OURS)
            ratio = timings[best].median / mine.median
            of_rate = flops / mine.median / rate
            report.add(
                [work, duration(mine.median), others, f"{ratio:.2f}x", f"{100 * of_rate:.0f} %", f"{error:.0e}"],
                {
                    "work": work,
                    "seconds": {n: asdict(t) for n, t in timings.items()},
                    "ratio": ratio,
                    "best": best,
                    "flops": flops,
                    "of_matmul_rate": of_rate,
                    "error": error,
                },
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="layouts whose name holds this word")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--model", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--no-flex", action="store_true", help="compiling FlexAttention takes a minute a layout")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report(
        "compressed_context_attention on the CPU, against the best peer",
        ["work", OURS, "others", "ratio", "of matmul rate", "error"],
        harness.machine_facts(),
    )
    report.say_facts()
    for model in options.model:
        for name in options.dtype:
            measure(report, model, getattr(torch, name), options.only, options.repetitions, not options.no_flex)
    report.show()
    report.save(options.json)


if __name__ == "__main__":
    main()
