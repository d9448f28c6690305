"""What the tests of all operators share."""

from collections.abc import Callable

import torch
from torch import Tensor

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
    upstream = [torch.randint(-8, 9, out.shape, generator=generator).to(out.dtype) / 8 for out in outputs]
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
) -> None:
    """error(operator to float64) <= factor * error(reference in the same dtype to float64) + rounding.

    For every floating output and every gradient; rounding is two units in the last place of the largest
    element, in the dtype of the output or, if coarser, in ``rounded_within``, to which the operator's meaning
    rounds on the way.
    """
    exact = values_and_grads(reference, [tensor.double() for tensor in inputs])
    eager = values_and_grads(reference, inputs)
    actual = values_and_grads(operator, inputs)
    assert len(actual) == len(eager) == len(exact)
    for position, (ours, theirs, true) in enumerate(zip(actual, eager, exact, strict=True)):
        assert ours.shape == theirs.shape == true.shape
        eps = max(torch.finfo(ours.dtype).eps, torch.finfo(rounded_within).eps)
        rounding = 2 * eps * (true.abs().max().item() if true.numel() else 0.0)
        budget = factor * error(theirs, true) + rounding
        assert error(ours, true) <= budget, f"tensor {position}: {error(ours, true):.3g} > {budget:.3g}"


def assert_same(operator: Callable, reference: Callable, inputs: list[Tensor], tolerance: float = 1e-9) -> None:
    """Equal to float64 rounding, values and gradients."""
    for ours, theirs in zip(values_and_grads(operator, inputs), values_and_grads(reference, inputs), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
