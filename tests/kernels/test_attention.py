"""The attention operator against its formula in fp64: shapes, strides, dtypes, extreme scores, threads.

test_ops.py holds it to what every operator is held to. B batch, N tokens, H heads, d head_dim.
"""

import pytest
import torch
import torch.nn.functional as F
from sfd_kernels import attention, reference_only
from sfd_kernels.ops.attention import attention_backward
from sfd_kernels.registry import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="has no Triton kernel")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 16, 3, 64), (1, 256, 2, 64), (1, 256, 2, 72), (3, 1, 2, 8), (2, 31, 1, 16), (1, 33, 3, 72), (1, 65, 2, 40),
    (2, 255, 1, 80), (1, 257, 2, 64), (1, 300, 1, 128), (1, 520, 2, 72), (1, 1030, 1, 64), (1, 70, 1, 256),
    (2, 24, 2, 200), (1, 37, 2, 12), (1, 50, 1, 9), (1, 40, 1, 1),
]  # fmt: skip


def heads(shape, dtype, seed=0, scale=1.0):
    """q, k, v and the gradient of out, reproducible; v as it lies in packed qkv."""
    batch, tokens, number, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, dout = (torch.randn(shape, generator=generator).mul(scale).to(dtype) for _ in range(3))
    packed = torch.randn(batch, tokens, 3, number, head_dim, generator=generator).to(dtype)
    return q, k, packed[:, :, 2], dout


def formula(q, k, v):
    """(out, lse) as the formula says, in fp64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (torch.softmax(scores, -1) @ v).transpose(1, 2), torch.logsumexp(scores, -1)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def differentiated(function, q, k, v, dout):
    """[out, dq, dk, dv] of function(q, k, v)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def exact_of(q, k, v, dout):
    return differentiated(lambda *x: formula(*x)[0], *(x.double() for x in (q, k, v, dout)))


def largest_error(found, exact):
    return (found.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_at_most_twice_as_wrong_as_sdpas(shape, dtype):
    args = heads(shape, dtype)
    exact = exact_of(*args)
    ours, theirs = differentiated(lambda *x: attention(*x)[0], *args), differentiated(sdpa, *args)
    for name, got, their, right in zip(("out", "dq", "dk", "dv"), ours, theirs, exact):
        assert got.dtype == dtype and got.shape == right.shape
        # SDPA may be nearly exact where tensors are tiny: half a unit in the last place, or some roundings of fp32
        rounding = max(torch.finfo(dtype).eps / 2, 10 * torch.finfo(torch.float32).eps)
        allowed = 2 * largest_error(their, right) + rounding * right.abs().max().item()
        assert largest_error(got, right) <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 256, 2, 64), (2, 37, 2, 72), (1, 600, 1, 16)], ids=str)
def test_log_sum_exp_and_its_gradient_follow_the_formula(shape, dtype):
    q, k, v, dout = heads(shape, dtype)
    dlse = torch.randn(shape[0], shape[2], shape[1], generator=torch.Generator().manual_seed(1))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves)
    assert lse.dtype == torch.float32
    exact_leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = formula(*exact_leaves)
    torch.testing.assert_close(lse.double(), exact[1], rtol=2e-6, atol=2e-6)
    found = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    right = torch.autograd.grad(exact, exact_leaves, [dout.double(), dlse.double()])
    for got, expected in zip(found, right):
        assert largest_error(got, expected) <= 16 * torch.finfo(dtype).eps * expected.abs().max()


def test_gradient_of_the_log_sum_exp_alone():
    q, k, v, _ = heads((1, 20, 2, 16), torch.float32)
    leaves, exact_leaves = ([x.detach().to(kind).requires_grad_() for x in (q, k)] for kind in (None, torch.float64))
    found = torch.autograd.grad(attention(*leaves, v)[1].sum(), leaves)
    expected = torch.autograd.grad(formula(*exact_leaves, v)[1].sum(), exact_leaves)
    for got, right in zip(found, expected):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)


def by_head(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def with_gaps(x):
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def unaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [by_head, with_gaps, unaligned])
def test_any_strides_give_the_same_bits(layout, dtype):
    q, k, v, dout = heads((2, 45, 3, 72), dtype)
    out, lse = attention(q, k, v)
    expected = [out, lse, *attention_backward(dout, q, k, v, out, lse, None)]
    spread = [layout(x) for x in (q, k, v)]
    found = attention(*spread)
    again = attention_backward(layout(dout), *spread, layout(out), lse, None)
    for got, right in zip([*found, *again], expected):
        assert torch.equal(got, right) and got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 600, 2, 64), (2, 100, 5, 72)], ids=str)
