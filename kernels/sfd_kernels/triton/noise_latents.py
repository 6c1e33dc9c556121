"""noise_latents: elementwise, one program for a block of one sample. B batch, C channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.noise_latents import noise_latents
from sfd_kernels.triton.launch import ceil_div, launch, supported

# 1024 elements on 4 warps: 8 adjacent ones a thread, two 128-bit accesses in fp32. 48 x 16 x 16 latents are 12 blocks:
# 384 programs at batch 32, all resident at once; the kernel lasts as long as its launch.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _forward(x1, x0, t_tex, t_sem, x_t, per_sample, border, blocks, BLOCK: tl.constexpr):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < per_sample
    # Channels are the outer dimension of a sample: texture is everything before the border.
    t = tl.where(offsets < border, tl.load(t_tex + sample).to(tl.float32), tl.load(t_sem + sample).to(tl.float32))
    data = tl.load(x1 + sample * per_sample + offsets, mask=inside, other=0.0).to(tl.float32)
    noise = tl.load(x0 + sample * per_sample + offsets, mask=inside, other=0.0).to(tl.float32)
    result = (1.0 - t) * noise + t * data
    tl.store(x_t + sample * per_sample + offsets, result.to(x_t.dtype.element_ty), mask=inside)


@noise_latents.triton
def forward(x1: Tensor, x0: Tensor, t_tex: Tensor, t_sem: Tensor, num_texture_channels: int) -> Tensor:
    if not supported(x1, x0, t_tex, t_sem) or x1.dim() != 4:
        return NotImplemented
    x1, x0, t_tex, t_sem = x1.contiguous(), x0.contiguous(), t_tex.contiguous(), t_sem.contiguous()
    x_t = torch.empty_like(x1)
    if x_t.numel() == 0:
        return x_t
    batch, channels, height, width = x1.shape
    per_sample = channels * height * width
    blocks = ceil_div(per_sample, BLOCK)
    launch(
        _forward, batch * blocks, x1, x0, t_tex, t_sem, x_t, per_sample, num_texture_channels * height * width, blocks,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return x_t
