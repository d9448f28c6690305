"""The answers' loss in chunks: exact for any head, frugal, and not for models whose logits are more than the head's."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from clara_fast.modeling import answer_head
from clara_fast.modeling.answer_head import answer_cross_entropy, logits_are_plain
from clara_fast.modeling.branches import pack_groups, question_branches
from tests.modeling.test_clara import fresh
from tests.modeling.tiny import ARCHITECTURES, DOCUMENTS, make_base

D, V = 24, 150


class Int8Head(nn.Module):
    """A head as quantisation libraries leave it: an integer table, scaled back to the states' dtype in forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.table = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.table.to(hidden.dtype) * self.scale.to(hidden.dtype))


def make_head(kind, dtype=torch.float32):
    linear = nn.Linear(D, V, bias=kind == "biased").requires_grad_(False)
    nn.init.normal_(linear.weight, std=0.5)
    return (Int8Head(linear) if kind == "int8" else linear).to(dtype if kind != "int8" else torch.float32)


def loss_and_gradient(function, hidden, labels, head, upstream):
    hidden = hidden.clone().requires_grad_()
    loss = function(hidden, labels, head)
    (loss * upstream).backward()
    return loss.detach(), hidden.grad


def plain(hidden, labels, head):
    logits = head(hidden)
    return F.cross_entropy(
        logits.double() if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum"
    )


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "biased", "int8"])
def test_as_exact_as_all_logits_at_once(monkeypatch, kind, dtype, n):
    monkeypatch.setattr(answer_head, "CPU_CHUNK", 6 * V)
    head = make_head(kind, dtype)
    hidden, labels = torch.randn(n, D, dtype=dtype), torch.randint(V, (n,))
    upstream = torch.rand((), dtype=torch.float32) + 0.1
    exact = loss_and_gradient(plain, hidden.double(), labels, head.double() if kind != "int8" else head, upstream)
    head = head.to(dtype) if kind != "int8" else head
    eager = loss_and_gradient(plain, hidden, labels, head, upstream)
    ours = loss_and_gradient(answer_cross_entropy, hidden, labels, head, upstream)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[1].dtype == dtype
    # What a loss is summed from, and a gradient (|softmax - onehot| sums to 2 at most); each term is rounded four times
    # on its way: exponential, quotient, product, upstream factor.
    sizes = (
        n * float(head(hidden).abs().max()),
        2 * float(upstream) * float(head(torch.eye(D, dtype=dtype)).abs().max()),
    )
    for mine, theirs, true, size in zip(ours, eager, exact, sizes, strict=True):
        error, budget = (mine - true).abs().max(), (theirs - true).abs().max()
        assert error <= 2 * budget + 4 * torch.finfo(mine.dtype).eps * size
    with torch.no_grad():
        assert torch.equal(answer_cross_entropy(hidden, labels, head), ours[0])


def test_only_a_chunk_of_logits_is_held(monkeypatch):
    monkeypatch.setattr(answer_head, "CPU_CHUNK", 6 * V)
    head = make_head("plain")
    rows, saved = [], []
    head.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    hidden = torch.randn(40, D, requires_grad=True)
    labels = torch.randint(V, (40,))
    # Hooks reach into the graph that remains; inside forward each chunk's own graph comes and goes.
    loss = answer_cross_entropy(hidden, labels, head)
    for tensor in loss.grad_fn.saved_tensors:
        saved.append(tuple(tensor.shape))
    assert sum(rows) == 40
    assert max(rows) == 6
    assert saved == [(40, D)]
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once)


def test_a_head_that_trains_gets_its_gradient():
    head = make_head("biased").requires_grad_()
    hidden, labels = torch.randn(9, D), torch.randint(V, (9,))
    answer_cross_entropy(hidden, labels, head).backward()
    expected = torch.autograd.grad(plain(hidden, labels, head), list(head.parameters()))
    assert all(torch.equal(p.grad, e) for p, e in zip(head.parameters(), expected, strict=True))


