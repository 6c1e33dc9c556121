"""The network and sampling loop as the released system runs them: eager PyTorch, operation by operation.

In the dtype of its weights, fp32 as released; state and clocks are fp32. A baseline to time against, written from
docs/METHOD.md 3 to 5 with the weights of our own LightningDiT; not for use.
Letters: B batch, N tokens, D width, H heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from sfd_fast.config import ModelConfig
from sfd_fast.models.dit import LightningDiT

FREQUENCIES = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)


def random_network(config: ModelConfig, device: str = "cpu") -> LightningDiT:
    """A network in which every layer acts: none is zero, as fresh ones are."""
    with torch.device(device):
        model = LightningDiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # zero-initialised layers: denormal or zero products would flatter no one
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * weight


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), -1).flatten(-2) * sin


def attention(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    packed = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, width // layer.num_heads)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    q = rotate(rms_norm(q, layer.q_norm.weight), cos, sin)
    k = rotate(rms_norm(k, layer.k_norm.weight), cos, sin)
    q, k = q.type_as(v), k.type_as(v)  # the rotation is in fp32
    return layer.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    gate, up = layer.w12(x).chunk(2, dim=-1)
    return layer.w3(silu(gate) * up)


def time_embedding(embedder: nn.Module, t: Tensor) -> Tensor:
    angles = t[:, None].float() * FREQUENCIES.to(t.device)
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return embedder.mlp(features.to(embedder.mlp[0].weight.dtype))


def network(model: LightningDiT, x: Tensor, t_tex: Tensor, t_sem: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and REPA features, which the released sampler computes too; two clocks, shifts, patch 1."""
    x = model.x_embedder.proj(x.to(model.pos_embed.dtype)).flatten(2).transpose(1, 2) + model.pos_embed
    times = [time_embedding(model.t_embedder_sem, t_sem), time_embedding(model.t_embedder_tex, t_tex)]
    c = torch.cat(times, dim=-1) + model.y_embedder.embedding_table(labels)
    cos, sin = model.feat_rope.freqs_cos, model.feat_rope.freqs_sin
    for number, block in enumerate(model.blocks, 1):
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation[1](silu(c)).chunk(6, dim=1)
        h = modulate(rms_norm(x, block.norm1.weight), shift1, scale1)
        x = x + gate1.unsqueeze(1) * attention(block.attn, h, cos, sin)
        h = modulate(rms_norm(x, block.norm2.weight), shift2, scale2)
        x = x + gate2.unsqueeze(1) * mlp(block.mlp, h)
        if number == model.config.repa_depth:
            features = model.repa_projector(x)
    shift, scale = model.final_layer.adaLN_modulation[1](silu(c)).chunk(2, dim=1)
    x = model.final_layer.linear(modulate(rms_norm(x, model.final_layer.norm_final.weight), shift, scale))
    side = int(x.shape[1] ** 0.5)
    return torch.einsum("nhwc->nchw", x.unflatten(1, (side, side))), features


@torch.no_grad()
def guided_euler(
    model: LightningDiT,
    guide: LightningDiT,
    x: Tensor,
    labels: Tensor,
    *,
    grid: Tensor,
    delta_t: float,
    scale: float,
    network: Callable = network,
) -> Tensor:
    """Euler with AutoGuidance on the given times: both networks at every evaluation, masks as tensors."""
    texture = model.config.texture_channels
    for start, end in zip(grid[:-1], grid[1:]):
        t_tex = (start - delta_t).clamp(0, 1).expand(len(x))
        t_sem = start.clamp(0, 1).expand(len(x))
        velocity, _ = network(model, x, t_tex, t_sem, labels)
        weak, _ = network(guide, x, t_tex, t_sem, labels)
        velocity = weak + scale * (velocity - weak)
        if (start >= delta_t).item() and (start <= 1).item():  # the released drift reads its time back to the host
            drift = velocity
        else:
            moves = torch.zeros_like(velocity)
            moves[:, :texture] = (start >= delta_t).float()
            moves[:, texture:] = (start <= 1).float()
            drift = velocity * moves
        x = x + (end - start) * drift
    return x


@torch.no_grad()
def matrix_products(model: LightningDiT, batch: int) -> None:
    """Only the matrix products and attention of one evaluation's blocks: the time that no fusion can go below."""
    config = model.config
    kind = {"dtype": model.pos_embed.dtype}
    h = torch.zeros(batch, config.num_tokens, config.hidden_size, **kind)
    inner = torch.zeros(batch, config.num_tokens, config.mlp_hidden, **kind)
    q = torch.zeros(batch, config.num_heads, config.num_tokens, config.head_dim, **kind)
    for block in model.blocks:
        block.attn.qkv(h)
        scaled_dot_product_attention(q, q, q)
        block.attn.proj(h)
        block.mlp.w12(h)
        block.mlp.w3(inner)
