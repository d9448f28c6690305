"""``compressed_context_attention``: packed documents, branches on one context, decode over a padded cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

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
    without_gradients,
)
from clara_fast.ops import ContextLayout

WORK = "attention"
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
FLEX, FLASH = "FlexAttention", "FlashAttention varlen"


@dataclass(frozen=True)
class Heads:
    """Of a model: query heads, key heads, numbers per head."""

    model: str
    query: int
    key: int
    width: int


SMOLLM2, MISTRAL = Heads("SmolLM2", 9, 3, 64), Heads("Mistral-7B", 32, 8, 128)


@dataclass(frozen=True)
class Piece:
    """Query rows, the key rows that all of them see, and the key rows of which they see a causal triangle."""

    q: slice
    seen: slice
    own: slice


@dataclass(frozen=True)
class Scene:
    """One layout, the same in pieces for the peers, and how many rows there are."""

    layout: ContextLayout
    pieces: list[Piece]
    q_rows: int
    k_rows: int


def cases(options: Options) -> Iterator[Case]:
    float32, bfloat16 = torch.float32, torch.bfloat16
    small, large = ((SMOLLM2, float32), (SMOLLM2, bfloat16)), ((MISTRAL, bfloat16),)
    for name, scene, backward, settings in (
        ("16 packed documents", partial(packed, 16), False, small),
        ("16 packed documents", partial(packed, 16), True, small),
        ("4 packed documents", partial(packed, 4), False, large),
        ("4 packed documents", partial(packed, 4), True, large),
        ("8 branches of 32 on 128", partial(branches, 128, 32, 8), True, small),
        ("8 branches of 32 on 512", partial(branches, 512, 32, 8), False, small[1:]),
        ("8 branches of 32 on 512", partial(branches, 512, 32, 8), True, (*small, *large)),
        ("decode, 16 caches up to 1024", partial(decode, 16, 1024), False, (*small, *large)),
    ):
        for heads, dtype in settings:
            if dtype in options.dtypes(dtype):
                what = f"{heads.model}, {dtype_name(dtype)}, {name}, fwd{' + bwd' if backward else ''}"
                yield Case(WORK, what, partial(contest, options, heads, dtype, scene, backward))


# Scenes


def packed(documents: int, quick: bool) -> Scene:
    lengths = torch.randint(9, 30, (3,)) if quick else torch.randint(138, 276, (documents,))
    starts = [0, *lengths.cumsum(0).tolist()]
    pieces = [Piece(slice(a, b), slice(a, a), slice(a, b)) for a, b in pairwise(starts)]
    return Scene(ContextLayout.packed(lengths), pieces, starts[-1], starts[-1])


def branches(context: int, branch: int, count: int, quick: bool) -> Scene:
    if quick:
        context, branch = 16, 5
    layout = ContextLayout.branches([context], [[branch] * count])
    first = Piece(slice(0, context), slice(0, 0), slice(0, context))
    rows = [slice(context + i * branch, context + (i + 1) * branch) for i in range(count)]
    total = context + count * branch
    return Scene(layout, [first, *(Piece(own, slice(0, context), own) for own in rows)], total, total)


def decode(samples: int, stride: int, quick: bool) -> Scene:
    if quick:
        samples, stride = 3, 20
    lengths = torch.randint(stride // 4, stride + 1, (samples,)).tolist()
    layout = ContextLayout.padded(lengths, stride, q_lengths=1)
    # One row sees every valid key of its sample.
    valid = [slice(i * stride, i * stride + n) for i, n in enumerate(lengths)]
    pieces = [Piece(slice(i, i + 1), rows, slice(rows.stop, rows.stop)) for i, rows in enumerate(valid)]
    return Scene(layout, pieces, samples, samples * stride)


# Contestants


def plain_matmuls(scene: Scene, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
    """A product, a softmax and a product for each piece; also the truth, in float64."""
    groups, parts = query.shape[1] // key.shape[1], []
    for piece in scene.pieces:
        rows, own = piece.q.stop - piece.q.start, piece.own.stop - piece.own.start
        q = query[piece.q].unflatten(1, (-1, groups)).permute(1, 2, 0, 3)
        k, v = (torch.cat([t[piece.seen], t[piece.own]]).transpose(0, 1).unsqueeze(1) for t in (key, value))
        scores = (q @ k.transpose(-1, -2)) * query.shape[2] ** -0.5
        if own:
            hidden = torch.ones(rows, own, dtype=torch.bool, device=query.device).triu(1)
            scores = scores.masked_fill(F.pad(hidden, (k.shape[2] - own, 0)), -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32 if scores.dtype != torch.float64 else None)
        parts.append((weights.to(v.dtype) @ v).permute(2, 0, 1, 3).flatten(1, 2))
    return (torch.cat(parts),)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """Over ``[B, rows, heads, width]``."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options).transpose(1, 2)


