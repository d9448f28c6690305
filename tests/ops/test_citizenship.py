"""Every operator as a guest of torch: modes, transforms, tracing, copies; and what holds on every device."""

import copy
import pickle

import citizenship
import pytest
import torch
from citizenship import MAKERS, make, values_and_gradients
from ops_checks import DTYPES
from torch._subclasses import FakeTensorMode

from clara_fast import ops
from clara_fast.ops import ContextLayout

every_op = pytest.mark.parametrize("name", MAKERS)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def total(value):
    return sum(out.square().sum() for out in as_tuple(value) if out.is_floating_point())


@every_op
@pytest.mark.parametrize("check", [citizenship.check_error_budget, citizenship.check_strides, citizenship.check_rerun])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_holds_on_every_device(name, check, dtype):
    if check is citizenship.check_error_budget and dtype == torch.float64:
        pytest.skip("float64 is what the others are measured against")
    check(name, "cpu", dtype)


@every_op
def test_compiles(name):
    citizenship.check_compiled(name, "cpu", torch.float32, "aot_eager")


@every_op
def test_deterministic_algorithms_are_no_trouble(name):
    torch.use_deterministic_algorithms(True)
    citizenship.check_rerun(name, "cpu", torch.float32)


@every_op
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name, mode):
    case = make(name)
    expected = as_tuple(case.function(*case.inputs))
    leaves = [tensor.requires_grad_() for tensor in case.inputs]
    with mode():
        actual = as_tuple(case.function(*leaves))
    assert not any(out.requires_grad for out in actual)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@every_op
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast(name, mixed):
    """As the operator outside, on inputs of one dtype; gradients come back in the dtypes of the leaves."""
    case = make(name)
    leaves = [tensor.requires_grad_() for tensor in case.inputs]
    given = [leaves[0].bfloat16(), *leaves[1:]] if mixed else leaves
    with torch.autocast("cpu", torch.bfloat16):
        outputs = as_tuple(case.function(*given))
        grads = torch.autograd.grad(total(outputs), leaves)
    assert [grad.dtype for grad in grads] == [torch.float32] * len(leaves)
    exact = as_tuple(case.reference(*(tensor.detach().double() for tensor in leaves)))
    for out, true in zip(outputs, exact, strict=True):
        assert (out.double() - true.double()).abs().max() <= 2**-5 * true.double().abs().max()


@every_op
@pytest.mark.parametrize("grad", [False, True])
def test_meta_and_fake_tensors(name, grad):
    case = make(name)
    expected = [(out.shape, out.dtype) for out in as_tuple(case.function(*case.inputs))]
    with torch.set_grad_enabled(grad):
        on_meta = make(name, "meta")
        assert [(out.shape, out.dtype) for out in as_tuple(on_meta.function(*on_meta.inputs))] == expected
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(tensor.requires_grad_(grad)) for tensor in case.inputs]
            outputs = as_tuple(case.function(*fakes))
            assert [(out.shape, out.dtype) for out in outputs] == expected
            if grad:
                grads = torch.autograd.grad(total(outputs), fakes)
                assert [g.shape for g in grads] == [x.shape for x in fakes]


@every_op
def test_export(name):
    case = make(name)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return case.function(*inputs)

    exported = torch.export.export(Module(), tuple(case.inputs)).module()
    for ours, theirs in zip(as_tuple(exported(*case.inputs)), as_tuple(case.function(*case.inputs)), strict=True):
        assert torch.equal(ours, theirs)


