"""Images from their encoded bytes: decoded as PIL-based trainers do, cropped as the released preprocessing, exactly.

Letters: B images of a batch, S edge of the square crop.
"""

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from sfd_fast.files.ahead import ahead

THIN = 32
"""an image whose edges differ by more than this factor is cropped before it is enlarged"""
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")


Colour = tuple[int, int, int]
DAMAGE = (SyntaxError, EOFError, IndexError, TypeError, struct.error, Image.DecompressionBombError)
"""what PIL raises for some damaged files"""
ROTATED, TRANSPARENT, DEEP = "rotated by EXIF", "transparent", "of 16 bits"
"""traits of images that decoders show differently"""


def colour(name: str) -> Colour:
    """Red, green and blue of a colour's name or #rrggbb. Raises ValueError naming an unknown one."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise ValueError(f"background '{name}' is no colour: give a name (white, black) or #rrggbb") from None


def decode(data: bytes, background: Colour | None = None) -> Image.Image:
    """The RGB image of a file's bytes, the first frame of an animation.

    background: as people see the image: turned as EXIF says, transparency on that colour, 16 bits scaled to 8. None:
    `Image.open(file).convert("RGB")`, what the released trainers do: EXIF ignored, transparency dropped, values of 16
    bits above 255 saturated. CMYK, palette and grey images become RGB by PIL's conversion in both.
    Raises OSError or ValueError where the bytes are damaged or truncated.
    """
    return decode_with_traits(data, background)[0]


def decode_with_traits(data: bytes, background: Colour | None = None) -> tuple[Image.Image, set[str]]:
    """The image, and which of the traits above it was shown by; none where background is None."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return (image.convert("RGB"), set()) if background is None else shown(image, background)
    except UnidentifiedImageError:
        # PIL's message holds an address in memory, and reports of damage should not differ from run to run
        raise OSError("it is no image that PIL can identify") from None
    except DAMAGE as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def shown(image: Image.Image, background: Colour) -> tuple[Image.Image, set[str]]:
    """An open image as people see it, and its traits."""
    traits = set()
    if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        traits.add(ROTATED)
    if image.mode == "F":
        raise ValueError("its values are floating point, whose range nothing tells: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # PIL's 16-bit grey
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"its values reach from {values.min()} to {values.max()}: convert it to 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        traits.add(DEEP)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            traits.add(TRANSPARENT)
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB"), traits


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
    """The size x size crop of an image by the rule called `crop`; adm equals the released one pixel for pixel.

    Of an image more than THIN times as long as wide only the part that is shown is enlarged.
    """
    geometry = GEOMETRIES[crop](*image.size, size)
    for halved in geometry.halvings:
        image = image.resize(halved, resample=Image.Resampling.BOX)
    if is_thin(geometry.resized):
        across, down = (edge / resized for edge, resized in zip(image.size, geometry.resized))
        left, top = geometry.left * across, geometry.top * down
        box = (left, top, min(left + size * across, image.width), min(top + size * down, image.height))
        return image.resize((size, size), resample=Image.Resampling.BICUBIC, box=box)
    image = image.resize(geometry.resized, resample=Image.Resampling.BICUBIC)
    return image.crop((geometry.left, geometry.top, geometry.left + size, geometry.top + size))


def is_thin(size: tuple[int, int]) -> bool:
    """Whether an image of that size is so long that enlarging all of it would be a waste of memory."""
    return max(size) > THIN * min(size)


def to_tensor(image: Image.Image) -> Tensor:
    """(S, S, 3) uint8."""
    return torch.from_numpy(np.array(image))


def load(data: bytes, size: int, crop: str = "adm", background: Colour | None = None) -> Tensor:
    """Decoded and cropped, (size, size, 3) uint8; background as in decode."""
    return to_tensor(square(decode(data, background), size, crop))


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
    background: Colour | None = None,
    num_threads: int = 2,
    num_ahead: int = 2,
) -> Iterator[Tensor]:
    """Decoded batches (B, S, S, 3) uint8 in the order given, decoded by threads up to `num_ahead` batches early.

    read: from an image's number to its bytes. PIL decodes and resizes without the interpreter lock, so threads do.
    An image that cannot be decoded raises the error of `read` or `decode`.
    """
    depth = num_ahead * max(map(len, batches), default=0)
    numbers = (number for batch in batches for number in batch)

    def work(number: int) -> Tensor:
        return load(read(number), size, crop, background)

    with closing(ahead(work, numbers, num_threads=max(num_threads, 1), depth=depth)) as images:
        for batch in batches:
            yield torch.stack(list(islice(images, len(batch))))
