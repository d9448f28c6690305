"""``cosine_topk``: exact search over a bank of keys, beside matrix products and FAISS on keys normalised in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
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
    Disagreement,
    Floor,
    Options,
    dtype_name,
)

WORK = "cosine_topk"
K, BLOCK = 10, 20_000
OURS_BFLOAT16 = "clara_fast, bfloat16 keys"
FAISS_FLAT = "FAISS flat"
# Storage formats of FAISS that round the keys, and by how much of a component: half a step of an 8-bit grid over the
# range of a dimension is at most 1/64 of its usual size here.
FAISS_ROUNDED = {"FAISS fp16": ("QT_fp16", 2**-11), "FAISS 8-bit": ("QT_8bit", 2**-6)}
BEST_OF = ("torch float32", "torch bfloat16", FAISS_FLAT)


def cases(options: Options) -> Iterator[Case]:
    for count, width in ((200_000, 576), (20_000, 9216)) if not options.quick else ((500, 64),):
        for dtype in options.dtypes(torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn):
            for batch in (1, 8, 64, 256) if dtype == torch.bfloat16 else (1,):
                shown = f"{count // 1000}k" if count >= 1000 else str(count)
                name = f"{dtype_name(dtype)}, {shown} keys of {width}, B = {batch}"
                yield Case(WORK, name, partial(contest, options, count, width, dtype, batch))


class Bank:
    """Keys of many lengths, queries, and what FAISS and torch keep of them."""

    def __init__(self, count: int, width: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.rand(count, 1, generator=generator) + 0.5
        self.keys = (torch.randn(count, width, generator=generator) * lengths).to(device)
        self.queries = torch.randn(256, width, generator=generator).to(device, torch.bfloat16)
        self.unit = F.normalize(self.keys)
        self.unit_queries = F.normalize(self.queries.float())
        self._faiss: dict[str, Any] = {}
        self._stored: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}
        self._best: dict[tuple[torch.dtype, torch.dtype], Tensor] = {}

    def stored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """As a store keeps them: keys and, for 8 bits, the scale of each."""
        if dtype not in self._stored:
            self._stored[dtype] = self._store(dtype)
        return self._stored[dtype]

    def _store(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype.is_floating_point and dtype.itemsize > 1:
            return self.keys.to(dtype), None
        largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        scales = self.keys.abs().amax(1) / largest
        scaled = self.keys / scales.unsqueeze(1)
        return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales

    def best(self, dtype: torch.dtype, precision: torch.dtype, batch: int) -> Tensor:
        """The K highest cosines with the keys stored in ``dtype`` ``[B, K]``, computed in ``precision`` and kept."""
        kept = self._best.get((dtype, precision))
        if kept is None or len(kept) < batch:
            kept = best_scores(self.queries[:batch], *self.stored(dtype), precision)
            self._best[dtype, precision] = kept
        return kept[:batch]

    @cached_property
    def unit_bfloat16(self) -> Tensor:
        return self.unit.to(torch.bfloat16)

    def faiss(self, name: str) -> Any:
        import faiss

        if name not in self._faiss:
            unit = self.unit.numpy()
            if name == FAISS_FLAT:
                index = faiss.IndexFlatIP(unit.shape[1])
            else:
                quantiser = getattr(faiss.ScalarQuantizer, FAISS_ROUNDED[name][0])
                index = faiss.IndexScalarQuantizer(unit.shape[1], quantiser, faiss.METRIC_INNER_PRODUCT)
                index.train(unit)
            index.add(unit)
            self._faiss[name] = index
        faiss.omp_set_num_threads(torch.get_num_threads())
        return self._faiss[name]


@lru_cache(maxsize=1)
def bank(count: int, width: int, device: torch.device) -> Bank:
    return Bank(count, width, device)


def wide_keys(keys: Tensor, scales: Tensor | None, start: int, dtype: torch.dtype) -> Tensor:
    """A block of stored keys, normalised in ``dtype``."""
    wide = keys[start : start + BLOCK].to(dtype)
    return F.normalize(wide if scales is None else wide * scales[start : start + BLOCK, None].to(dtype))


def best_scores(queries: Tensor, keys: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The K highest cosines of each query ``[B, K]``, in ``dtype``."""
    unit = F.normalize(queries.to(dtype))
    best = unit.new_empty(len(unit), 0)
    for start in range(0, len(keys), BLOCK):
        best = torch.cat([best, unit @ wide_keys(keys, scales, start, dtype).T], 1).topk(K).values
    return best


def scores_of(queries: Tensor, keys: Tensor, scales: Tensor | None, indices: Tensor) -> Tensor:
    """Cosines of the keys that were found ``[B, K]``, in float64."""
    found = keys[indices].double()
    if scales is not None:
        found = found * scales[indices].double().unsqueeze(-1)
    return torch.einsum("br,bkr->bk", F.normalize(queries.double()), F.normalize(found, dim=-1))


