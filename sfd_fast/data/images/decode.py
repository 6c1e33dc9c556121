"""Images from their encoded bytes: decoded as PIL-based trainers do, cropped as the released preprocessing, exactly.

Letters: B images of a batch, S edge of the square crop.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sfd_fast.files.ahead import ahead

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")


def decode(data: bytes) -> Image.Image:
    """The RGB image of a file's bytes: `Image.open(file).convert("RGB")`, which is what the released trainers do.

    That is: CMYK, palette, grey and 16-bit images through PIL's conversion (16-bit values above 255 saturate), the
    first frame of an animation, transparency dropped, EXIF orientation ignored. Raises OSError or ValueError where the
    bytes are damaged or truncated.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        # PIL's message holds an address in memory, and reports of damage should not differ from run to run
        raise OSError("it is no image that PIL can identify") from None
    except (SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        # PIL raises these for some damaged files
        raise OSError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Geometry:
    """How an image becomes a square crop. Sizes are (width, height)."""

    halvings: tuple[tuple[int, int], ...]
    """BOX filter, one after the other"""
    resized: tuple[int, int]
    """BICUBIC"""
    left: int
    top: int


def adm_geometry(width: int, height: int, size: int) -> Geometry:
    """BOX halving while the shorter side is at least 2 size, BICUBIC until it is size, centred crop.

    Source: guided-diffusion (ADM, arXiv 2105.05233) `center_crop_arr`, which DiT, REPA and the released code share.
    """
    halvings = []
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        halvings.append((width, height))
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    return Geometry(tuple(halvings), (width, height), (width - size) // 2, (height - size) // 2)


def resize_geometry(width: int, height: int, size: int) -> Geometry:
    """The shorter side to size * 256 / 224 by BICUBIC, then the centred crop: the released SemVAE's training features.

    The longer side is truncated and the corner rounded, as torchvision's Resize and CenterCrop do (docs/METHOD.md 2).
    """
    shorter = round(size * 256 / 224)
    if width < height:
        width, height = shorter, int(shorter * height / width)
    else:
        width, height = int(shorter * width / height), shorter
    return Geometry((), (width, height), round((width - size) / 2), round((height - size) / 2))


GEOMETRIES: dict[str, Callable[[int, int, int], Geometry]] = {"adm": adm_geometry, "resize": resize_geometry}


def square(image: Image.Image, size: int, crop: str = "adm") -> Image.Image:
    """The size x size crop of an image by the rule called `crop`; adm equals the released one pixel for pixel."""
    geometry = GEOMETRIES[crop](*image.size, size)
    for halved in geometry.halvings:
        image = image.resize(halved, resample=Image.Resampling.BOX)
    image = image.resize(geometry.resized, resample=Image.Resampling.BICUBIC)
    return image.crop((geometry.left, geometry.top, geometry.left + size, geometry.top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """(S, S, 3) uint8."""
    return torch.from_numpy(np.array(image))


def load(data: bytes, size: int, crop: str = "adm") -> Tensor:
    """Decoded and cropped, (size, size, 3) uint8."""
    return to_tensor(square(decode(data), size, crop))


def flip_images(images: Tensor) -> Tensor:
    """Mirrored left to right. images: (B, S, S, 3)."""
    return images.flip(2)


def to_codec(images: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) in [-1, 1]: x / 127.5 - 1, the codec's input."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def read_batches(
    read: Callable[[int], bytes],
    batches: Sequence[Sequence[int]],
    size: int,
    *,
    crop: str = "adm",
    num_threads: int = 2,
    num_ahead: int = 2,
) -> Iterator[Tensor]:
    """Decoded batches (B, S, S, 3) uint8 in the order given, decoded by threads up to `num_ahead` batches early.

    read: from an image's number to its bytes. PIL decodes and resizes without the interpreter lock, so threads do.
    An image that cannot be decoded raises the error of `read` or `decode`.
    """
    depth = num_ahead * max(map(len, batches), default=0)
    numbers = (number for batch in batches for number in batch)
    work = ahead(lambda i: load(read(i), size, crop), numbers, num_threads=max(num_threads, 1), depth=depth)
    with closing(work) as images:
        for batch in batches:
            yield torch.stack(list(islice(images, len(batch))))
