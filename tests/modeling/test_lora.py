"""Our LoRA layer against peft's own and against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora import Linear, LoraConfig
from torch import nn

from clara_fast.modeling import lora
from clara_fast.ops.few_rows_linear import MOST_ROWS

IN, OUT, RANK = 48, 32, 4
MERGED = 2 * IN * OUT // (IN + OUT) + 1


def layers(dtype: torch.dtype, dropout: float = 0.0) -> tuple[nn.Module, lora.RoleLinear, nn.Module]:
    """peft's layer, ours and peft's in float64, with the same parameters; those that train are float32."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT).to(dtype).requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout)
    peft = Linear(base, "role", config, r=RANK, lora_alpha=2 * RANK)
    for name, parameter in peft.named_parameters():
        if ".role." in name:
            parameter.data = torch.randn(parameter.shape)
    ours = copy.deepcopy(peft)
    lora.use_role_linears(nn.Sequential(ours))
    assert type(ours) is lora.RoleLinear
    ours._active_adapter = "role"
    return peft, ours, copy.deepcopy(peft).double()


def error(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return float((mine.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, RANK, MOST_ROWS, MOST_ROWS + 1, MERGED - 1, MERGED])
def test_inference_is_as_accurate_as_peft(dtype, rows, monkeypatch):
    peft, ours, exact = layers(dtype)
    merged = []
    monkeypatch.setattr(torch, "addmm", lambda *a, f=torch.addmm, **k: merged.append(a) or f(*a, **k))
    x = torch.randn(1, rows, IN).to(dtype)
    with torch.no_grad():
        mine, other, true = ours(x), peft(x), exact(x.double())
    assert mine.dtype == dtype
    assert mine.shape == other.shape
    assert len(merged) == (dtype == torch.float32 and rows == MERGED)
    assert error(mine, true) <= 2 * error(other, true) + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype):
    """bfloat16 rounds each gradient once, to bfloat16, which peft keeps in float32."""
    x, grad = torch.randn(2, 9, IN).to(dtype), torch.randn(2, 9, OUT).to(dtype)
    found = []
    for layer in layers(dtype):
        wide = next(iter(layer.parameters())).dtype
        leaf = x.detach().to(wide).requires_grad_()
        layer(leaf).backward(grad.to(wide))
        found.append([leaf.grad, *(p.grad for n, p in layer.named_parameters() if ".role." in n)])
    for other, mine, true in zip(*found, strict=True):
        assert mine.dtype == other.dtype
        assert error(mine, true) <= 2 * error(other, true) + torch.finfo(dtype).eps


def test_dropout_is_dropout_and_its_gradient_is_that_of_what_was_kept():
    _, ours, _ = layers(torch.float32, dropout=0.25)
    ours.double().train()
    x = torch.randn(4096, IN, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        bare = ours.base_layer(x)
    state = torch.get_rng_state()
    out = ours(x)
    mask = torch.empty(x.shape, dtype=torch.bool)
    torch.set_rng_state(state)
    mask.bernoulli_(0.75)
    assert mask.double().mean().item() == pytest.approx(0.75, abs=0.01)
    down, up = ours.lora_A["role"].weight, ours.lora_B["role"].weight
    kept = x * mask / 0.75
    torch.testing.assert_close(out - bare, 2 * (kept @ down.T @ up.T))
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, [x, down, up], grad)
    true = torch.autograd.grad(ours.base_layer(x) + 2 * (kept @ down.T @ up.T), [x, down, up], grad)
    for one, other in zip(mine, true, strict=True):
        torch.testing.assert_close(one, other)
    torch.set_rng_state(state)
    with torch.no_grad():  # as a reentrant checkpoint computes what it will compute again with a graph
        assert torch.equal(ours(x), out)
    ours.eval()
    assert torch.equal(ours(x), ours(x))
