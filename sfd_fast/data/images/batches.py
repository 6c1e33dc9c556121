"""Batches of decoded images in any order, by PIL or DALI; a loader that divides epochs over ranks exactly.

`sfd features` and `sfd encode` read decoded_batches. ImageLoader is for those who train on pixels, on a VFM or a codec
for example, with their own loop: the commands of this package train on caches.

Letters: B images, S edge of the crop, N images of the set.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from sfd_fast.data.images.decode import read_batches
from sfd_fast.data.images.index import ImageIndex
from sfd_fast.data.load.order import shuffled_indices

Decoder = Literal["pil", "dali"]


def decoded_batches(
    index: ImageIndex,
    batches: Sequence[Sequence[int]],
    size: int,
    *,
    crop: str = "adm",
    decoder: Decoder = "pil",
    device: torch.device | str = "cpu",
    num_threads: int = 2,
    on_failure: Callable[[list[int]], None] = lambda batch: None,
) -> Iterator[Tensor]:
    """The images of every batch, (B, S, S, 3) uint8, in the order given, decoded ahead of their use.

    pil: exact, on the CPU. dali: on `device`, within the difference that sfd_fast.data.images.dali.measure tells;
    on_failure gets the numbers of a batch in which DALI failed, before the batch (decoded with PIL) is handed out.
    """
    if decoder == "dali":
        from sfd_fast.data.images.dali import read_batches_dali

        return read_batches_dali(
            index, batches, size, crop=crop, device=device, num_threads=num_threads, on_failure=on_failure
        )
    return read_batches(index.read, batches, size, crop=crop, num_threads=num_threads)


class ImageLoader:
    """One epoch after the other of decoded images, divided over ranks without duplicates or losses.

    Epoch e shows the images in the order P_{seed, e} (0 .. N - 1 with shuffle=False); rank r takes every world_size-th
    of them from r on, in batches of batch_size, the last one smaller. So ranks differ by at most one image, whatever
    N and world_size are. `position` counts (epoch, batches handed out in it) and is all that a checkpoint needs.

    Iterating yields the rest of the current epoch: {"images": (B, S, S, 3) uint8, "labels": (B,) int64, "numbers": (B,)
    int64 of the images in the index}, then moves to the next epoch.
    """

    def __init__(
        self,
        index: ImageIndex,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        crop: str = "adm",
        decoder: Decoder = "pil",
        device: torch.device | str = "cpu",
        num_threads: int = 2,
        position: tuple[int, int] = (0, 0),
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size} must be above 0 and rank {rank} in 0 to {world_size - 1}")
        self.index, self.size, self.batch_size, self.seed = index, size, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.crop, self.decoder, self.device, self.num_threads = crop, decoder, device, num_threads
        self.position = position

    def batches(self, epoch: int) -> list[Tensor]:
        """Numbers of the images of every batch of this rank in an epoch."""
        positions = torch.arange(len(self.index))[self.rank :: self.world_size]
        if self.shuffle:
            positions = shuffled_indices(positions + epoch * len(self.index), len(self.index), self.seed)
        return list(positions.split(self.batch_size)) if len(positions) else []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, done = self.position
        batches = self.batches(epoch)
        images = decoded_batches(
            self.index,
            [batch.tolist() for batch in batches[done:]],
            self.size,
            crop=self.crop,
            decoder=self.decoder,
            device=self.device,
            num_threads=self.num_threads,
        )
        for number, (batch, pixels) in enumerate(zip(batches[done:], images), done + 1):
            self.position = (epoch, number)
            labels = torch.from_numpy(self.index.labels[batch.numpy()].astype("int64"))
            yield {"images": pixels, "labels": labels, "numbers": batch}
        self.position = (epoch + 1, 0)