class TestTransforms:
    """None is supported, and each says so in one line: without it, some would give wrong numbers."""

    message = r"^clara_fast::{} does not work under torch.func.{}: give it the whole batch, .* torch.autograd$"

    @every_op
    @pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
    def test_reverse(self, name, transform):
        case = make(name)
        with pytest.raises(RuntimeError, match=self.message.format(name, "grad")):
            transform(lambda *x: total(case.function(*x)))(*case.inputs)

    @every_op
    def test_forward(self, name):
        case = make(name)
        with pytest.raises(RuntimeError, match=self.message.format(name, "jvp")):
            torch.func.jvp(lambda *x: total(case.function(*x)), tuple(case.inputs), tuple(case.inputs))
        with torch.autograd.forward_ad.dual_level():
            case.function(*case.inputs)  # none of them has a tangent
            dual = torch.autograd.forward_ad.make_dual(case.inputs[0], case.inputs[0])
            with pytest.raises(RuntimeError, match=rf"^clara_fast::{name} has no forward-mode derivative: use torch"):
                case.function(dual, *case.inputs[1:])

    @every_op
    @pytest.mark.parametrize("grad", [False, True])
    def test_vmap(self, name, grad):
        case = make(name)
        stacked = [torch.stack((tensor, tensor)) for tensor in case.inputs]
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=self.message.format(name, "vmap")):
            torch.func.vmap(case.function)(*stacked)

    def test_vmap_of_the_torch_op(self):
        with pytest.raises(RuntimeError, match=self.message.format("cosine_topk", "vmap")):
            torch.func.vmap(lambda q, k: torch.ops.clara_fast.cosine_topk(q, k, 2, None))(
                torch.randn(2, 3, 4), torch.randn(2, 5, 4)
            )

    @every_op
    def test_second_derivative(self, name):
        case = make(name)
        leaves = [tensor.requires_grad_() for tensor in case.inputs]
        grads = torch.autograd.grad(total(case.function(*leaves)), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"^clara_fast::{name}_backward has no derivative: differentiate once"):
            torch.autograd.grad(sum(grad.sum() for grad in grads), leaves)


class TestLayout:
    def layout(self):
        return ContextLayout.branches([3, 2], [[2], [1, 1]])

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, duplicate):
        layout = self.layout()
        assert all(torch.equal(*pair) for pair in zip(duplicate(layout).tensors(), layout.tensors(), strict=True))

    def test_is_a_tree_of_its_tensors(self):
        layout = self.layout()
        doubled = torch.utils._pytree.tree_map(lambda tensor: tensor * 2, {"layout": layout})["layout"]
        assert isinstance(doubled, ContextLayout)
        assert torch.equal(doubled.kv_len, layout.kv_len * 2)

    def test_is_exported(self):
        layout, inputs = self.layout(), [torch.randn(9, heads, 8) for heads in (4, 2, 2)]

        class Attention(torch.nn.Module):
            def forward(self, query, key, value, layout):
                return ops.compressed_context_attention(query, key, value, layout)

        rows, segments = torch.export.Dim("rows", min=3), torch.export.Dim("segments", min=3)
        program = torch.export.export(
            Attention(),
            (*inputs, layout),
            dynamic_shapes=({0: rows}, {0: rows}, {0: rows}, [{0: segments}] * 5),
        )
        other = ContextLayout.branches([4, 3], [[2, 2], [4, 1]])
        inputs = [torch.randn(16, heads, 8) for heads in (4, 2, 2)]
        expected = ops.compressed_context_attention(*inputs, other)
        assert torch.equal(program.module()(*inputs, other), expected)

    def test_compiled_with_one_made_inside_and_its_gradient(self):
        """Starts and lengths come from offsets on the device, so that no value is read."""

        def attend(query, key, value, offsets):
            start, length = offsets[:-1], offsets.diff()
            layout = ContextLayout(start, length, start, length, start.new_empty((start.shape[0], 0)))
            return ops.compressed_context_attention(query, key, value, layout)

        torch._dynamo.reset()
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        for lengths in ([3, 4], [5, 1, 2], [2, 2, 2, 3]):
            offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            inputs = [torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2)]

            def once(*leaves, offsets=offsets):
                for tensor in (*leaves, offsets):
                    torch._dynamo.mark_dynamic(tensor, 0)
                return compiled(*leaves, offsets)

            with torch._dynamo.config.patch(error_on_recompile=lengths != [3, 4]):
                ours = values_and_gradients(once, inputs)
            theirs = values_and_gradients(lambda *x, offsets=offsets: attend(*x, offsets), inputs)
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other)