def sdpa_each(scene: Scene, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
    """A call for each piece: causal where it has nothing but its own rows, in full where it has one row."""
    parts = []
    for piece in scene.pieces:
        rows = piece.own if piece.own.stop > piece.own.start else piece.seen
        causal = rows is piece.own
        parts.append(_sdpa(query[piece.q][None], key[rows][None], value[rows][None], is_causal=causal)[0])
    return (torch.cat(parts),)


def sdpa_padded(scene: Scene, device: torch.device) -> Attention:
    """One call over documents padded on the right, where the causal flag hides the padding from what is kept."""
    lengths = torch.tensor([piece.q.stop - piece.q.start for piece in scene.pieces])
    kept = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    source = (kept.flatten().cumsum(0) - 1).clamp_min(0).view(kept.shape)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        return (_sdpa(query[source], key[source], value[source], is_causal=True)[kept],)

    return attend


def sdpa_cache(scene: Scene, device: torch.device) -> Attention:
    """One call over the padded cache with a mask of the valid rows."""
    samples = len(scene.pieces)
    lengths = torch.tensor([piece.seen.stop - piece.seen.start for piece in scene.pieces])
    mask = (torch.arange(scene.k_rows // samples) < lengths[:, None]).to(device)[:, None, None]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        caches = [t.unflatten(0, (samples, -1)) for t in (key, value)]
        return (_sdpa(query.unsqueeze(1), *caches, attn_mask=mask).squeeze(1),)

    return attend


def repeated(scene: Scene) -> tuple[Tensor, int]:
    """Rows of context and branch, one after the other for every branch ``[branches, rows]``; the context's length."""
    context, *others = scene.pieces
    shared = torch.arange(context.q.stop)
    return torch.stack([torch.cat([shared, torch.arange(b.q.start, b.q.stop)]) for b in others]), context.q.stop


def _joined(out: Tensor, context: int) -> tuple[Tensor]:
    """The context's output once, then the branches'; from ``[branches, rows, heads, width]``."""
    return (torch.cat([out[0, :context], out[:, context:].flatten(0, 1)]),)


def sdpa_repeated(scene: Scene, device: torch.device) -> Attention:
    rows, context = repeated(scene)
    rows = rows.to(device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        return _joined(_sdpa(query[rows], key[rows], value[rows], is_causal=True), context)

    return attend


def ours_repeated(scene: Scene, device: torch.device) -> Attention:
    rows, context = repeated(scene)
    layout = ContextLayout.packed([rows.shape[1]] * len(rows), device=device)
    rows = rows.to(device)

    def attend(*tensors: Tensor) -> tuple[Tensor]:
        out = ops.compressed_context_attention(*(t[rows].flatten(0, 1) for t in tensors), layout)
        return _joined(out.unflatten(0, rows.shape), context)

    return attend


def flex(scene: Scene, device: torch.device) -> Attention:
    """Compiled, with the layout as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A piece's number for its rows; a context may be seen by every piece that has it.
    piece_of_q, piece_of_k, place_q, place_k, context = (
        torch.zeros(n, dtype=torch.int32) for n in (*[scene.q_rows, scene.k_rows] * 2, scene.k_rows)
    )
    piece_of_k -= 1
    for number, piece in enumerate(scene.pieces):
        piece_of_q[piece.q] = number
        if piece.own.stop > piece.own.start:
            piece_of_k[piece.own] = number
            place_k[piece.own] = torch.arange(piece.own.stop - piece.own.start, dtype=torch.int32)
            place_q[piece.q] = torch.arange(piece.q.stop - piece.q.start, dtype=torch.int32)
            context[piece.seen] = 1
        else:
            piece_of_k[piece.seen] = number
    piece_of_q, piece_of_k, place_q, place_k, context = (
        t.to(device) for t in (piece_of_q, piece_of_k, place_q, place_k, context)
    )

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (piece_of_q[i] == piece_of_k[j]) & (place_k[j] <= place_q[i])
        return own | ((context[j] == 1) & (piece_of_q[i] > 0))

    torch.compiler.reset()  # or the next layouts count as recompilations, of which few are allowed
    mask = create_block_mask(sees, None, None, scene.q_rows, scene.k_rows, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        return (compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1),)

    return attend


def flash(scene: Scene, device: torch.device) -> Attention:
    """FlashAttention's kernel for packed sequences, if the package is installed."""
    if device.type != "cuda":
        raise Unavailable("it runs on GPUs only")
    try:
        varlen = importlib.import_module("flash_attn").flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable("flash_attn is not installed") from error
    lengths = torch.tensor([piece.q.stop - piece.q.start for piece in scene.pieces])
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    longest = int(lengths.max())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        if query.dtype == torch.float32:
            raise Unavailable("it knows no float32")
        return (varlen(query, key, value, bounds, bounds, longest, longest, causal=True),)

    return attend


# The contest


def contest(
    options: Options, heads: Heads, dtype: torch.dtype, scene_of: Callable[[bool], Scene], backward: bool
) -> Contest:
    device = options.device
    scene = scene_of(options.quick)
    sizes = ((scene.q_rows, heads.query), (scene.k_rows, heads.key), (scene.k_rows, heads.key))
    leaves = [torch.randn(rows, count, heads.width).to(device, dtype) for rows, count in sizes]
    upstream = [torch.randn(scene.q_rows, heads.query, heads.width).to(device)]
    layout = scene.layout.to(device)
    attentions: dict[str, Attention] = {OURS: lambda q, k, v: (ops.compressed_context_attention(q, k, v, layout),)}
    peers, bars = _peers(options, scene, device, backward)
    absent = {}
    for name, make in peers.items():
        try:
            attentions[name] = make()
        except (Unavailable, ImportError) as error:
            absent[name] = str(error)
    plain = partial(plain_matmuls, scene)
    attentions["plain matmuls"] = plain

    def call(attention: Attention, leaves: list[Tensor] = leaves) -> tuple[Tensor, ...]:
        if backward:
            return with_gradients(attention, leaves, upstream)
        return without_gradients(attention, leaves)

    calls = {name: partial(call, attention) for name, attention in attentions.items()}
    check = accuracy_check(calls, partial(call, plain), partial(call, plain, cast(leaves, torch.float64)))
    return Contest(calls, check, floor(scene, heads, dtype, backward), bars, absent=absent)


def _peers(
    options: Options, scene: Scene, device: torch.device, backward: bool
) -> tuple[dict[str, Callable[[], Attention]], list[Bar]]:
    """Beside plain matmuls, by what the scene is; and its bars."""

    def compiled() -> Attention:
        if backward and device.type == "cpu":
            raise Unavailable("it has no backward on CPUs")
        return options.compiled_peer(partial(flex, scene, device))

    flexible = {FLEX: compiled}

    def each() -> Attention:
        return partial(sdpa_each, scene)

    if scene.q_rows != scene.k_rows:
        peers = {"SDPA, each": each, "SDPA, mask": partial(sdpa_cache, scene, device)}
        return peers | flexible, [_never_slower()]
    if scene.layout.contexts.shape[1]:
        peers = {
            "SDPA, context repeated": partial(sdpa_repeated, scene, device),
            "clara_fast, context repeated": partial(ours_repeated, scene, device),
        }
        return peers | flexible, [Bar("3x with the context repeated", "ratio", 3, tuple(peers)), _never_slower()]
    peers = {"SDPA, each": each, "SDPA, padded": partial(sdpa_padded, scene, device)}
    return peers | flexible | {FLASH: partial(flash, scene, device)}, [_never_slower()]


def _never_slower() -> Bar:
    return Bar("never slower than the best", "ratio", 1)


def floor(scene: Scene, heads: Heads, dtype: torch.dtype, backward: bool) -> Floor:
    """Two products over what is visible forward, five backward; each tensor once."""
    visible = 0
    for piece in scene.pieces:
        rows, own = piece.q.stop - piece.q.start, piece.own.stop - piece.own.start
        visible += rows * (piece.seen.stop - piece.seen.start) + (rows * (rows + 1) // 2 if own else 0)
    flops = 4 * visible * heads.query * heads.width
    query = scene.q_rows * heads.query * heads.width * dtype.itemsize
    seen = {row for piece in scene.pieces for s in (piece.seen, piece.own) for row in range(s.start, s.stop)}
    keys = 2 * len(seen) * heads.key * heads.width * dtype.itemsize
    if not backward:
        return Floor(query + keys, query, flops, dtype_name(dtype))
    # Backward reads query, keys, output and its gradient, and writes three gradients.
    return Floor(4 * query + 2 * keys, 2 * query + keys, flops * 7 // 2, dtype_name(dtype))
