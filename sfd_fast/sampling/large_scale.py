"""Any number of images on any number of processes, resumable, each a function of (seed, id, label).

Work is cut into units of one micro-batch; a process takes every WORLD_SIZE-th unit, skips those that are there already,
and writes each whole or not at all. So what was interrupted goes on with the same command, on as many processes as
there are then, and ends with the same files.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sfd_fast.config import to_dict
from sfd_fast.files.atomic import create_once
from sfd_fast.files.digest import tensors_digest
from sfd_fast.ranks import Ranks
from sfd_fast.sampling.image_writer import AsyncWriter
from sfd_fast.sampling.images import Request
from sfd_fast.sampling.output import POLL_S, Progress, SampleFiles, stopped_ranks, wait_for_all
from sfd_fast.sampling.pipeline import SFDPipeline

RUN = "run.json"
"""what the images of a folder are made from"""
CLAIM_S = 10.0
"""run.json is read again for so long where another process may still be writing it"""


def balanced_labels(num: int, classes: Sequence[int]) -> Tensor:
    """Every class in turn: the numbers of images of two classes differ by at most one.  Returns (num,) int64."""
    return torch.tensor(list(classes), dtype=torch.int64)[torch.arange(num) % len(classes)]


def weights_digest(*modules: nn.Module | None) -> str:
    """16 hexadecimal digits that tell networks apart by their tensors."""
    parts = enumerate(module for module in modules if module is not None)
    return tensors_digest({f"{i}.{name}": t for i, module in parts for name, t in module.state_dict().items()})[:16]


@dataclass(frozen=True)
class Generation:
    """All that the images of a folder follow from, and where they are. model: for the record."""

    pipeline: SFDPipeline
    request: Request
    files: SampleFiles
    shuffle_seed: int
    model: str

    def record(self) -> dict:
        pipeline, request = self.pipeline, self.request
        guided = request.guidance.mode == "autoguidance"
        return {
            "model": self.model,
            "weights": weights_digest(pipeline.transformer, pipeline.guide if guided else None),
            "texture_codec": weights_digest(pipeline.texture_codec),
            "statistics": pipeline.statistics.digest(),
            "num_images": len(request),
            "labels": tensors_digest({"labels": request.labels})[:16],
            "seed": request.seed,
            "format": self.files.format,
            "shuffle_seed": self.shuffle_seed,
            "micro_batch_size": pipeline.micro_batch_size,
            "precision": pipeline.precision,
            "backend": pipeline.backend,
            "device": pipeline.device.type,
            "delta_t": pipeline.delta_t,
            "sampler": to_dict(request.sampler),
            "guidance": to_dict(request.guidance),
        }

    def claim(self) -> None:
        """Marks the folder as holding these samples; ValueError where it holds others."""
        path, record = self.files.out / RUN, self.record()
        # run.json comes before every image: without it they are of another program
        found = [name for name in self.files.outputs if (self.files.out / name).exists()]
        if found and not path.exists():
            raise ValueError(
                f"{self.files.out / found[0]} is there already and was not written by this command, as {path} is "
                "missing: choose another folder with --out, or move it away"
            )
        if create_once(path, (json.dumps(record, indent=1) + "\n").encode()):
            return
        there = read_claim(path)
        different = [key for key in record if key != "model" and there.get(key) != record[key]]
        if different:
            key = different[0]
            raise ValueError(
                f"{path.parent} holds samples of other settings: {key} is {there.get(key)} there and {record[key]} "
                "now; go on with the same settings, or choose another folder with --out"
            )

    def run(self, ranks: Ranks, *, num_writers: int, stall_s: float, progress: bool) -> tuple[int, int]:
        """Draws this process's share; rank 0 then waits for the others'. Raises OSError as wait_for_all does.

        Returns the number of images drawn: by this process, and of all that rank 0 has seen come.
        """
        if not self.files.gathered:
            self.files.folder.mkdir(exist_ok=True)
        bar = Progress(self.files, shown=progress and ranks.first)
        if ranks.first and bar.units_before:
            print(f"{bar.units_before} of {len(self.files.starts)} micro-batches are there already")
        made = self.draw_share(ranks, num_writers, bar)
        if ranks.first:
            bar.update(now=True)
            wait_for_all(self.files, bar, stall_s)
        else:
            for line in stopped_ranks(self.files.out, but=ranks.rank):
                print(f"{line}: run the same command again to go on")
        bar.bar.close()
        return made, bar.done - bar.before

    def draw_share(self, ranks: Ranks, num_writers: int, bar: Progress) -> int:
        """Draws and writes the units of this rank that are not there yet; how many images these were."""
        files = self.files
        mine = [first for first in files.starts[ranks.rank :: ranks.world_size] if not files.finished(first)]
        chosen = torch.tensor([number for first in mine for number in files.numbers(first)], dtype=torch.int64)
        images = self.pipeline.generate(self.request.rows(chosen))
        with AsyncWriter(num_writers, max_waiting=4 * max(files.size, num_writers)) as writer:
            for first, part in zip(mine, images, strict=True):
                files.write(writer, first, part)
                if ranks.first:
                    bar.update()
        return len(chosen)


def read_claim(path: Path) -> dict:
    """The settings in run.json, which another process may be writing at this moment. Raises ValueError if it stays
    torn."""
    until = time.monotonic() + CLAIM_S
    while True:
        try:
            there = json.loads(path.read_text())
            if isinstance(there, dict):
                return there
            reason: object = "it holds no settings"
        except ValueError as error:
            reason = error
        if time.monotonic() > until:
            raise ValueError(
                f"{path} is damaged ({reason}): delete it to go on with the images that are there, or choose another "
                "folder with --out"
            )
        time.sleep(POLL_S)
