"""What `sfd features` and `sfd encode` have in common: which images, and how they become shards."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config import Precision, Settings, require
from sfd_fast.config.checks import Count, FilePath, Natural


@dataclass(frozen=True, kw_only=True)
class CacheOptions(Settings):
    """Options of a command that makes a cache from images."""

    images: FilePath = ""
    """class-per-folder tree, folder of *.tar shards (WebDataset), or Hugging Face dataset (folder, or hf://ORG/NAME)"""
    out: FilePath
    vfm: FilePath = "dinov2-b"
    """directory saved by transformers, hub id, or dinov2-s/b/l/g, mae-b/l, clip-b/l, siglip-b"""
    image_size: Count = 256
    crop: Literal["adm", "resize"] = "adm"
    """adm: the released crop, pixel for pixel; resize: shorter side to image_size * 256 / 224, then the centre"""
    flip: bool = True
    """also store the mirrored images"""
    storage: Literal["bf16", "fp16", "fp32"]
    shard_size: Count = 1024
    """images per shard: what a killed run may have to repeat"""
    batch_size: Count = 32
    """images encoded at once; results differ between sizes in the last bits of fp32"""
    decoder: Literal["pil", "dali"] = "pil"
    """pil: exact; dali: decodes on `device` within a small difference (sfd_fast.data.images.dali); worth it on a GPU:
    on a CPU it is no faster than PIL (benchmarks/data.py)"""
    on_bad: Literal["skip", "fail"] = "skip"
    """unreadable images"""
    verify: bool = False
    """compare the checksums of shards that are there already: those that differ are encoded again"""
    num_threads: Natural = 0
    """decoding threads of a rank; 0: one per processor"""
    device: str = "auto"
    """auto: the rank's GPU, or else the CPU; cuda: the rank's GPU"""
    precision: Precision = "fp32"

    def require_given(self, *names: str) -> None:
        """Raises ValueError for an option that has no default and is not given."""
        for name in names:
            require(bool(getattr(self, name)), f"{name} is empty: this command needs --{' --'.join(names)}")
