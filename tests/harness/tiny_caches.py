"""Configurations that encode the small tree of cache_fixtures.py, and what they wrote."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from sfd_fast.commands.encode import EncodeConfig
from sfd_fast.commands.features import FeaturesConfig

SIZE, GRID = 32, 8


def encode_config(parts, out, **more):
    settings = {"image_size": SIZE, "flip": True, "shard_size": 2, "batch_size": 4, "storage": "fp32", "num_threads": 1}
    return EncodeConfig(out=str(out), device="cpu", **(parts | settings | more))


def features_config(parts, out, **more):
    settings = {"image_size": SIZE, "grid_size": GRID, "flip": True, "shard_size": 2, "batch_size": 4, "num_threads": 1}
    return FeaturesConfig(images=parts["images"], vfm=parts["vfm"], out=str(out), device="cpu", **(settings | more))


def contents(folder):
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def stored(folder):
    """All shards of a folder, concatenated."""
    shards = [load_file(path) for path in sorted(Path(folder).glob("shard-*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
