"""What the tests of all operators share."""

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from clara_fast.ops import ContextLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values_and_grads(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """The floating outputs of ``function(*inputs)`` and the gradients of the inputs for random upstream
    gradients.

    The upstream gradients depend on the outputs' shapes alone, and are numbers that every dtype holds
    exactly.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randint(-8, 9, out.shape, generator=generator).to(out) / 8 for out in outputs]
    joined = [(out, grad) for out, grad in zip(outputs, upstream, strict=True) if out.requires_grad]
    if joined:
        grads = torch.autograd.grad(
            [out for out, _ in joined],
            leaves,
            [grad for _, grad in joined],
            allow_unused=True,
            materialize_grads=True,
        )
    else:
        grads = [torch.zeros_like(leaf) for leaf in leaves]
    return [tensor.detach() for tensor in (*outputs, *grads)]


def error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def assert_within_budget(
    operator: Callable,
    reference: Callable,
    inputs: list[Tensor],
    factor: float = 2.0,
    rounded_within: torch.dtype = torch.float64,
    gradient_rounding: float = 0.0,
    gradient_terms: float = 0.0,
) -> None:
    """error(operator to float64) <= factor * error(reference in the same dtype to float64) + rounding.

    For every floating output and every gradient; rounding is two units in the last place of the largest
    element, in the dtype of the output or, if coarser, in ``rounded_within``, to which the operator's meaning
    rounds on the way. ``gradient_rounding`` is what gradients owe to a rounded result of forward that
    they start from, relative to the largest element or, where terms of the gradient cancel, to ``gradient_terms``.
    """
    exact = values_and_grads(reference, [tensor.double() for tensor in inputs])
    eager = values_and_grads(reference, inputs)
    actual = values_and_grads(operator, inputs)
    assert len(actual) == len(eager) == len(exact)
    for position, (ours, theirs, true) in enumerate(zip(actual, eager, exact, strict=True)):
        assert ours.shape == theirs.shape == true.shape
        eps = max(torch.finfo(ours.dtype).eps, torch.finfo(rounded_within).eps)
        largest = true.abs().max().item() if true.numel() else 0.0
        rounding = 2 * eps * largest
        if position >= len(actual) - len(inputs):
            rounding += gradient_rounding * max(largest, gradient_terms)
        budget = factor * error(theirs, true) + rounding
        assert error(ours, true) <= budget, f"tensor {position}: {error(ours, true):.3g} > {budget:.3g}"


def assert_same(operator: Callable, reference: Callable, inputs: list[Tensor], tolerance: float = 1e-9) -> None:
    """Equal to float64 rounding, values and gradients."""
    for ours, theirs in zip(values_and_grads(operator, inputs), values_and_grads(reference, inputs), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def vast_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched, for offsets past 2^31 elements."""
    size = torch.Size(shape).numel() * dtype.itemsize
    no_reserve = 0x4000
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def vast_pool_memory_arguments() -> tuple[Tensor, Tensor, Tensor]:
    """hidden of more than 2^31 elements whose last rows hold something, their offsets, and these rows."""
    rows, size, last = 2**18 + 9, 8192, 7
    hidden = vast_zeros(rows, size, dtype=torch.float16)
    hidden[-last:] = torch.randn(last, size)
    return hidden, torch.tensor([rows - last, rows], dtype=torch.int32), hidden[-last:].clone()


def vast_attention_arguments() -> tuple[list[Tensor], ContextLayout, list[Tensor], ContextLayout]:
    """One query on the last rows of more than 2^31 elements of keys, and the same on a copy of these rows."""
    rows, last = 2**24 + 9, 7
    key = vast_zeros(rows, 2, 64, dtype=torch.float16)
    key[-last:] = torch.randn(last, 2, 64)
    query = torch.randn(1, 2, 64).half()
    layout = ContextLayout.from_lists([0], [1], [rows - last], [last], [[]])
    short = key[-last:].clone()
    return [query, key, key], layout, [query, short, short], ContextLayout.from_lists([0], [1], [0], [last], [[]])
