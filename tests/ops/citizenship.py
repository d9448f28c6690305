"""What holds for every operator on every device: checks that ``tests/ops`` runs on the CPU and ``tests/gpu`` on GPUs.

A case is made for a device and dtype. Its function takes the floating inputs; everything else is bound to it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from ops_checks import assert_within_budget
from torch import Tensor

from clara_fast import ops
from clara_fast.ops import ContextLayout, reference

SIZE = 72


@dataclass
class Case:
    function: Callable  # the operator
    reference: Callable  # what it means
    inputs: list[Tensor]
    factor: float = 2.0  # 3 where products are taken in another order than the reference's
    rounds: bool = False  # whether the operator's meaning rounds to the dtype on the way


def _pool(device: str, dtype: torch.dtype) -> Case:
    offsets = torch.tensor([1, 6, 9, 40], dtype=torch.int32, device=device)
    functions = [
        lambda hidden, weight, f=f: f(hidden, offsets, 2, norm_weight=weight)
        for f in (ops.pool_memory, reference.pool_memory)
    ]
    return Case(*functions, [torch.randn(41, SIZE), torch.randn(SIZE)], rounds=True)


def _topk(device: str, dtype: torch.dtype) -> Case:
    functions = [lambda queries, keys, f=f: f(queries, keys, 7) for f in (ops.cosine_topk, reference.cosine_topk)]
    return Case(functions[0], _in_float32(functions[1]), [torch.randn(5, SIZE), torch.randn(300, SIZE)])


def _select(device: str, dtype: torch.dtype) -> Case:
    # Cosines far enough apart for every dtype to rank them alike.
    angles = torch.stack([torch.randperm(12) for _ in range(3)]) * 0.2 + 0.1
    plane = torch.linalg.qr(torch.randn(SIZE, 2)).Q.t()
    keys = torch.stack((angles.cos(), angles.sin()), -1) @ plane * (torch.rand(3, 12, 1) + 0.5)
    valid = (torch.arange(36).view(3, 12) % 5 != 3).to(device)
    functions = [
        lambda query, keys, memory, f=f: f(query, keys, memory, 4, temperature=0.3, valid=valid)
        for f in (ops.select_memory, reference.select_memory)
    ]
    inputs = [plane[0].repeat(3, 1), keys, torch.randn(3, 12, 2, 40)]
    return Case(functions[0], _in_float32(functions[1]), inputs, factor=3)


def _attention(device: str, dtype: torch.dtype) -> Case:
    layout = ContextLayout.branches([40, 7], [[9, 3, 1], [0, 5]], device=device)
    functions = [
        lambda query, key, value, f=f: f(query, key, value, layout)
        for f in (ops.compressed_context_attention, reference.compressed_context_attention)
    ]
    return Case(*functions, [torch.randn(65, heads, 64) for heads in (6, 2, 2)], factor=3)


def _in_float32(function: Callable) -> Callable:
    """The reference for operators that take any dtype and work in float32: rounded once, at the end."""

    def wide(*inputs: Tensor):
        outputs = function(*(x if x.dtype == torch.float64 else x.float() for x in inputs))
        rounded = outputs[0].to(inputs[0].dtype) if len(outputs) == 3 else outputs[0]
        return rounded, *outputs[1:]

    return wide


MAKERS = {
    "pool_memory": _pool,
    "cosine_topk": _topk,
    "select_memory": _select,
    "compressed_context_attention": _attention,
}


def make(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    case = MAKERS[name](device, dtype)
    case.inputs = [tensor.to(device, dtype) for tensor in case.inputs]
    return case


def strided(tensor: Tensor) -> Tensor:
    """The same values, every other element and row of a larger tensor, dimensions stored in another order."""
    spacious = tensor.new_zeros([2 * size for size in tensor.shape[::-1]]).permute(*range(tensor.dim() - 1, -1, -1))
    view = spacious[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def check_error_budget(name: str, device: str, dtype: torch.dtype) -> None:
    case = make(name, device, dtype)
    rounding = dtype if case.rounds else torch.float64
    assert_within_budget(case.function, case.reference, case.inputs, case.factor, rounding)


def check_strides(name: str, device: str, dtype: torch.dtype) -> None:
    """Views with gaps, transposed, as inputs and as upstream gradients."""
    case = make(name, device, dtype)
    plain = values_and_gradients(case.function, case.inputs)
    views = values_and_gradients(case.function, [strided(tensor) for tensor in case.inputs], strided)
    for ours, theirs in zip(views, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=64 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


def check_rerun(name: str, device: str, dtype: torch.dtype) -> None:
    """Bit-identical, and without a trace in the inputs or in the upstream gradients."""
    case = make(name, device, dtype)
    before = [tensor.clone() for tensor in case.inputs]
    first = values_and_gradients(case.function, case.inputs)
    for _ in range(3):
        for ours, theirs in zip(values_and_gradients(case.function, case.inputs), first, strict=True):
            assert torch.equal(ours, theirs)
    for tensor, copy in zip(case.inputs, before, strict=True):
        assert torch.equal(tensor, copy)


def check_compiled(name: str, device: str, dtype: torch.dtype, backend: str) -> None:
    case = make(name, device, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, backend=backend)
    for ours, theirs in zip(
        values_and_gradients(compiled, case.inputs), values_and_gradients(case.function, case.inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def values_and_gradients(
    function: Callable, inputs: list[Tensor], reshape: Callable = lambda tensor: tensor
) -> list[Tensor]:
    """Outputs, and gradients for upstream gradients that must come back as they were."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [out for out in outputs if out.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [reshape(torch.randint(-8, 9, out.shape, generator=generator).to(out) / 8) for out in used]
    copies = [grad.clone() for grad in upstream]
    grads = torch.autograd.grad(used, leaves, upstream)
    for grad, copy in zip(upstream, copies, strict=True):
        assert torch.equal(grad, copy)
    return [tensor.detach() for tensor in (*outputs, *grads)]
