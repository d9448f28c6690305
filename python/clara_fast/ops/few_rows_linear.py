"""A linear layer with its LoRA adapter for a few rows without a graph: decoding, where reading the weight is the work.

torch's own product reads it with one thread. Here all threads read it once, sums are float32 whatever the storage, and
the adapter costs its own bytes instead of a merged copy of the weight.
"""

from __future__ import annotations

from torch import Tensor, nn

from clara_fast.ops._library import KERNEL_DTYPES, autocasts, is_plain_inference, native_kernel

MOST_ROWS = 8
PLAIN = frozenset((nn.Parameter, Tensor))


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor | None:
    """``x @ weight.T + bias + scaling * (x @ down.T) @ up.T``, or None where this has no advantage or no kernel.

    It has on a CPU, without gradients, for at most eight rows in the weight's own dtype.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, float32, bfloat16 or float16.
        bias: ``[out]``.
        down: LoRA's A ``[r, in]``, which may be wider than the weight, as may all of the rest.
        up: LoRA's B ``[out, r]``.
        scaling: of the adapter.

    Returns:
        ``[..., out]`` in the dtype of ``x``, or None.

    Raises:
        RuntimeError: shapes that do not fit each other, or ``down`` without ``up``.
    """
    columns = x.shape[-1]
    if not x.is_cpu or not 0 < x.numel() <= MOST_ROWS * columns or not is_plain_inference(x) or autocasts(x):
        return None
    kernel = native_kernel("few_rows_linear", x, weight)
    if kernel is None:
        return None
    for tensor in (weight, bias, down, up):
        # Not what is quantised, sharded or otherwise more than a tensor.
        if tensor is not None and not (
            type(tensor) in PLAIN and tensor.dtype in KERNEL_DTYPES and tensor.is_contiguous()
        ):
            return None
    rows = x if x.ndim == 2 else x.reshape(-1, columns)
    out = kernel(rows.contiguous(), weight, bias, down, up, scaling)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], -1)


class FewRowsLinear(nn.Linear):
    """A linear layer that takes few rows the fast way."""

    def forward(self, input: Tensor) -> Tensor:
        out = few_rows_linear(input, self.weight, self.bias)
        return super().forward(input) if out is None else out