def contest(options: Options, count: int, width: int, dtype: torch.dtype, batch: int) -> Contest:
    data = bank(count, width, options.device)
    keys, scales = data.stored(dtype)
    queries = data.queries[:batch]
    if dtype == torch.float32:
        queries = queries.float()
    calls, roundings, absent = peers(data, batch, rounded_too=batch <= 8)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        ours_bfloat16 = data.stored(torch.bfloat16)[0]
        calls[OURS_BFLOAT16] = partial(search, queries, ours_bfloat16, None)
        roundings[OURS_BFLOAT16] = 2**-8
    calls = {OURS: partial(search, queries, keys, scales), **calls}
    # Computed once for all numbers of queries.
    most = 256 if dtype == torch.bfloat16 else batch

    def check(name: str) -> float:
        """Scores, and the true cosines of the keys found, beside the best there are."""
        scores, indices = calls[name]()
        if name == OURS:
            best, eager = (data.best(dtype, precision, most)[:batch] for precision in (torch.float64, torch.float32))
            limit = 2 * float((eager - best).abs().max()) + torch.finfo(torch.float32).eps
            true = scores_of(queries, keys, scales, indices)
        else:
            # Rounding two unit vectors and their product, each by a factor, moves a cosine by no more.
            limit = 3 * roundings[name] + 1e-6
            best = data.best(torch.float32, torch.float64, most)[:batch]
            true = scores_of(queries, data.keys, None, indices)
        return max(
            _within(f"{name}, {what}", values, best, limit) for what, values in (("scores", scores), ("keys", true))
        )

    floor = Floor(
        keys.numel() * keys.element_size() + (0 if scales is None else 4 * count),
        flops=2 * batch * count * width,
        dtype="float32" if dtype == torch.float32 else "bfloat16",
    )
    outside = (*FAISS_ROUNDED, OURS_BFLOAT16)
    reading = machine.passes_of_reading(floor.read, options.device) if batch == 1 else {}
    return Contest(calls, check, floor, bars(options, width, dtype, batch), outside, absent, reading=reading)


def search(queries: Tensor, keys: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return ops.cosine_topk(queries, keys, K, key_scales=scales)


def peers(data: Bank, batch: int, rounded_too: bool) -> tuple[dict[str, Callable], dict[str, float], dict[str, str]]:
    """Contestants that search keys normalised in advance, the rounding of each, and those that are not here."""

    def product(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return (queries @ keys.T).topk(K)

    unit = data.unit_queries[:batch]
    calls: dict[str, Callable] = {
        "torch float32": partial(product, unit, data.unit),
        "torch bfloat16": partial(product, unit.to(torch.bfloat16), data.unit_bfloat16),
    }
    roundings = {"torch float32": 2**-24, "torch bfloat16": 2**-8, FAISS_FLAT: 2**-24}
    roundings |= {name: rounding for name, (_, rounding) in FAISS_ROUNDED.items()}
    wanted = (FAISS_FLAT, *(FAISS_ROUNDED if rounded_too else ()))
    if why := faiss_missing(data.keys.device):
        return calls, roundings, dict.fromkeys(wanted, why)

    def faiss_search(name: str) -> tuple[Tensor, Tensor]:
        scores, indices = data.faiss(name).search(unit.numpy(), K)
        return torch.from_numpy(scores), torch.from_numpy(indices)

    return calls | {name: partial(faiss_search, name) for name in wanted}, roundings, {}


def faiss_missing(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "FAISS runs on the CPU here"
    try:
        import faiss  # noqa: F401
    except ImportError:
        return "faiss is not installed"
    return None


def bars(options: Options, width: int, dtype: torch.dtype, batch: int) -> list[Bar]:
    gpu = options.device.type == "cuda"
    if dtype == torch.int8:
        return [Bar("1.7x ours in bfloat16", "ratio", 1.7, (OURS_BFLOAT16,))]
    if dtype != torch.bfloat16:
        return []
    required = 4 if batch in (64, 256) and width == 576 else 2
    found = [Bar(f"{required}x torch and FAISS flat", "ratio", required, BEST_OF)]
    if batch == 1:
        share = 0.9 if gpu else 0.8
        found.append(Bar(f"{share:.0%} of read bandwidth", "share", share))
    return found


def _within(what: str, values: Tensor, best: Tensor, limit: float) -> float:
    error = float((values.double() - best).abs().max())
    if not error <= limit:
        raise Disagreement(f"{what}: off by {error:.2g}, above {limit:.2g}; no speed is reported")
    return error
