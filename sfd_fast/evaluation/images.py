"""Image sets to evaluate: an npz batch (arr_0) or a folder of images, read batch by batch.

Shapes: B batch, N images, H height, W width; pixels are uint8 and channels last, as in OpenAI's batches.
"""

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np

from sfd_fast.files.ahead import ahead
from sfd_fast.files.home import with_home

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FOLDER_ORDER_SEED = 0
SAMPLE_RECORD = "run.json"
"""what `sfd sample` leaves beside its images"""
HOW_TO_WRITE = "write uint8 images of shape (N, H, W, 3) in [0, 255] with numpy.savez(path, arr_0=images)"


class ImageSet(ABC):
    """Images of one size. `describe` gives what a report should say of them."""

    path: Path
    num_images: int
    height: int
    width: int

    @abstractmethod
    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images start .. stop in order, (B, H, W, 3) uint8 at a time."""

    def describe(self) -> dict[str, str | int]:
        return {"path": str(self.path), "num_images": self.num_images, "height": self.height, "width": self.width}


class NpzImages(ImageSet):
    """arr_0 of an npz, streamed: 50,000 images of 256 x 256 are 9.8 GB, which need not fit in memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                if "arr_0" not in names:
                    raise ValueError(f"{path} has no arr_0 but {', '.join(names) or 'nothing'}: {HOW_TO_WRITE}")
                with archive.open("arr_0.npy") as file:
                    shape, fortran_order, dtype = self._header(file)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read as npz ({error}): it may be cut short; write or download it again"
            ) from error
        if dtype != np.uint8:
            raise ValueError(f"{path}: arr_0 is {dtype}, but images must be uint8 in [0, 255]: {HOW_TO_WRITE}")
        if len(shape) != 4 or shape[3] != 3 or fortran_order:
            order = " in Fortran order" if fortran_order else ""
            raise ValueError(f"{path}: arr_0 has shape {shape}{order}, but images must be (N, H, W, 3): {HOW_TO_WRITE}")
        self.num_images, self.height, self.width, _ = shape
        if self.num_images == 0:
            raise ValueError(f"{path}: arr_0 holds no images (shape {shape})")

    def _header(self, file) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(file)
        except ValueError as error:
            raise ValueError(f"{self.path}: arr_0 is no readable array ({error}): {HOW_TO_WRITE}") from error

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        stop = self.num_images if stop is None else stop
        bytes_per_image = self.height * self.width * 3
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                self._header(file)
                file.seek(start * bytes_per_image, 1)
                for first in range(start, stop, batch_size):
                    count = min(batch_size, stop - first)
                    data = file.read(count * bytes_per_image)
                    if len(data) != count * bytes_per_image:
                        raise ValueError(
                            f"{self.path} ends before image {first + len(data) // bytes_per_image} of {self.num_images}"
                        )
                    yield np.frombuffer(data, dtype=np.uint8).reshape(count, self.height, self.width, 3)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path} is damaged ({error}): write or download it again") from error


class FolderImages(ImageSet):
    """All images below a folder. Sorted by name, then permuted by a fixed seed: a folder sorted by class would spoil
    the splits of the Inception Score and any subset."""

    def __init__(self, path: Path, num_workers: int):
        self.path, self.num_workers = path, num_workers
        paths = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not is_hidden(file.relative_to(path))
        )
        if not paths:
            raise ValueError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}), not in its subfolders either")
        empty = [file for file in paths if file.stat().st_size == 0]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(paths)} images in {path} are empty files, the first is {empty[0]}: write them "
                "again, or remove them"
            )
        order = np.random.default_rng(FOLDER_ORDER_SEED).permutation(len(paths))
        self.paths = [paths[i] for i in order]
        self.num_images = len(paths)
        self.height, self.width, _ = self._decode(self.paths[0]).shape

    @staticmethod
    def _decode(path: Path) -> np.ndarray:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(
                        f"{path} has pixels of more than 8 bits (mode {image.mode}): convert it to 8-bit RGB"
                    )
                return np.array(image.convert("RGB"))
        except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): remove it or write it again") from error

    def _load(self, path: Path) -> np.ndarray:
        image = self._decode(path)
        if image.shape[:2] != (self.height, self.width):
            raise ValueError(
                f"images differ in size: {self.paths[0]} is {self.width} x {self.height}, {path} is {image.shape[1]} x "
                f"{image.shape[0]}; "
                "crop and resize them to one size first"
            )
        return image

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        stop = self.num_images if stop is None else stop
        with ThreadPoolExecutor(self.num_workers) as pool:
            for first in range(start, stop, batch_size):
                yield np.stack(list(pool.map(self._load, self.paths[first : min(first + batch_size, stop)])))


def is_hidden(path: Path) -> bool:
    """Whether a name on the path begins with a dot: macOS's ._*, .ipynb_checkpoints, unfinished writes."""
    return any(part.startswith(".") for part in path.parts)


@with_home
def open_images(path: str | Path, *, num_workers: int = 4) -> ImageSet:
    """The images of an npz file, of a folder, or of a folder that `sfd sample` wrote (its grid is no sample).

    Raises ValueError for anything else, saying what is wrong with it.
    """
    path = Path(path)
    if (path / SAMPLE_RECORD).is_file():
        path = next((part for part in (path / "samples.npz", path / "images") if part.exists()), path)
    if path.is_dir():
        return FolderImages(path, num_workers)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give an npz file with arr_0 or a folder of images")
    if path.suffix.lower() != ".npz":
        raise ValueError(f"{path} is neither a folder nor an npz file")
    return NpzImages(path)


def read_ahead(batches: Iterator[np.ndarray], depth: int = 3) -> Iterator[np.ndarray]:
    """The same batches, read by a thread up to `depth` ahead of their use. An error of the reader is raised here, at
    its place."""
    end = object()
    for item in ahead(lambda _: next(batches, end), repeat(None), num_threads=1, depth=depth):
        if item is end:
            return
        yield item