def test_results_are_the_same_bits_on_any_number_of_threads(shape, dtype):
    args, before, results = heads(shape, dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(differentiated(lambda *x: attention(*x)[0], *args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_samples_result_does_not_depend_on_its_company(dtype):
    q, k, v, dout = heads((4, 70, 2, 64), dtype)
    together = differentiated(lambda *x: attention(*x)[0], q, k, v, dout)
    alone = differentiated(lambda *x: attention(*x)[0], *(x[2:3] for x in (q, k, v, dout)))
    assert all(torch.equal(a[2:3], b) for a, b in zip(together, alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [40, 300])
def test_huge_scores_neither_overflow_nor_lose_the_largest(tokens, dtype):
    """Scores of thousands: nearly all weight lies on one key, and exp of a score would overflow."""
    q, k, v, dout = heads((1, tokens, 2, 64), dtype, scale=30.0)
    dout = dout / 30
    out, dq, dk, dv = differentiated(lambda *x: attention(*x)[0], q, k, v, dout)
    exact = exact_of(q, k, v, dout)
    assert (q.double().abs().max() * k.double().abs().max()) > 1000
    # scores of 5000 carry 2e-3 of rounding in fp32, as much as bf16 has in its results
    torch.testing.assert_close(out.double(), exact[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dv.double(), exact[3], rtol=2e-2, atol=4e-2)
    assert dq.isfinite().all() and dk.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_below_zero_keep_their_softmax(dtype):
    """All keys alike and opposite to the queries: a padded key of score 0 would take all the weight."""
    q = torch.full((1, 37, 1, 64), 40.0, dtype=dtype)
    _, _, v, dout = heads((1, 37, 1, 64), dtype)
    out, dq, dk, dv = differentiated(lambda *x: attention(*x)[0], q, -q, v, dout)
    mean = v.double().mean(1, keepdim=True).expand_as(v)
    torch.testing.assert_close(out.double(), mean, rtol=1e-2, atol=1e-3 if dtype == torch.bfloat16 else 1e-4)
    torch.testing.assert_close(attention(q, -q, v)[1], torch.full((1, 1, 37), -12800 + 3.6109179, dtype=torch.float32))
    torch.testing.assert_close(dv.double(), dout.double().mean(1, keepdim=True).expand_as(v), rtol=1e-2, atol=5e-3)
    assert dq.isfinite().all() and dk.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_scores_give_the_mean_of_the_values(dtype):
    q, k, v, dout = heads((2, 50, 2, 64), dtype, scale=1e-3)
    out = attention(q, k, v)[0]
    torch.testing.assert_close(
        out.double(), v.double().mean(1, keepdim=True).expand_as(v), rtol=1e-2, atol=2e-3
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_spreads_to_what_it_enters_and_no_further(name, dtype):
    args = dict(zip("qkv", heads((2, 40, 2, 24), dtype)))
    args[name] = args[name].clone()
    args[name][1, 7, 0, 3] = torch.nan
    out = attention(**args)[0]
    expected = torch.zeros(2, 40, 2, 24, dtype=torch.bool)
    rows = 7 if name == "q" else slice(None)
    columns = 3 if name == "v" else slice(None)
    expected[1, rows, 0, columns] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_the_gradient_spreads_to_what_it_enters_and_no_further(dtype):
    q, k, v, dout = heads((2, 40, 2, 24), dtype)
    dout[1, 7, 0, 3] = torch.nan
    out, lse = attention(q, k, v)
    dq, dk, dv = attention_backward(dout, q, k, v, out, lse, None)
    found = [x.isnan() for x in (dq, dk, dv)]
    expected = [torch.zeros(2, 40, 2, 24, dtype=torch.bool) for _ in range(3)]
    expected[0][1, 7, 0], expected[1][1, :, 0], expected[2][1, :, 0, 3] = True, True, True
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("shape", [(0, 16, 2, 8), (2, 0, 2, 8), (2, 16, 0, 8)], ids=str)
def test_empty_inputs_give_empty_results(shape):
    q, k, v, dout = heads(shape, torch.bfloat16)
    out, lse = attention(q, k, v)
    assert out.shape == shape and lse.shape == (shape[0], shape[2], shape[1])
    assert all(grad.shape == shape for grad in attention_backward(dout, q, k, v, out, lse, None))


def test_more_keys_than_queries_are_the_references_case():
    q = torch.randn(1, 5, 2, 8)
    k, v = torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    expected = formula(q, k, v)
    for got, right in zip(attention(q, k, v), expected):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)


def test_heads_wider_than_the_kernels_are_the_references_case():
    q, k, v, _ = heads((1, 9, 1, 264), torch.float32)
    with reference_only():
        expected = attention(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(attention(q, k, v), expected))
