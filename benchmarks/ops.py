"""The operators alone, on one CPU, each beside what one would write without them.

    python benchmarks/ops.py [--quick] [--json FILE]

Results are checked against float64 before anything is timed: our error may be at most twice that of eager PyTorch in
the same dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from harness import OURS, Disagreement, Report, duration, require_accurate

from clara_fast import ops
from clara_fast.ops import ContextLayout, reference


@dataclass(frozen=True)
class Size:
    """Shapes as in SmolLM2-135M at compression 16; ``width`` is the width of search keys."""

    documents: int = 16
    tokens: int = 275
    memory: int = 16
    hidden: int = 576
    keys: int = 100_000
    width: int = 576
    questions: int = 4
    candidates: int = 20
    top_k: int = 5
    heads: int = 9
    key_heads: int = 3
    context: int = 128
    branches: int = 8
    branch: int = 32


QUICK = Size(documents=3, tokens=40, memory=4, hidden=64, keys=2000, width=64, context=32, branch=8)


@dataclass
class Case:
    """One comparison: calls by name, ours among them, and a check that raises :class:`Disagreement`.

    ``bytes`` is what must at least be read or written, where that decides the speed.
    """

    name: str
    calls: Mapping[str, Callable[[], Any]]
    check: Callable[[], float]
    bytes: int = 0


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def with_gradients(call: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of ``call(*leaves)``, computed in the dtype of the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def gradient_case(
    name: str, calls: dict[str, Callable[..., Tensor]], leaves: list[Tensor], exact: Callable[..., Tensor], eager: str
) -> Case:
    """Forward and backward of differentiable calls on the same leaves, with a random upstream gradient."""
    upstream = randn(*calls[OURS](*leaves).shape)

    def check() -> float:
        truth = with_gradients(exact, [leaf.double() for leaf in leaves], upstream)
        usual = with_gradients(calls[eager], leaves, upstream)
        errors = []
        for contestant, call in calls.items():
            for part, mine, other, value in zip(
                ("output", "gradient", "gradient", "gradient"), with_gradients(call, leaves, upstream), usual, truth
            ):
                errors.append(require_accurate(f"{name}, {contestant}, {part}", mine, other, value))
        return max(errors)

    timed = {n: partial(with_gradients, call, leaves, upstream) for n, call in calls.items()}
    return Case(name, timed, check)


def pool_memory_case(size: Size) -> Case:
    lengths = torch.randint(size.tokens // 2, size.tokens + 1, (size.documents,))
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    hidden = randn(int(offsets[-1]), size.hidden)

    def joined(pool: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def call(states: Tensor) -> Tensor:
            memory, mse = pool(states, offsets, size.memory)
            return torch.cat([memory.flatten(), mse.flatten().to(memory.dtype)])

        return call

    calls = {OURS: joined(ops.pool_memory), "eager": joined(reference.pool_memory)}
    name = f"pool_memory, forward + backward, {len(hidden)} rows of {size.hidden}"
    case = gradient_case(name, calls, [hidden], joined(reference.pool_memory), "eager")
    # Forward reads every row; backward reads it again and writes its gradient.
    case.bytes = 3 * hidden.numel() * hidden.element_size()
    return case


def cosine_topk_cases(size: Size) -> Iterator[Case]:
    k = 10
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for batch in (1, 8):
            yield _cosine_topk_case(size, dtype, batch, k)


def _cosine_topk_case(size: Size, dtype: torch.dtype, batch: int, k: int) -> Case:
    wide = randn(size.keys, size.width)
    queries = randn(batch, size.width)
    name = f"cosine_topk, {dtype}, {batch} queries, {size.keys} keys of {size.width}".replace("torch.", "")
    if dtype == torch.int8:
        scales = wide.abs().amax(1) / 127
        keys = (wide / scales[:, None]).round().to(dtype)
        exact_keys = keys.double() * scales[:, None].double()
        queries = queries.to(torch.bfloat16)
        peer_keys, peer_dtype = F.normalize(exact_keys).to(torch.bfloat16), torch.bfloat16
        peer = "torch matmul + topk, bfloat16"
    else:
        scales, keys, queries = None, wide.to(dtype), queries.to(dtype)
        exact_keys = keys.double()
        peer_keys, peer_dtype = F.normalize(exact_keys).to(dtype), dtype
        peer = "torch matmul + topk"
    exact = F.normalize(queries.double()) @ F.normalize(exact_keys).T
    peer_queries = F.normalize(queries.double()).to(peer_dtype)

    def torch_topk() -> tuple[Tensor, Tensor]:
        """Keys and queries were normalised in advance, for nothing."""
        scores, indices = (peer_queries @ peer_keys.T).topk(k)
        return scores, indices

    def ours() -> tuple[Tensor, Tensor]:
        return ops.cosine_topk(queries, keys, k, key_scales=scales)

    def check() -> float:
        scores, indices = ours()
        best = exact.topk(k).values
        # The keys found are the best ones, but for ties within float32's rounding.
        for what, found in (("scores", scores.double()), ("keys", exact.gather(1, indices))):
            error = float((found - best).abs().max())
            if not error <= 1e-5:
                raise Disagreement(f"{name}: {what} are off by {error:.2g}")
        return float((scores.double() - best).abs().max())

    return Case(name, {OURS: ours, peer: torch_topk}, check, bytes=keys.numel() * keys.element_size())


def select_memory_case(size: Size) -> Case:
    shape = (size.questions, size.candidates, size.memory, size.hidden)
    shared = randn(size.memory, size.hidden)
    # Memories share a large mean, so that the softmax at temperature 0.02 is not one-hot.
    leaves = [(3 * shared + randn(size.questions, size.memory, size.hidden)).flatten(1), 3 * shared + randn(*shape)]

    def select(op: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda query, memory: op(query, memory.flatten(2), memory, size.top_k)[0]

    calls = {OURS: select(ops.select_memory), "dense": select(reference.select_memory)}
    name = f"select_memory, forward + backward, {size.questions} x {size.candidates} memories, k = {size.top_k}"
    return gradient_case(name, calls, leaves, select(reference.select_memory), "dense")


def attention_cases(size: Size) -> Iterator[Case]:
    lengths = torch.randint(size.tokens // 2, size.tokens + 1, (size.documents // 2 + 1,)).tolist()
    yield _attention_case(
        f"attention, {len(lengths)} packed documents of {min(lengths)} to {max(lengths)} rows, forward + backward",
        size,
        ContextLayout.packed(lengths),
        [(start, start + n, start, start) for start, n in _spans(lengths)],
        "SDPA, one document at a time",
    )
    branches = [size.branch] * size.branches
    spans = _spans([size.context, *branches])[1:]
    yield _attention_case(
        f"attention, {size.branches} branches of {size.branch} on one context of {size.context}, forward + backward",
        size,
        ContextLayout.branches([size.context], [branches]),
        [(start, start + n, 0, size.context) for start, n in spans],
        "SDPA, context repeated",
    )


def _spans(lengths: list[int]) -> list[tuple[int, int]]:
    return [(sum(lengths[:i]), n) for i, n in enumerate(lengths)]


def _attention_case(
    name: str, size: Size, layout: ContextLayout, sequences: list[tuple[int, int, int, int]], peer: str
) -> Case:
    """``sequences``: rows ``start:stop`` of each, and the context rows that are repeated in front of them.

    A repeated context is computed with every sequence, as the baseline does; its output is kept once.
    """
    rows, width = int(layout.q_len.sum()), size.hidden // size.heads
    leaves = [randn(rows, heads, width) for heads in (size.heads, size.key_heads, size.key_heads)]

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        for i, (start, stop, context, context_stop) in enumerate(sequences):
            taken = [torch.cat([t[context:context_stop], t[start:stop]]) if context_stop > context else t[start:stop]
                     for t in (query, key, value)]  # fmt: skip
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in taken)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            parts.append(out if i == 0 else out[context_stop - context :])
        return torch.cat(parts)

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.compressed_context_attention(query, key, value, layout)

    calls = {OURS: lambda q, k, v: ops.compressed_context_attention(q, k, v, layout), peer: sdpa, "eager": exact}
    case = gradient_case(name, calls, leaves, exact, "eager")
    # Eager, with its mask over all rows, only serves the check.
    return replace(case, calls={n: call for n, call in case.calls.items() if n != "eager"})


def cases(size: Size) -> Iterator[Case]:
    yield pool_memory_case(size)
    yield from cosine_topk_cases(size)
    yield select_memory_case(size)
    yield from attention_cases(size)


def benchmark(size: Size, repetitions: int, *, quick: bool) -> Report:
    bandwidth = harness.read_bandwidth(32 if quick else 256)
    facts = {**harness.machine_facts(), "read GB/s": round(bandwidth / 1e9, 1), **asdict(size)}
    columns = ["work", OURS, "other", "ratio", "ratio of CPU time", "bytes", "of read bandwidth", "error"]
    report = Report("Operators on the CPU: median (p20 to p80)", columns, facts)
    report.say_facts()
    for case in cases(size):
        error = case.check()
        timings = harness.interleaved(case.calls, repetitions, shortest=0.0 if quick else 0.03)
        mine = timings[OURS]
        peer, other = min(((n, t) for n, t in timings.items() if n != OURS), key=lambda item: item[1].median)
        rate = case.bytes / mine.median
        report.add(
            [
                case.name,
                str(mine),
                f"{peer}: {duration(other.median)}",
                f"{other.median / mine.median:.2f}x",
                f"{other.cpu / mine.cpu:.2f}x",
                f"{case.bytes / 1e6:.1f} MB" if case.bytes else "",
                f"{100 * rate / bandwidth:.0f} %" if case.bytes else "",
                f"{error:.0e}",
            ],
            {
                "work": case.name,
                "seconds": {contestant: asdict(t) for contestant, t in timings.items()},
                "ratio": other.median / mine.median,
                "cpu_ratio": other.cpu / mine.cpu,
                "bytes": case.bytes,
                "bytes_per_second": rate,
                "of_read_bandwidth": rate / bandwidth,
                "error": error,
            },
        )
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, help="default 15, or 2 with --quick")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    repetitions = parsed.repetitions or (2 if parsed.quick else 15)
    report = benchmark(QUICK if parsed.quick else Size(), repetitions, quick=parsed.quick)
    report.show()
    report.save(parsed.json)


if __name__ == "__main__":
    main()
