"""What the kernels of selection share: norms, parts of a sum, and which candidates may be read."""

from __future__ import annotations

import triton
import triton.language as tl

# Candidates, slots and splits change from batch to batch: no kernel is compiled again for their values, nor for where
# small tensors lie.
UNSPECIALIZED = [
    *("num_keys", "k", "num_splits", "num_square_splits", "num_parts", "slot", "has_valid", "p_valid", "p_scores"),
    *("p_indices", "p_products", "p_squares", "p_ranks", "p_softmax", "p_own", "p_mean", "p_norms"),
    *("p_grad_scores", "p_grad_cosine"),
]


@triton.jit
def inverse_norm(square):
    """1 / sqrt, and 0 for a zero vector, whose cosine is 0."""
    return tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(square))


@triton.jit
def split_range(size, split, num_splits, BLOCK: tl.constexpr):
    """The part [first, last) of ``size`` elements that is one of ``num_splits``."""
    per_split = tl.cdiv(tl.cdiv(size, num_splits), BLOCK) * BLOCK
    first = split * per_split
    return first, tl.minimum(first + per_split, size)


@triton.jit
def readable_keys(p_valid, o_key, in_n, has_valid):
    """What is invalid may hold anything: nothing of it is read. Without ``has_valid`` neither is ``p_valid``."""
    b_readable = in_n
    if has_valid != 0:
        b_readable = in_n & (tl.load(p_valid + o_key, in_n, 0) != 0)
    return b_readable


@triton.jit
def sum_of_parts(p_parts, stride, o_n, in_n, num_splits, BLOCK_N: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """``[BLOCK_N]``: the sum over ``num_splits`` rows, ``stride`` apart."""
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for split in range(0, num_splits, BLOCK_SPLITS):
        o_s = split + tl.arange(0, BLOCK_SPLITS)
        p_part = p_parts + o_s[:, None].to(tl.int64) * stride + o_n[None, :]
        b_sum += tl.sum(tl.load(p_part, (o_s < num_splits)[:, None] & in_n[None, :], 0.0), 0)
    return b_sum
