"""Batches of decoded images in any order, by PIL or DALI. Letters: B images, S edge of the crop."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from sfd_fast.data.images.decode import Colour, read_batches
from sfd_fast.data.images.index import ImageIndex

Decoder = Literal["pil", "dali"]


def decoded_batches(
    index: ImageIndex,
    batches: Sequence[Sequence[int]],
    size: int,
    *,
    crop: str = "adm",
    background: Colour | None = None,
    decoder: Decoder = "pil",
    device: torch.device | str = "cpu",
    num_threads: int = 2,
    on_failure: Callable[[list[int]], None] = lambda batch: None,
) -> Iterator[Tensor]:
    """The images of every batch, (B, S, S, 3) uint8, in the order given, decoded ahead of their use.

    background: as in sfd_fast.data.images.decode.decode.

    pil: exact, on the CPU. dali: on `device`, within the difference that sfd_fast.data.images.dali.measure tells;
    on_failure gets the numbers of a batch in which DALI failed, before the batch (decoded with PIL) is handed out.
    """
    if decoder == "dali":
        from sfd_fast.data.images.dali import read_batches_dali

        return read_batches_dali(
            index, batches, size, crop=crop, background=background, device=device, num_threads=num_threads,
            on_failure=on_failure,
        )  # fmt: skip
    return read_batches(index.read, batches, size, crop=crop, background=background, num_threads=num_threads)
