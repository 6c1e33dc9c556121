"""Squared error and cosine between predicted and target features. B batch, N tokens, F features."""

from typing import Any

from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype, inverse_norm
from sfd_kernels.registry import Op, elements


def feature_alignment_loss(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample:  mse = mean_{n,f} (pred - target)^2,  cosine = mean_n (1 - cos(pred, target)) along features.

    pred and target (B, N, F), of any two floating dtypes. A zero vector has cosine 0 and no gradient. Returns two (B,),
    float32 (float64 if an input is). Only pred gets a gradient: ValueError if target requires one.
    Source: REPA (arXiv 2410.06940) and the SemVAE reconstruction (docs/METHOD.md 2 and 4).
    """
    dtype = accumulation_dtype(pred, target)
    p, t = pred.to(dtype), target.to(dtype)
    cosine = (p * t).sum(2, keepdim=True) * inverse_norm(p, 2) * inverse_norm(t, 2)
    return (p - t).square().mean((1, 2)), (1 - cosine).mean((1, 2))


def feature_alignment_loss_backward(d_mse: Tensor, d_cos: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    """dpred = d_mse 2 (pred - target) / (N F) - d_cos (t / (|p| |t|) - cos p / |p|^2) / N."""
    dtype = accumulation_dtype(pred, target)
    p, t = pred.to(dtype), target.to(dtype)
    num_tokens, num_features = pred.shape[1:]
    inverse_p, inverse_t = inverse_norm(p, 2), inverse_norm(t, 2)
    cosine = (p * t).sum(2, keepdim=True) * inverse_p * inverse_t
    direction = t * (inverse_p * inverse_t) - p * (cosine * inverse_p.square())
    mse_part = (2 * d_mse.to(dtype) / (num_tokens * num_features))[:, None, None] * (p - t)
    return (mse_part - (d_cos.to(dtype) / num_tokens)[:, None, None] * direction).to(pred.dtype)


def _examples(make, size):
    shape = size.batch, size.tokens, size.features
    yield "features", (make.narrow(*shape), make.wide(*shape))
    if size.is_tiny:
        yield "zero prediction", (0 * make.narrow(*shape), make.wide(*shape))


def _backward_examples(make, size):
    for label, args in _examples(make, size):
        yield label, (make.state(size.batch), make.state(size.batch), *args)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    if ctx.needs_input_grad[1]:
        raise ValueError("feature_alignment_loss has no gradient for target, but it requires grad; detach it")
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, d_mse: Tensor, d_cos: Tensor) -> tuple:
    return feature_alignment_loss_backward(d_mse, d_cos, *ctx.saved_tensors), None


feature_alignment_loss_backward = Op(
    feature_alignment_loss_backward, examples=_backward_examples, flops=elements(2, 14)
)
feature_alignment_loss = Op(
    feature_alignment_loss,
    examples=_examples,
    flops=elements(0, 9),
    constants=("target",),
    backward=feature_alignment_loss_backward,
)
feature_alignment_loss.register_autograd(_gradient, setup_context=_setup)
