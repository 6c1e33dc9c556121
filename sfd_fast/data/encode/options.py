"""What `sfd features` and `sfd encode` have in common: which images, and how they become shards."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config import Precision, Settings, require
from sfd_fast.config.checks import Count, FilePath, Natural

RELEASED = "released"
"""the background of images that are read as the released trainers read them"""


@dataclass(frozen=True, kw_only=True)
class CacheOptions(Settings):
    """Options of a command that makes a cache from images."""

    images: FilePath = ""
    """class-per-folder tree, folder of images of one class, folder of *.tar shards (WebDataset), or Hugging Face
    dataset (folder, or hf://ORG/NAME)"""
    out: FilePath
    vfm: FilePath = "dinov2-b"
    """directory saved by transformers, hub id, or dinov2-s/b/l/g, mae-b/l, clip-b/l, siglip-b; without a network give a
    directory"""
    image_size: Count = 256
    crop: Literal["adm", "resize"] = "adm"
    """adm: the released crop, pixel for pixel; resize: shorter side to image_size * 256 / 224, then the centre"""
    background: str = "white"
    """colour behind transparent pixels (a name, or #rrggbb); images are turned as EXIF says and 16 bits scaled to 8.
    released: transparency dropped, EXIF ignored, 16 bits cut, which is how the released data was read (the preset)"""
    flip: bool = False
    """also store the mirrored images. Off, because a mirrored image of many things is none of them: text, shoes that
    face one way, faces of one side; half of what is generated would be mirrored. --preset imagenet256 switches it on
    where the released data has both"""
    storage: Literal["bf16", "fp16", "fp32"]
    shard_size: Natural = 0
    """images per shard: what a killed run may have to repeat. 0: as the cache began; of a new one 1024 on a GPU, 64 on
    a CPU, a minute's work or less"""
    batch_size: Count = 32
    """images encoded at once; results differ between sizes in the last bits of fp32"""
    decoder: Literal["pil", "dali"] = "pil"
    """pil: exact; dali: decodes on `device` within a small difference (sfd_fast.data.images.dali); worth it on a GPU:
    on a CPU it is no faster than PIL (benchmarks/data.py)"""
    on_bad: Literal["skip", "fail"] = "skip"
    """unreadable images"""
    update: bool = False
    """images were added, changed or deleted since: encode what differs, to the cache that a new folder would get"""
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
            require(bool(getattr(self, name)), f"{name} is empty: this command needs --{', --'.join(names)}")
