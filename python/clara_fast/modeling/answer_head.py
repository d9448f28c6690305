"""From the decoder's states to the answers' loss without the logits of all answer tokens at once.

The head is frozen in every stage, so the gradient of the states needs no more than one chunk of logits: it is computed
along with the loss, in forward, and backward only scales it. That costs what the plain computation costs, and neither
``[n, V]`` logits nor their float32 copies are kept.

(torch 2.13 has ``linear_cross_entropy`` with the same plan. It is left out: its chunks are smaller still, and on CPUs
it takes two to twenty times as long; and for bfloat16 states it returns a bfloat16 loss. ``clara-fast bench --only
answer_loss`` shows both.)
"""

from __future__ import annotations

import copy
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits that are held at once: small enough for a CPU's cache, large enough to keep a GPU busy.
CPU_CHUNK, DEVICE_CHUNK = 1 << 22, 1 << 26


def answer_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """``F.cross_entropy(head(hidden).float(), labels, reduction="sum")``, in chunks of rows.

    Exact, whatever the head is made of (biased, quantised). A head that trains, or that is sharded over processes, is
    called once, and so it is under ``torch.compile``, which fuses the float32 copies away. On CUDA,
    Liger-Kernel (the extra ``liger``) does the same in fewer passes where it is installed.

    Args:
        hidden: ``[n, D]`` states, in the head's dtype.
        labels: ``[n]`` int64, each below ``V``.
        head: ``[n, D]`` to ``[n, V]``.

    Returns:
        Scalar, float32 (float64 for float64 states).
    """
    # A DTensor has a full_tensor: processes with different answers would gather the head at different times.
    if torch.compiler.is_compiling() or any(p.requires_grad or hasattr(p, "full_tensor") for p in head.parameters()):
        return _dense(head, hidden, labels)
    if hidden.is_cuda and _liger_reads(hidden, head):
        return liger_cross_entropy(hidden, labels, cast(nn.Linear, head))
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, labels, head)
    return loss


def logits_are_plain(lm: Any) -> bool:
    """Whether the model's logits are its head on its decoder's states and nothing more: no soft cap, no scale.

    Asked of the model itself, by letting its ``forward`` run on made-up states in the decoder's place: configurations
    name such things in many ways (``final_logit_softcapping``, ``logits_scaling``, ``logit_scale``, ...). Where the
    question cannot be put, the answer is no.
    """
    head, prefix = lm.get_output_embeddings(), getattr(lm, "base_model_prefix", "")
    if head is None or not prefix or getattr(lm, prefix, None) is not lm.get_decoder():
        return False
    weight = next(head.parameters(), None)
    if weight is None or weight.is_meta:
        return False
    draw = torch.Generator().manual_seed(0)
    width = lm.get_input_embeddings().embedding_dim
    states = torch.randn(1, 2, width, generator=draw).to(weight.device, lm.dtype)
    twin = copy.copy(lm)
    twin._modules = {**lm._modules, prefix: _States(states)}
    try:
        with torch.no_grad():
            # Large logits: a soft cap leaves small ones as they are.
            twin._modules[prefix].states = states = states * (1000 / head(states).abs().max())
            logits = twin(inputs_embeds=states, use_cache=False).logits
            return torch.equal(logits, head(states))
    except Exception:  # whatever a foreign model raises when it is run like this
        return False


class _States(nn.Module):
    """Stands where a decoder stood, and has its states ready."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast  # the plain one and router logits

        return MoeModelOutputWithPast(last_hidden_state=self.states)


@cache
def _has_liger() -> bool:
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


def _liger_reads(hidden: Tensor, head: nn.Module) -> bool:
    """Its kernels read a plain table of the states' dtype, and nothing of autocast's."""
    plain = type(head) is nn.Linear and head.weight.dtype == hidden.dtype != torch.float64
    return plain and not torch.is_autocast_enabled("cuda") and _has_liger()


def liger_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """:func:`answer_cross_entropy` by Liger-Kernel."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(hidden, head.weight, labels, head.bias, reduction="sum")
    return loss


def _dense(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(_wide(logits)), labels, reduction="sum")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:  # type: ignore[override]
        asked = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if asked else None
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        limit = DEVICE_CHUNK if hidden.is_cuda else CPU_CHUNK
        # Where the head does not say how wide its logits are, one row tells.
        rows, start = limit // getattr(head, "out_features", limit), 0
        while start < len(hidden):
            chunk = hidden[start : start + max(rows, 1)].detach()
            with torch.set_grad_enabled(asked):
                logits = head(chunk.requires_grad_(asked))
                loss = F.cross_entropy(logits.to(_wide(logits)), labels[start : start + len(chunk)], reduction="sum")
            if gradient is not None:
                loss.backward()  # reaches the chunk alone: the head is frozen
                assert chunk.grad is not None
                gradient[start : start + len(chunk)] = chunk.grad
            total += loss.detach()
            start += len(chunk)
            rows = limit // logits.shape[-1]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient.to(_wide(gradient)) * upstream).to(gradient.dtype), None, None
