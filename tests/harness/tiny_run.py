"""A tiny training run on random latents; as a program (`python tiny_run.py DATA OUT [key=value...]`) to be killed."""

import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sfd_fast.config import (
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    SFDConfig,
    TrainConfig,
)
from sfd_fast.data.cache.shards import write_shard
from sfd_fast.diffusion.statistics import LatentStatistics

MODEL = ModelConfig(
    hidden_size=32, depth=2, num_heads=2, patch_size=2, grid_size=4, texture_channels=2, semantic_channels=2,
    num_classes=5, repa_channels=8, repa_depth=1, repa_hidden=16,
)  # fmt: skip


def write_data(folder: Path, num_samples: int = 40, seed: int = 0) -> Path:
    """Random latents with features and statistics, in two shards."""
    generator = torch.Generator().manual_seed(seed)
    side = MODEL.grid_size // MODEL.patch_size
    folder.mkdir(parents=True, exist_ok=True)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for part in range(2):
        count = num_samples // 2
        latents = normal(count, 2, 4, 4)
        semantic = normal(count, 2, 4, 4)
        features = normal(count, 8, side, side)
        tensors = {
            "latents": latents, "latents_flip": latents.flip(3), "latents_sv": semantic,
            "latents_sv_flip": semantic.flip(3), "labels": torch.arange(count) % 5, "feats_dino": features.half(),
            "feats_dino_flip": features.flip(3).half(),
        }  # fmt: skip
        write_shard(folder / f"part{part}.safetensors", {k: v.contiguous() for k, v in tensors.items()})
    LatentStatistics.identity(2, 2).save(folder)
    return folder


def run_and_train(**settings: object) -> dict:
    """Settings of both groups by their bare names, divided: {"run": RunConfig, "train": TrainConfig}."""
    run = {field.name for field in fields(RunConfig)}
    return {
        "run": RunConfig(**{key: value for key, value in settings.items() if key in run}),
        "train": TrainConfig(**{key: value for key, value in settings.items() if key not in run}),
    }


def tiny_config(data: Path | str, out: Path | str, **train: object) -> SFDConfig:
    """A run of a second or two."""
    settings = {
        "max_steps": 8, "global_batch_size": 8, "precision": "fp32", "log_every": 4, "validate_every": 0,
        "sample_every": 0, "checkpoint_every": 4, "tensorboard": False,
    } | train  # fmt: skip
    return SFDConfig(
        model=MODEL,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=3, ema_decay=0.9, max_grad_norm=1.0, schedule="cosine"),
        data=DataConfig(path=str(data), validation_samples=8),
        **run_and_train(out=str(out), **settings),
        sampler=SamplerConfig(num_inference_steps=6, solver="euler"),
    )


def pixels(texture: torch.Tensor) -> torch.Tensor:
    """Two texture channels of 4 x 4 as one grey picture of 8 x 8, in [-1, 1]: a codec for what evaluates images."""
    return F.pixel_shuffle(torch.cat([texture, -texture], dim=1), 2).tanh()


def write_reference(path: Path) -> str:
    """Random grey pictures of 8 x 8 to compare with."""
    grey = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=grey.repeat(3, 3))
    return str(path)


def checkpoint_tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a run's checkpoint, "NAME|FIELD" -> flat; of several ranks all, under FILE:NAME|FIELD."""
    paths = sorted((Path(out) / "checkpoints" / f"{step:08d}").glob("state-*.safetensors"))
    if len(paths) == 1:
        return load_file(paths[0])
    return {f"{path.name}:{key}": value for path in paths for key, value in load_file(path).items()}


def with_data(config: SFDConfig, **changes: object) -> SFDConfig:
    return replace(config, data=replace(config.data, **changes))


def main() -> None:
    import yaml

    from sfd_fast.training.diffusion import run_train

    data, out, *settings = sys.argv[1:]
    train = {key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in settings)}
    device, stage = train.pop("device", "cpu"), train.pop("zero_stage", 1)
    torch.set_num_threads(1)
    config = replace(tiny_config(data, out, **train), deepspeed=DeepSpeedConfig(zero_stage=stage))
    result = run_train(config, device=device, progress=False)
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
