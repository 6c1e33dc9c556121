"""Linears whose weight gradient goes through a transposed copy, against nn.Linear and against fp64."""

import copy

import pytest
import torch
from torch import nn

from sfd_fast.models import linear as linear_module
from sfd_fast.models.linear import ENOUGH_ROWS, Linear

SHAPES = [((4, 256, 48), 40), ((300, 33), 17), ((ENOUGH_ROWS - 1, 8), 8)]


@pytest.fixture(autouse=True)
def amx(monkeypatch):
    """The way of a CPU with AMX, on every CPU."""
    monkeypatch.setattr(linear_module, "has_amx", lambda: True)


def gradients(layer, x, *, autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(dy)
    return y, dy, x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape, width", SHAPES)
def test_values_are_those_of_nn_linear_and_gradients_are_as_close_to_fp64(shape, width, bias, autocast):
    torch.manual_seed(0)
    ours = Linear(shape[-1], width, bias=bias).to(torch.float32 if autocast else torch.bfloat16)
    plain = nn.Linear(shape[-1], width, bias=bias).to(ours.weight.dtype)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(shape).to(ours.weight.dtype)
    y, dy, dx, dw, db = gradients(ours, x, autocast=autocast)
    y_, _, dx_, dw_, db_ = gradients(plain, x, autocast=autocast)
    assert torch.equal(y, y_) and torch.equal(dx, dx_)
    assert dw.dtype == dw_.dtype == ours.weight.dtype
    exact = dy.double().flatten(0, -2).T @ x.bfloat16().double().flatten(0, -2)
    error = (dw.double() - exact).abs().max()
    assert error <= max(2 * float((dw_.double() - exact).abs().max()), 2**-8 * float(exact.abs().max()))
    if bias:
        torch.testing.assert_close(db.double(), dy.double().flatten(0, -2).sum(0), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("shape, width", [*SHAPES, ((0, 8), 8), ((5,), 3)])
def test_without_gradients_the_bits_are_those_of_nn_linear(shape, width):
    ours = Linear(shape[-1], width).bfloat16()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    spread = torch.zeros(*shape, 2, dtype=x.dtype)[..., 0].copy_(x)
    with torch.no_grad():
        for given in (x, spread) if x.dim() > 1 else (x,):
            assert torch.equal(ours(given), nn.functional.linear(x, ours.weight, ours.bias))


@pytest.mark.parametrize("rows, calls", [(ENOUGH_ROWS, 1), (ENOUGH_ROWS - 1, 0)])
def test_few_rows_take_the_ordinary_way(monkeypatch, rows, calls):
    counted = []
    ours = linear_module.transpose_with_sums
    monkeypatch.setattr(linear_module, "transpose_with_sums", lambda dy: counted.append(1) or ours(dy))
    gradients(Linear(8, 8).bfloat16(), torch.randn(rows, 8).bfloat16(), autocast=False)
    assert len(counted) == calls


def test_a_frozen_weight_gets_no_gradient_and_input_none_where_none_is_wanted():
    layer = Linear(16, 16).bfloat16()
    layer.weight.requires_grad_(False)
    *_, dx, dw, db = gradients(layer, torch.randn(512, 16).bfloat16(), autocast=False)
    assert dw is None and dx is not None and db is not None
    layer.weight.requires_grad_(True)
    layer(torch.randn(512, 16).bfloat16()).sum().backward()
    assert layer.weight.grad is not None


def test_transforms_and_compilation_take_the_ordinary_way():
    layer = Linear(16, 16).bfloat16()
    x = torch.randn(512, 16).bfloat16()
    values = dict(layer.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(layer, p, x).float().square().mean())(values)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    compiled(x).float().square().mean().backward()
    for name, value in compiled.named_parameters():
        torch.testing.assert_close(found[name.removeprefix("_orig_mod.")], value.grad, rtol=2e-2, atol=1e-4)
