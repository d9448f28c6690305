"""Compiling ahead what a user is about to call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clara_fast.ops.compressed_context_attention import compressed_context_attention
from clara_fast.ops.cosine_topk import cosine_topk
from clara_fast.ops.layout import ContextLayout
from clara_fast.ops.pool_memory import pool_memory
from clara_fast.ops.select_memory import select_memory


def _shapes_of(model: Any) -> dict[str, Any]:
    """What ``warmup`` asks for, of a ``Clara``."""
    lm = model.lm.config.get_text_config()
    heads = lm.num_attention_heads
    return {
        "hidden_size": model.config.hidden_size,
        "num_memory": model.config.num_memory,
        "num_heads": heads,
        "num_key_heads": getattr(lm, "num_key_value_heads", None) or heads,
        "head_size": getattr(lm, "head_dim", None) or lm.hidden_size // heads,
        "dtype": model.dtype,
        "device": model.device,
    }


@contextlib.contextmanager
def _autotuning(device: torch.device, enabled: bool | None) -> Iterator[None]:
    """Triton's kernels try their configurations (True) or do not (False); None leaves that as it is."""
    if enabled is None or device.type != "cuda":
        yield
        return
    from clara_fast.triton_kernels import _launch

    before = _launch.autotuning()
    _launch.autotune(enabled)
    try:
        yield
    finally:
        _launch.autotune(before)


def _run(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], training: bool) -> None:
    """Once as in inference and, where asked for, once forward and backward."""
    with torch.inference_mode():
        function(*inputs)
    if training:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(out.sum() for out in outputs if out.requires_grad).backward()  # type: ignore[union-attr]


def warmup(
    model: Any = None,
    *,
    hidden_size: int | None = None,
    num_memory: int = 16,
    num_heads: int | None = None,
    num_key_heads: int | None = None,
    head_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    candidates: int = 20,
    top_k: int = 5,
    training: bool = False,
    autotune: bool | None = None,
) -> dict[str, float]:
    """Runs each operator once on small inputs, so that the first real call does not wait for a compiler.

    On a GPU that compiles the Triton kernels (or fetches them from Triton's cache) for these sizes: pooling with and
    without the norm, selection, search, and attention over packed segments, for few rows and for many, and in
    decoding. On a CPU it loads the native library.

    Args:
        model: a ``Clara``, which gives the sizes, dtype and device; those given beside it win.
        hidden_size: D. Without it (and a model), pooling, selection and search are left out.
        num_memory: memory tokens per document.
        num_heads: query heads. Without it (and a model), attention is left out.
        num_key_heads: key heads; ``num_heads`` by default.
        head_size: of query, key and value; ``hidden_size // num_heads`` by default.
        dtype: torch.bfloat16 on a GPU, torch.float32 on a CPU by default.
        device: the current GPU if there is one, else the CPU, by default.
        candidates: documents that ``select_memory`` chooses among.
        top_k: how many it takes.
        training: run the backward passes as well.
        autotune: True tries several configurations of each kernel and keeps the fastest on disk, as
            ``CLARA_FAST_AUTOTUNE=1`` does for every call.

    Returns:
        Operator -> seconds that it took; the same call again shows what is left of them.

    Raises:
        ValueError: on sizes that do not fit together, or if there is nothing to run.
    """
    given = {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_key_heads": num_key_heads,
        "head_size": head_size,
        "dtype": dtype,
        "device": device,
    }
    shapes: dict[str, Any] = {"num_memory": num_memory, **given}
    if model is not None:
        shapes = _shapes_of(model) | {name: value for name, value in given.items() if value is not None}
    size: Any = shapes["hidden_size"]
    m, heads = shapes["num_memory"], shapes["num_heads"]
    if size is None and heads is None:
        raise ValueError("give a model, hidden_size or num_heads: there is nothing to warm up")
    key_heads = shapes["num_key_heads"] or heads
    place = torch.device(shapes["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = shapes["dtype"] or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    for name, value in (("hidden_size", size), ("num_memory", m), ("num_heads", heads), ("num_key_heads", key_heads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    if not 1 <= top_k <= candidates:
        raise ValueError(f"top_k ({top_k}) must be at least 1 and at most the number of candidates ({candidates})")
    if heads is not None:
        if heads % key_heads:
            raise ValueError(f"num_heads ({heads}) must be a multiple of num_key_heads ({key_heads})")
        width: int = shapes["head_size"] or (size or 0) // heads
        if width < 1:
            raise ValueError(f"head_size ({width}) must be at least 1; without hidden_size it has to be given")

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=kind, device=place)

    def pool() -> None:
        # Segments of few rows, which one program sums each, and one that is shared out among several.
        for lengths in ([m + 4] * 2, [m + 256]):
            offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(place)
            hidden = rand(sum(lengths), size)
            _run(lambda x, o=offsets: pool_memory(x, o, m), [hidden], training)
            _run(lambda x, w, o=offsets: pool_memory(x, o, m, norm_weight=w), [hidden, rand(size)], training)

    def select() -> None:
        memory = rand(2, candidates, m, size)
        # Keys that are the memory, as in training, and keys of their own.
        _run(lambda q, x: select_memory(q, x.flatten(2), x, top_k), [rand(2, m * size), memory], training)
        _run(
            lambda q, k, x: select_memory(q, k, x, top_k),
            [rand(2, size), rand(2, candidates, size), memory],
            training,
        )

    def search() -> None:
        _run(lambda q, k: cosine_topk(q, k, top_k), [rand(2, m * size), rand(candidates, m * size)], training)

    def attend() -> None:
        # On a GPU, enough rows for its largest blocks, and enough keys to be shared out.
        many, long = (256 * 128 // heads, 4096) if place.type == "cuda" else (64, 300)
        layouts = {
            "rows": ContextLayout.branches([many], [[40, 40]], device=place),
            "few rows": ContextLayout.packed([40, 40], device=place),
            "one row": ContextLayout.padded([300, 300], 300, q_lengths=1, device=place),
            "one row of many keys": ContextLayout.padded([long], long, q_lengths=1, device=place),
        }
        for name, layout in layouts.items():
            rows = int(layout.q_len.sum())
            keys = int(layout.kv_len.sum())
            inputs = [rand(rows, heads, width), rand(keys, key_heads, width), rand(keys, key_heads, width)]
            decoding = name.startswith("one row")
            attention = partial(compressed_context_attention, layout=layout)
            _run(attention, inputs, training and not decoding)

    work: dict[str, Callable[[], None]] = {}
    if size is not None:
        work |= {"pool_memory": pool, "select_memory": select, "cosine_topk": search}
    if heads is not None:
        work["compressed_context_attention"] = attend
    seconds = {}
    with _autotuning(place, autotune):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            seconds[name] = time.perf_counter() - start
    return seconds