def test_compiled_in_one_graph():
    head = make_head("plain")
    hidden, labels = torch.randn(9, D), torch.randint(V, (9,))
    compiled = torch.compile(answer_cross_entropy, fullgraph=True, backend="aot_eager")
    ours = loss_and_gradient(compiled, hidden, labels, head, 0.5)
    for mine, theirs in zip(ours, loss_and_gradient(plain, hidden, labels, head, 0.5), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


SHAPE = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("Llama", {}, True),
        ("Llama", {"tie_word_embeddings": True}, True),
        ("Phi", {"num_key_value_heads": 2}, True),
        ("Mixtral", {}, True),
        ("Gemma2", {}, False),
        ("Gemma2", {"final_logit_softcapping": None}, True),
        ("Granite", {"logits_scaling": 4.0}, False),
        ("Granite", {"logits_scaling": 1.0}, True),
        ("Cohere", {}, False),
    ],
)
def test_which_logits_are_plain(name, options, expected):
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **HEADS, **options})
    lm = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    before = dict(lm._modules)
    assert logits_are_plain(lm) is expected
    assert lm._modules == before


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "granite"])
def model(request, tmp_path_factory):
    granite = (transformers.GraniteConfig, transformers.GraniteForCausalLM, {"logits_scaling": 3.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "granite", granite)
        base = make_base(tmp_path_factory.mktemp("base"), request.param)
    made = fresh(base, lora={"r": 4, "alpha": 8, "dropout": 0.0})
    assert made._plain_logits is (request.param != "granite")
    made.train_only("generator", "memory_tokens")
    return made.train()


def graded(model, num_items, *, by_logits):
    pairs = [("What?", "An answer of some length."), ("Who?", "A.")]
    prompts = pack_groups(model, [question_branches(model, pairs), question_branches(model, pairs[1:])])
    memory = model.encode(model.pack([d[:90] for d in DOCUMENTS[:2]]), "compressor")[0].flatten(0, 1)
    memory = memory.detach().requires_grad_()
    if by_logits:
        logits, labels = model.answer_logits(prompts, memory)
        loss = F.cross_entropy(logits, labels, reduction="sum") / (num_items or len(labels))
    else:
        loss = model.answer_loss(prompts, memory, num_items)
    trained = [p for n, p in model.named_parameters() if ".generator." in n]
    return loss, torch.autograd.grad(loss, [memory, *trained])


@pytest.mark.parametrize("num_items", [None, 31])
def test_the_models_loss_and_gradients(monkeypatch, model, num_items):
    monkeypatch.setattr(answer_head, "CPU_CHUNK", 5 * model.lm.get_output_embeddings().weight.shape[0])
    expected, gradients = graded(model, num_items, by_logits=True)
    loss, ours = graded(model, num_items, by_logits=False)
    assert torch.allclose(loss, expected, rtol=1e-6)
    for mine, theirs in zip(ours, gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()) + 1e-9)
    assert all(g.abs().max() > 0 for g in ours)


@pytest.mark.skipif(not (find_spec("liger_kernel") and find_spec("triton")), reason="needs Liger-Kernel and triton")
def test_liger_computes_the_same():
    """Its kernels run in Triton's interpreter here, which has to be chosen before triton is imported."""
    code = """
import torch, torch.nn.functional as F
from torch import nn
from clara_fast.modeling.answer_head import liger_cross_entropy
torch.manual_seed(0)
for bias in (False, True):
    head = nn.Linear(16, 100, bias=bias).requires_grad_(False)
    hidden, labels = torch.randn(9, 16, requires_grad=True), torch.randint(100, (9,))
    expected = F.cross_entropy(head(hidden), labels, reduction="sum")
    gradient, = torch.autograd.grad(expected / 7, hidden)
    loss = liger_cross_entropy(hidden, labels, head)
    mine, = torch.autograd.grad(loss / 7, hidden)
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=1e-5), (loss, expected)
    assert torch.allclose(mine, gradient, rtol=1e-4, atol=1e-6), (mine - gradient).abs().max()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=120)
