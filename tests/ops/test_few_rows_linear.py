"""Few rows through a linear layer and its adapter, against torch and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clara_fast.ops import _library
from clara_fast.ops.few_rows_linear import MOST_ROWS, FewRowsLinear, few_rows_linear

SHAPES = [(1, 1, 1, 1), (1, 576, 192, 16), (2, 63, 49, 3), (3, 65, 1, 8), (5, 100, 96, 70), (8, 17, 47, 130)]
LONG = (2, 3 * 12288 + 5, 50, 4)  # more than the kernel adds up in one go
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(not _library.native, reason="no native kernels")


def operands(rows, columns, outputs, rank, dtype, adapter_dtype=torch.float32):
    torch.manual_seed(rows + columns)
    x, weight, bias = torch.randn(rows, columns), torch.randn(outputs, columns), torch.randn(outputs)
    down, up = torch.randn(rank, columns), torch.randn(outputs, rank)
    return [t.to(dtype) for t in (x, weight, bias)] + [t.to(adapter_dtype) for t in (down, up)]


def with_torch(x, weight, bias, down, up, scaling):
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def error(mine, exact):
    return float((mine.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, LONG])
def test_as_accurate_as_torch(shape, dtype):
    tensors = operands(*shape, dtype)
    exact = with_torch(*(t.double() for t in tensors), 0.5)
    with torch.no_grad():
        mine = few_rows_linear(*tensors, 0.5)
        assert torch.equal(mine, few_rows_linear(*tensors, 0.5))
    assert mine.dtype == dtype
    assert error(mine, exact) <= 2 * error(with_torch(*tensors, 0.5), exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("parts", ["weight", "bias", "adapter"])
def test_parts_and_shapes_of_inputs(parts):
    x, weight, bias, down, up = operands(6, 40, 24, 4, torch.float32)
    x = x.view(2, 3, 40).transpose(0, 1)  # not contiguous
    given = {"weight": {}, "bias": {"bias": bias}, "adapter": {"down": down, "up": up, "scaling": 2.0}}[parts]
    with torch.inference_mode():
        mine = few_rows_linear(x, weight, **given)
    none = torch.zeros(24, dtype=torch.float64)
    exact = with_torch(
        x.double(),
        weight.double(),
        given.get("bias", none).double(),
        down.double(),
        up.double(),
        given.get("scaling", 0.0),
    )
    assert mine.shape == exact.shape
    assert error(mine, exact) < 1e-6


def test_what_is_not_a_number_stays_in_its_row():
    x, weight, bias, down, up = operands(3, 70, 30, 4, torch.float32)
    with torch.no_grad():
        before = few_rows_linear(x, weight, bias, down, up)
        x[1, 69] = float("nan")
        after = few_rows_linear(x, weight, bias, down, up)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_left_to_torch():
    """What has gradients, many rows, another dtype, or is more than a tensor."""
    x, weight, bias, down, up = operands(2, 32, 24, 4, torch.float32)
    assert few_rows_linear(x, weight) is None  # gradients are on
    with torch.no_grad():
        assert few_rows_linear(x, weight, bias, down, up) is not None
        assert few_rows_linear(torch.randn(MOST_ROWS + 1, 32), weight) is None
        assert few_rows_linear(x[:0], weight) is None
        assert few_rows_linear(x.double(), weight.double()) is None
        assert few_rows_linear(x.bfloat16(), weight) is None
        assert few_rows_linear(x, weight[:, ::2].t()) is None
        assert few_rows_linear(x, weight, down=down.double(), up=up.double()) is None
        assert few_rows_linear(x.to("meta"), weight.to("meta")) is None
        assert few_rows_linear(x, weight.as_subclass(type("Quantised", (torch.Tensor,), {}))) is None
        with torch.autocast("cpu"):
            assert few_rows_linear(x, weight) is None


def test_a_linear_layer_of_few_rows_is_a_linear_layer():
    layer = nn.Linear(48, 20)
    layer.__class__ = FewRowsLinear
    x = torch.randn(4, 48)
    expected = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)  # with gradients it is torch's
    with torch.no_grad():
        assert few_rows_linear(x, layer.weight, layer.bias) is not None
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)


def test_the_kernel_checks_what_it_is_given():
    kernel = _library.native["few_rows_linear"]
    x, weight, bias, down, up = operands(2, 32, 24, 4, torch.float32)
    for arguments, said in [
        ((torch.randn(9, 32), weight, None, None, None), "x must have 1 to 8 rows"),
        ((x, weight[:, :31].contiguous(), None, None, None), "weight has a shape"),
        ((x, weight.t(), None, None, None), "weight"),
        ((x, weight, bias[:3], None, None), "bias has a shape"),
        ((x, weight, bias, down, None), "down and up go together"),
        ((x, weight, bias, down, up[:, :2].contiguous()), "up has a shape"),
        ((x.double(), weight, None, None, None), "x must be float32, bfloat16 or float16"),
        ((x, weight.double(), None, None, None), "weight must be float32, bfloat16 or float16"),
    ]:
        with pytest.raises(RuntimeError, match=said):
            kernel(*arguments, 1.0)
