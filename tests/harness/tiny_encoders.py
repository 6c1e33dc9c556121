"""Tiny randomly initialised encoders, saved to directories by transformers and diffusers themselves."""

from pathlib import Path

import torch


def save_dinov2(folder: Path, *, width: int = 24, seed: int = 0) -> Path:
    """DINOv2 with registers: patch 14, 4 registers, `width` features."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    return save(Dinov2WithRegistersModel, config, folder, seed)


def save(kind, config, folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            # libraries start biases, class tokens and position tables at zero, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() < 2 else 0.1)
    model.save_pretrained(folder)
    return folder


def save_autoencoder(folder: Path, *, latent_channels: int = 4, seed: int = 0) -> Path:
    """AutoencoderKL of the LDM family: 32 channels, three levels, so a latent pixel is 4 x 4 pixels."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            latent_channels=latent_channels,
        )
    model.save_pretrained(folder)
    return folder
