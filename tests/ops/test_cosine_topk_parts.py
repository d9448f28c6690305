"""Keys in several tensors: the kernel and the plain way give what one tensor gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_fast import ops
from clara_fast.ops import _library
from clara_fast.ops import cosine_topk_parts as module
from clara_fast.ops.cosine_topk_parts import cosine_topk_parts
from clara_fast.store.formats import FORMATS

FORMAT_NAMES = st.sampled_from(list(FORMATS))


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def stored(counts, tokens, width, name):
    """Parts of keys whose rows often repeat, so that ties lie within and between parts, and their scales."""
    distinct = torch.randn(7, tokens, width)
    rows = distinct[torch.randint(0, 7, (sum(counts),))]
    values, scales = FORMATS[name].encode(rows)
    parts = [part.contiguous() for part in values.flatten(1).split(counts)]
    return parts, None if scales is None else [part.contiguous() for part in scales.split(counts)]


def expected(queries, keys, k, scales, allowed):
    """By the operator on all keys that may be found, in one tensor."""
    kept = torch.cat(allowed).nonzero()[:, 0]
    key_scales = None if scales is None else torch.cat(scales)[kept]
    scores, indices = ops.cosine_topk(queries, torch.cat(keys)[kept], k, key_scales=key_scales)
    return scores, kept[indices]


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=5).filter(sum),
    name=FORMAT_NAMES,
    tokens=st.sampled_from([1, 2]),
    width=st.sampled_from([64, 100, 576]),
    batch=st.sampled_from([1, 3, 40]),
    share=st.sampled_from([0.02, 0.5, 1.0]),
    seed=st.integers(0, 1000),
    native=st.booleans(),
)
def test_parts_give_what_one_tensor_gives(counts, name, tokens, width, batch, share, seed, native):
    torch.manual_seed(seed)
    keys, scales = stored(counts, tokens, width, name)
    allowed = [torch.rand(count) < share for count in counts]
    number = int(torch.cat(allowed).sum())
    queries = torch.randn(batch, tokens * width)
    masks = [None if bool(mask.all()) else mask for mask in allowed]
    for k in {0, min(1, number), number // 2, number}:
        with pytest.MonkeyPatch.context() as patch:
            if not native:
                patch.setattr(module, "kernel_for", lambda *_: None)
            found = cosine_topk_parts(queries, keys, k, key_scales=scales, allowed=masks)
        wanted = expected(queries, keys, k, scales, allowed)
        # Sums may round differently at another place in a block, also between equal keys.
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-6)
        assert all(bool(torch.cat(allowed)[row].all()) and len(row.unique()) == k for row in found[1])


@pytest.mark.parametrize("k", [10, 1500])
@pytest.mark.parametrize("batch", [2, 300])
def test_ties_go_to_the_lower_index_across_parts(threads, k, batch):
    """k above 1024 takes the other way of sharing keys out; 300 queries are more than one group."""
    keys = [torch.ones(count, 64, dtype=torch.bfloat16) for count in (500, 0, 1300, 700)]
    allowed = [None, None, torch.arange(1300) % 3 > 0, None]
    scores, indices = cosine_topk_parts(torch.ones(batch, 64), keys, k, allowed=allowed)
    everything = torch.cat([torch.ones(500), torch.arange(1300) % 3 > 0, torch.ones(700)]).nonzero()[:, 0]
    assert scores.sub(1).abs().max() < 1e-6
    assert indices.equal(everything[:k].expand(batch, -1))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are let go, and looked for, on Linux only")
def test_pages_are_let_go(tmp_path, threads):
    path = tmp_path / "keys"
    torch.randn(4, 256, 1024).numpy().tofile(path)
    mapped = torch.from_file(str(path), size=4 * 256 * 1024).view(4, 256, 1024)

    def resident() -> int:
        text = Path("/proc/self/smaps").read_text()
        block = text[text.index(str(path)) :]
        return int(block[block.index("Rss:") + 4 :].split()[0]) * 1024

    queries = torch.randn(2, 1024)
    kept = cosine_topk_parts(queries, list(mapped), 5)
    assert resident() > 3 << 20
    released = cosine_topk_parts(queries, list(mapped), 5, release=True)
    assert resident() < 1 << 20
    assert all(a.equal(b) for a, b in zip(kept, released, strict=True))


def test_what_does_not_fit():
    keys = [torch.randn(5, 64), torch.randn(6, 64)]
    queries = torch.randn(1, 64)
    with pytest.raises(RuntimeError, match=r"k \(12\) must be at least 0 and at most the number of keys \(11\)"):
        cosine_topk_parts(queries, keys, 12)
    with pytest.raises(RuntimeError, match=r"at most the number of keys \(1\)"):
        cosine_topk_parts(queries, keys, 2, allowed=[torch.arange(5) < 0, torch.arange(6) < 1])
    with pytest.raises(RuntimeError, match="one type and number of scales"):
        cosine_topk_parts(queries, [keys[0], keys[1].bfloat16()], 1)
    with pytest.raises(RuntimeError, match="allowed has a shape that does not fit"):
        cosine_topk_parts(queries, keys, 1, allowed=[None, torch.ones(5, dtype=torch.bool)])


def test_the_kernel_is_there():
    assert "cosine_topk_parts" in _library.native
