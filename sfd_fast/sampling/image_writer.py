"""Generated images on disk: written by threads beside the sampler, each file whole or absent, one npz out of many
parts.

Images are (N, H, W, 3) uint8.
"""

import io
import math
import os
import threading
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from sfd_fast.files.atomic import write_atomically

ENCODERS: dict[str, dict] = {
    "png": {"format": "PNG", "compress_level": 1},  # 1 encodes about four times as fast as 6, 10 % larger
    "webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
}


PNG_HEAD, PNG_TAIL = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"


def is_whole(path: Path) -> bool:
    """Whether a .png, .webp, .npy or .npz is there to its last byte: its head and its end are read, not its content."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".npz":
                return zipfile.is_zipfile(file)
            head, size = file.read(len(PNG_HEAD)), os.fstat(file.fileno()).st_size
            if path.suffix == ".npy":
                file.seek(0)
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                return size == file.tell() + math.prod(shape) * dtype.itemsize
            if path.suffix == ".webp":
                return head[:4] == b"RIFF" and int.from_bytes(head[4:], "little") + 8 == size
            file.seek(max(size - len(PNG_TAIL), 0))
            return head == PNG_HEAD and file.read() == PNG_TAIL
    except (FileNotFoundError, ValueError):  # ValueError: no header of an array
        return False


class AsyncWriter:
    """Runs write jobs on threads, at most `max_waiting` ahead; a failure is raised at the next submit or at close.

    Used as a context manager: leaving it waits for everything that was submitted.
    """

    def __init__(self, num_threads: int, max_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="writer")
        self._room = threading.Semaphore(max_waiting)
        self._failed: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Queues a job; waits while too many are under way, so that memory stays bounded."""
        self._raise()
        self._room.acquire()
        self._pool.submit(job).add_done_callback(self._done)

    def _done(self, future: Future) -> None:
        self._failed = self._failed or future.exception()
        self._room.release()

    def _raise(self) -> None:
        if self._failed is not None:
            raise OSError(
                f"{self._failed}; what is complete is kept: make room and run the same command again to go on"
            ) from self._failed

    def __enter__(self) -> "AsyncWriter":
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._raise()


def write_image(path: Path, image: np.ndarray) -> None:
    """One image (H, W, 3) as PNG or lossless WebP, by the path's suffix."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, **ENCODERS[path.suffix[1:]])
    write_atomically(path, encoded.getbuffer(), durable=False)


def write_array(path: Path, values: np.ndarray) -> None:
    """An array, some images for example, as .npy."""
    content = io.BytesIO()
    np.save(content, values)
    write_atomically(path, content.getbuffer(), durable=False)


def write_npz(path: Path, parts: list[Path], order: np.ndarray, part_size: int, others: dict[str, np.ndarray]) -> None:
    """The images of all parts in the given order as arr_0 of an uncompressed npz, streamed; then `others`.

    Image i stands in parts[i // part_size]. The bytes of the file depend on its content alone.
    """
    opened = [np.load(part, mmap_mode="r") for part in parts]
    shape = (len(order), *opened[0].shape[1:])

    def rows() -> Iterable[bytes]:
        for i in order.tolist():
            yield opened[i // part_size][i % part_size].tobytes()

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _add_array(archive, "arr_0", shape, np.dtype(np.uint8), rows())
            for name, values in others.items():
                _add_array(archive, name, values.shape, values.dtype, [np.ascontiguousarray(values).tobytes()])

    write_atomically(path, write)


def _add_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: Iterable[bytes]
) -> None:
    entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(chunk)
