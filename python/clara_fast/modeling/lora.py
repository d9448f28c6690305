"""A linear layer with LoRA adapters, computed without the copies that peft makes.

peft computes ``base(x) + B(A(dropout(x.float()))) * scaling``: several passes over the output, and for a bfloat16 base
float32 copies of input and output, which training keeps. Here the product with ``B`` is added up in place, in the dtype
of the base. Parameters, names and files are peft's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

from clara_fast.ops.few_rows_linear import FewRowsLinear, few_rows_linear


class RoleLinear(Linear):
    """peft's layer over a plain ``nn.Linear``. Whatever else peft can do (merging, variants, ...) is left to it.

    Without gradients a few rows go through weight and adapter at once. For many, ``B @ A`` is added to a copy of the
    weight where that is less work, and only where the weight is as wide as the adapters: in bfloat16, what is small
    beside the weight would round away.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        role = self._active_adapter
        if args or kwargs or self._disable_adapters or self.merged_adapters or self.lora_variant:
            return super().forward(x, *args, **kwargs)
        if not isinstance(role, str) or role not in self.lora_A:
            return super().forward(x)
        down: Any = self.lora_A[role].weight
        up: Any = self.lora_B[role].weight
        base: Any = self.base_layer
        scaling = self.scaling[role]
        dropout = self.lora_dropout[role]
        chance = getattr(dropout, "p", 0.0) if dropout.training else 0.0
        # No gradient is asked for in the forward of a reentrant checkpoint either, where dropout is on.
        graph = torch.is_grad_enabled() or chance or _autocasts(x)
        if not graph and (few := few_rows_linear(x, base.weight, base.bias, down, up, scaling)) is not None:
            return few
        rows = x.reshape(-1, x.shape[-1])
        if not graph and base.weight.dtype == up.dtype and _merging_pays(rows.shape[0], base.weight):
            out = F.linear(rows, torch.addmm(base.weight, up, down, alpha=scaling), base.bias)
        elif rows.shape[0] < down.shape[0] and base.weight.dtype != down.dtype:
            return super().forward(x)  # a cast of the rows costs less than one of the adapters
        else:
            out = base(rows)
            rows, down = rows.to(out.dtype), down.to(out.dtype)
            hidden = _DroppedLinear.apply(rows, down, chance) if chance else F.linear(rows, down)
            # Nothing that made ``out`` needs its value in backward.
            out.addmm_(hidden, up.to(out.dtype).t(), alpha=scaling)
        return out.view(*x.shape[:-1], out.shape[-1])


def use_role_linears(model: nn.Module) -> None:
    """Turn plain linear layers into :class:`FewRowsLinear`, peft's over them into :class:`RoleLinear`.

    Quantised ones stay.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewRowsLinear
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is FewRowsLinear:
            module.__class__ = RoleLinear


def _merging_pays(rows: int, weight: Tensor) -> bool:
    """Whether adding ``B @ A`` to the weight, for this call alone, is less work than passing the rows through both."""
    out_features, in_features = weight.shape
    return rows * (in_features + out_features) > 2 * in_features * out_features


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


class _DroppedLinear(torch.autograd.Function):
    """``dropout(x [T, in]) @ weight [r, in].T``, which keeps ``x`` and a mask of bytes instead of a dropped copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, chance: float) -> Tensor:
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - chance)
        ctx.save_for_backward(x, weight, mask)
        ctx.kept = 1 - chance
        return F.linear(x * mask, weight) / ctx.kept

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, mask = ctx.saved_tensors
        grad = grad / ctx.kept
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_x = (grad @ weight).mul_(mask) if need_x else None
        return grad_x, grad.t() @ (x * mask) if need_weight else None, None
