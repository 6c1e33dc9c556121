"""A tiny pipeline with random weights, for tests and benchmarks."""

from dataclasses import replace

import numpy as np
import torch

from sfd_fast.config import GuidanceConfig, ModelConfig, SamplerConfig
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.texture import IdentityCodec
from sfd_fast.sampling.pipeline import SFDPipeline

TINY = ModelConfig(
    hidden_size=32, depth=2, num_heads=2, grid_size=4, texture_channels=4, semantic_channels=2, num_classes=10,
    repa_channels=8, repa_depth=1, repa_hidden=8,
)  # fmt: skip
STATISTICS = LatentStatistics(
    torch.tensor([0.1, 0.0, -0.1, 0.2]), torch.tensor([0.6, 0.5, 0.4, 0.5]), torch.zeros(2), torch.ones(2)
)


def random_model(config, seed):
    """A network whose zero-initialised layers hold something, so that every path matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LightningDiT(config)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def drawn(pipeline, *arguments, **options):
    """The pictures of a call as one (N, H, W, 3) uint8 array."""
    return np.stack([np.asarray(image) for image in pipeline(*arguments, **options).images])


def build(**options):
    defaults = {
        "statistics": STATISTICS,
        "texture_codec": IdentityCodec(4, 2),
        "delta_t": 0.3,
        "guide": random_model(replace(TINY, depth=1), 1),
        "sampler": SamplerConfig(solver="heun", num_inference_steps=4),
        "guidance": GuidanceConfig(mode="autoguidance", scale=1.5),
        "micro_batch_size": 4,
        "device": "cpu",
    }
    return SFDPipeline(random_model(TINY, 0), **defaults | options)
