"""Images from their encoded bytes: decoded as PIL-based trainers do, cropped as the released preprocessing, exactly.

Letters: B images of a batch, S edge of the square crop.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
    except (SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        # PIL raises these for some damaged files
        raise OSError(f"{type(error).__name__}: {error}") from error


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The centred size x size crop: BOX halving while the shorter side is at least 2 size, BICUBIC to size, crop.

    Source: guided-diffusion (ADM, arXiv 2105.05233) `center_crop_arr`, which DiT, REPA and the released code share;
    equal to it pixel for pixel.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to size * 256 / 224 by BICUBIC, then the centred size x size crop.

    The preprocessing on which the released SemVAE was trained (256, then 224; METHOD 2).
    """
    shorter = round(size * 256 / 224)
    width, height = image.size
    # the longer side is truncated, as torchvision's Resize does
    target = (shorter, int(shorter * height / width)) if width < height else (int(shorter * width / height), shorter)
    image = image.resize(target, resample=Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {"adm": adm_crop, "resize": resize_crop}


def to_tensor(image: Image.Image) -> Tensor:
    """(S, S, 3) uint8."""
    return torch.from_numpy(np.array(image))


def load(data: bytes, size: int, crop: str = "adm") -> Tensor:
    """Decoded and cropped, (size, size, 3) uint8."""
    return to_tensor(CROPS[crop](decode(data), size))


def flip_images(images: Tensor) -> Tensor:
    """Mirrored left to right. images: (B, S, S, 3)."""
    return images.flip(2)


def to_codec(images: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) in [-1, 1]: x / 127.5 - 1, the codec's input."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_pixels(images: Tensor) -> Tensor:
    """float (B, 3, S, S) in [-1, 1] to uint8 (B, S, S, 3): clamp(127.5 x + 128, 0, 255), truncated (METHOD 2)."""
    return images.float().mul(127.5).add(128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def read_batches(
    read: Callable[[int], bytes],
    batches: Iterable[Sequence[int]],
    size: int,
    *,
    crop: str = "adm",
    num_threads: int = 2,
    ahead: int = 2,
) -> Iterator[Tensor]:
    """Decoded batches (B, S, S, 3) uint8 in the order given, decoded by threads up to `ahead` batches early.

    read: from an image's number to its bytes. PIL decodes and resizes without the interpreter lock, so threads do.
    An image that cannot be decoded raises the error of `read` or `decode`.
    """
    with ThreadPoolExecutor(max(num_threads, 1), thread_name_prefix="decode") as pool:
        source = iter(batches)
        running: list[list] = []

        def submit(count: int) -> None:
            for batch in islice(source, count):
                running.append([pool.submit(lambda i: load(read(i), size, crop), i) for i in batch])

        try:
            submit(ahead + 1)
            while running:
                yield torch.stack([future.result() for future in running.pop(0)])
                submit(1)
        finally:
            for future in (future for batch in running for future in batch):
                future.cancel()
