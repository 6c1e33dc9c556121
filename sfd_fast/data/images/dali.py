"""Decoding and cropping with NVIDIA DALI, on the GPU or on the CPU by the same code. Optional: sfd-fast[dali].

The order of images comes from outside, so sharding, shuffling, the last partial batch and the position of a run are
those of the PIL path. On the CPU DALI decodes JPEG to the same pixels as PIL; the crop differs by the rounding of its
filters (`measure` says by how much). Images on which decoders disagree (CMYK, 16-bit, palette, alpha, animations, WebP)
are decoded with PIL, and so is every image of a batch in which DALI fails: such batches are counted, and the first is
logged with its cause. A pipeline that cannot be built is an error. B images, S edge of the crop.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfd_fast.data.images.decode import GEOMETRIES, Colour, Geometry, decode, load, square, to_tensor
from sfd_fast.data.images.index import ImageIndex
from sfd_fast.files.ahead import ahead

log = logging.getLogger(__name__)

HARDWARE_LOAD = 0.65
"""share of the images for the hardware JPEG decoder where the GPU has one; DALI's default"""


def import_dali() -> Any:
    """The package nvidia.dali; ImportError says how to install it."""
    try:
        import nvidia.dali
    except ImportError:
        raise ImportError(
            "DALI is not installed: pip install nvidia-dali-cuda120 (or sfd-fast[dali]), or use decoder=pil"
        ) from None
    return nvidia.dali


class DaliDecoder:
    """Batches of encoded images to square crops, (B, S, S, 3) uint8 on `device`.

    max_halvings: the most BOX halvings that an image needs. device: cuda (mixed decoding) or cpu (device_id=None).
    """

    def __init__(
        self,
        size: int,
        *,
        crop: str = "adm",
        background: Colour | None = None,
        batch_size: int,
        max_halvings: int,
        device: torch.device | str = "cpu",
        num_threads: int = 2,
    ):
        self.size, self.crop, self.background = size, crop, background
        self.batch_size, self.max_halvings = batch_size, max_halvings
        self.device, self.num_threads = torch.device(device), num_threads
        self.failures = 0
        """batches that were decoded with PIL because DALI failed"""
        self._pipeline: Any = None

    def build(self) -> None:
        """Makes the pipeline, where there is none. Raises OSError where DALI cannot: that is never PIL's to mend."""
        if self._pipeline is not None:
            return
        gpu = self.device.type == "cuda"
        try:
            pipeline = build_pipeline(
                self.size,
                self.max_halvings,
                gpu,
                batch_size=self.batch_size,
                num_threads=self.num_threads,
                device_id=(self.device.index or 0) if gpu else None,
                prefetch_queue_depth=1,
            )
            pipeline.build()
        except RuntimeError as error:
            raise OSError(
                f"DALI cannot start on {self.device}: {reason(error)}. Use decoder=pil, or another device"
            ) from error
        self._pipeline = pipeline

    def __call__(
        self,
        data: Sequence[bytes],
        sizes: Sequence[tuple[int, int]],
        plain: Sequence[bool],
        describe: Callable[[int], str] = "image {} of the batch".format,
    ) -> Tensor:
        """Crops of encoded images. sizes: (width, height) of each; plain: whether DALI may decode it.

        describe: the name of the i-th image in messages. Raises OSError naming an image that PIL cannot decode either.
        """
        out = torch.empty((len(data), self.size, self.size, 3), dtype=torch.uint8, device=self.device)
        chosen = [i for i, is_plain in enumerate(plain) if is_plain]
        rest = [i for i, is_plain in enumerate(plain) if not is_plain]
        if chosen:
            self.build()
            try:
                out[chosen] = self._run([data[i] for i in chosen], [sizes[i] for i in chosen])
            except RuntimeError as error:
                # DALI loses a pipeline with the batch it fails in: the next batch gets a fresh one
                self._pipeline, self.failures, rest = None, self.failures + 1, list(range(len(data)))
                if self.failures == 1:
                    culprits = [describe(i) for i in chosen if self._fails_alone(data[i], sizes[i])]
                    log.warning(
                        "DALI failed in a batch, which PIL decodes instead (said once; the total is in the manifest): "
                        "%s; %s", reason(error), f"the cause is {', '.join(culprits)}" if culprits else
                        "each of its images alone can be decoded",
                    )  # fmt: skip
        for i in rest:
            try:
                out[i] = load(data[i], self.size, self.crop, self.background).to(self.device)
            except (OSError, ValueError) as error:
                raise OSError(f"neither DALI nor PIL can decode {describe(i)}: {error}") from error
        return out

    def _fails_alone(self, data: bytes, size: tuple[int, int]) -> bool:
        """Whether DALI fails with this image only."""
        options = {"crop": self.crop, "max_halvings": self.max_halvings, "device": self.device, "num_threads": 1}
        alone = DaliDecoder(self.size, batch_size=1, **options)
        alone.build()
        try:
            alone._run([data], [size])
        except RuntimeError:
            return True
        return False

    def _run(self, data: list[bytes], sizes: list[tuple[int, int]]) -> Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        plans = [GEOMETRIES[self.crop](width, height, self.size) for width, height in sizes]
        self._pipeline.feed_input("data", [np.frombuffer(item, dtype=np.uint8) for item in data])
        if self.max_halvings:
            parts = [halving_parts(pair, plan, self.max_halvings) for pair, plan in zip(sizes, plans)]
            self._pipeline.feed_input("count", [np.array(len(plan.halvings), dtype=np.int32) for plan in plans])
            self._pipeline.feed_input("parts", parts)
        self._pipeline.feed_input("resized", [np.array(plan.resized[::-1], dtype=np.float32) for plan in plans])
        self._pipeline.feed_input("start", [np.array((plan.top, plan.left), dtype=np.int32) for plan in plans])
        (images,) = self._pipeline.run()
        dense = images.as_tensor()
        out = torch.empty((len(data), self.size, self.size, 3), dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        feed_ndarray(dense, out, cuda_stream=stream)
        return out


def reason(error: RuntimeError) -> str:
    """The line of DALI's long message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return lines[at] if lines else type(error).__name__


def halving_parts(size: tuple[int, int], plan: Geometry, count: int) -> np.ndarray:
    """How BOX halves each axis, as exact halvings of two parts: (count, 2, 4) int32, axis 0 rows, axis 1 columns.

    From w = 2 k + 1 to k pixels, PIL's BOX takes two source pixels for each and three for one in the middle, number
    c = ceil(k / 2) - 1. So [0, 2 (c + 1)) gives c + 1 pixels, [2 (c + 1) + (w mod 2), w) gives the others, and only
    pixel c lacks its third. A row holds: end of the first part and its outputs, start of the second and its outputs.
    size: (width, height); plan: its geometry.
    """
    parts = np.zeros((count, 2, 4), dtype=np.int32)
    for step, halved in enumerate(plan.halvings):
        for axis in (0, 1):
            whole, half = size[1 - axis], halved[1 - axis]
            first = -(-half // 2)
            parts[step, axis] = (2 * first, first, 2 * first + whole % 2, half - first)
        size = halved
    return parts


def build_pipeline(size: int, max_halvings: int, gpu: bool, **options: Any) -> Any:
    """The DALI graph: decode, halve as often as an image needs, cubic resize, crop."""
    dali = import_dali()
    fn, types = dali.fn, dali.types

    def halved(images: Any, part: Any, axis: int) -> Any:
        # without antialiasing, linear interpolation at exactly one half is the mean of two pixels: BOX
        options = {"interp_type": types.INTERP_LINEAR, "antialias": False}
        edge = "resize_y" if axis == 0 else "resize_x"
        low = fn.slice(images, end=part[0:1], axes=[axis])
        high = fn.slice(images, start=part[2:3], axes=[axis])
        low = fn.resize(low, **{edge: fn.cast(part[1], dtype=types.FLOAT)}, mode="stretch", **options)
        high = fn.resize(high, **{edge: fn.cast(part[3], dtype=types.FLOAT)}, mode="stretch", **options)
        return fn.cat(low, high, axis=axis)

    @dali.pipeline_def(enable_conditionals=True, **options)
    def graph() -> Any:
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        count = fn.external_source(name="count", dtype=types.INT32, ndim=0)
        parts = fn.external_source(name="parts", dtype=types.INT32, ndim=3)
        resized = fn.external_source(name="resized", dtype=types.FLOAT, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        images = fn.decoders.image(
            data,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            **({"hw_decoder_load": HARDWARE_LOAD} if gpu else {}),
        )
        for step in range(max_halvings):
            if count > step:
                # columns first, then rows, rounded in between: the order of PIL
                images = halved(halved(images, parts[step, 1], 1), parts[step, 0], 0)
        images = fn.resize(images, size=resized, interp_type=types.INTERP_CUBIC, antialias=True, mode="stretch")
        return fn.slice(images, start=start, shape=(size, size), axes=(0, 1))

    return graph()


def read_batches_dali(
    index: ImageIndex,
    batches: Iterable[Sequence[int]],
    size: int,
    *,
    crop: str = "adm",
    background: Colour | None = None,
    device: torch.device | str = "cpu",
    num_threads: int = 2,
    on_failure: Callable[[list[int]], None] = lambda batch: None,
) -> Iterator[Tensor]:
    """Decoded batches (B, S, S, 3) uint8 on the device in the order given; the next is decoded while one is used.

    Batches may have any size, the last a smaller one. on_failure gets the numbers of each batch in which DALI failed.
    Raises OSError naming the image that nothing can decode, or where DALI cannot start.
    """
    batches = [list(batch) for batch in batches]
    if not batches:
        return
    decoder = DaliDecoder(
        size,
        crop=crop,
        background=background,
        batch_size=max(map(len, batches)),
        max_halvings=max_halvings(index, size, crop),
        device=device,
        num_threads=num_threads,
    )
    decoder.build()

    def decoded(batch: list[int]) -> Tensor:
        data = [index.read(i) for i in batch]
        sizes = [(int(index.widths[i]), int(index.heights[i])) for i in batch]
        failures = decoder.failures
        images = decoder(data, sizes, [bool(index.plain[i]) for i in batch], lambda i: index.describe(batch[i]))
        if decoder.failures > failures:
            on_failure(batch)
        return images

    yield from ahead(decoded, batches, num_threads=1, depth=1)


def max_halvings(index: ImageIndex, size: int, crop: str) -> int:
    """The most halvings that an image of the index needs."""
    shorter = np.minimum(index.widths, index.heights)
    i = int(shorter.argmax())
    return len(GEOMETRIES[crop](int(index.widths[i]), int(index.heights[i]), size).halvings)


def measure(
    images: Sequence[bytes], size: int, *, crop: str = "adm", device: torch.device | str = "cpu"
) -> list[float]:
    """PSNR in dB of DALI's crop against the exact path, for each encoded image; infinite where they are equal.

    Raises OSError where DALI failed, so that PIL is never compared with itself.
    """
    exact = [decode(data) for data in images]
    sizes = [image.size for image in exact]
    steps = max(len(GEOMETRIES[crop](*pair, size).halvings) for pair in sizes)
    decoder = DaliDecoder(size, crop=crop, batch_size=len(images), max_halvings=steps, device=device)
    approximate = decoder(images, sizes, [True] * len(images)).cpu().double()
    if decoder.failures:
        raise OSError("DALI failed on these images: there is no difference to measure (the reason is in the log)")
    reference = torch.stack([to_tensor(square(image, size, crop)) for image in exact]).double()
    error = (approximate - reference).square().flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / error)).tolist()
