"""Work that ends at the n-th thing it does to files, for every n, and is started again: the outcome must be the same.

`python crash_points.py PART FOLDER EVERY` sweeps one part at every EVERY-th point; the last line on stdout is a JSON
with the number of points and those that went wrong. A point is a call that makes, opens for writing, writes,
synchronises, renames, cuts or removes a file; half of a write is done before the process ends there.
"""

import builtins
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from harness.tiny_run import checkpoint_tensors, tiny_config, write_data
from sfd_fast.files import atomic
from sfd_fast.files.digest import tensors_digest
from sfd_fast.training.checkpoints import Checkpoints
from sfd_fast.training.diffusion import run_train
from sfd_fast.training.export import export_checkpoint
from sfd_fast.training.run.log import read_rows

CRASHED = 137
CALLS = ("fsync", "replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir", "truncate", "ftruncate", "chmod")


class Part(NamedTuple):
    """prepare(shared) makes what all attempts read, act(shared, place) is the work, done again after a crash."""

    prepare: Callable[[Path], object]
    act: Callable[[Path, Path], object]
    outcome: Callable[[Path], dict]
    """what the work left, compared with that of work that never ended early"""
    look: Callable[[Path], object] = lambda place: None
    """raises where what a crash left is neither the old nor the new"""


def end_at(point: int) -> None:
    """From now on this process ends at its point-th event."""
    numbers = itertools.count(1)

    def event(half: Callable[[], object] = lambda: None) -> None:
        if next(numbers) == point:
            half()
            os._exit(CRASHED)

    def counted(call):
        def wrapper(*arguments, **options):
            event()
            return call(*arguments, **options)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    atomic.exchange = counted(atomic.exchange)
    pwrite, descriptor_of, opened, save = os.pwrite, os.open, io.open, safetensors.torch.save_file

    def half_written(number, content, offset):
        event(lambda: pwrite(number, memoryview(content)[: len(content) // 2], offset))
        return pwrite(number, content, offset)

    def open_descriptor(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR):
            event()
        return descriptor_of(path, flags, *arguments, **options)

    def open_file(path, mode="r", *arguments, **options):
        if set(mode) & set("wax+"):
            event()
        return opened(path, mode, *arguments, **options)

    def save_half(values, path, *arguments):
        event(lambda: Path(path).write_bytes(b"half"))
        save(values, path, *arguments)

    os.pwrite, os.open, builtins.open, io.open, safetensors.torch.save_file = (
        half_written, open_descriptor, open_file, open_file, save_half,
    )  # fmt: skip


def child(work: Callable[[], object]) -> int:
    """Exit code of work in a forked child: it has imported everything, and computes on one thread."""
    number = os.fork()
    if number == 0:
        end_after(work)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def end_after(work: Callable[[], object]) -> None:
    """Does the work and ends this process."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def sweep(part: Part, folder: Path, every: int) -> dict:
    """{"points": number, "wrong": [those after which the outcome was another, or starting again failed]}."""
    shared, found = folder / "shared", folder / "outcome.json"

    def finish(place: Path) -> None:
        part.look(place)
        part.act(shared, place)
        found.write_text(json.dumps(part.outcome(place)))

    shared.mkdir(parents=True)
    if child(lambda: part.prepare(shared)) or child(lambda: finish(folder / "unbroken")):
        raise SystemExit("the unbroken work failed")
    wanted, wrong = json.loads(found.read_text()), []
    for number in itertools.count():
        place = folder / f"crash-{number}"

        def crash(place=place, point=1 + number * every):
            end_at(point)
            part.act(shared, place)

        code = child(crash)
        if code == 0:
            break
        if code != CRASHED:
            raise SystemExit(f"the work failed by itself before event {1 + number * every}")
        found.unlink(missing_ok=True)
        if child(lambda place=place: finish(place)) or json.loads(found.read_text()) != wanted:
            wrong.append(1 + number * every)
        shutil.rmtree(place, ignore_errors=True)
    return {"points": number, "wrong": wrong}


def bytes_of(name: str) -> Callable[[Path], dict[str, str]]:
    """The digest of every file of a folder of the place, but not of its lock."""

    def outcome(place: Path) -> dict[str, str]:
        paths = sorted(p for p in (place / name).rglob("*") if p.is_file() and p.name != ".lock")
        return {str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}

    return outcome


def train(shared: Path, place: Path) -> None:
    settings = {"max_steps": 3, "checkpoint_every": 1, "log_every": 1, "keep_checkpoints": 1}
    run_train(tiny_config(shared / "data", place / "run", **settings), device="cpu", progress=False)


def run_outcome(place: Path) -> dict:
    run = place / "run"
    rows = [[row["step"], row["loss"]] for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
    names = sorted(path.name for path in [*run.iterdir(), *(run / "checkpoints").iterdir()])
    model = safetensors.torch.load_file(run / "model" / "model.safetensors")
    return {"rows": rows, "names": names, "state": tensors_digest(checkpoint_tensors(run, 3) | model)}


def export(shared: Path, place: Path) -> None:
    """A model of the raw weights, in whose place one of the averages comes."""
    for weights in ("model", "ema"):
        export_checkpoint(shared / "run", place / "model", weights=weights)


def look_at_model(place: Path) -> None:
    from sfd_fast.formats.released_model import load_model

    if (place / "model").exists():
        load_model(place / "model")


def sample(shared: Path, place: Path) -> None:
    from sfd_fast.commands.sample import SampleConfig, run_sample

    run_sample(
        SampleConfig(
            model=str(shared / "pipeline"), out=str(place / "out"), num_images=12, progress=False, device="cpu"
        )
    )


def prepare_samples(shared: Path) -> None:
    from harness.tiny_pipelines import build

    # fp32 on every CPU: a pipeline that was rounded to bf16 is not saved
    pipeline = build(guide=None, guidance=None, micro_batch_size=2, torch_dtype=torch.float32)
    pipeline.save_pretrained(shared / "pipeline")


def encode(shared: Path, place: Path) -> None:
    from harness.tiny_caches import encode_config
    from sfd_fast.commands.encode import run_encode

    parts = {name: str(shared / name) for name in ("images", "vfm", "texture_codec", "semvae")}
    run_encode(encode_config(parts, place / "out"))


def prepare_images(shared: Path) -> None:
    from harness.image_trees import write_tree
    from harness.tiny_encoders import save_autoencoder, save_dinov2
    from sfd_fast.config import SemVAEConfig
    from sfd_fast.formats.model_folder import save_model
    from sfd_fast.models.semvae import SemVAE

    config = SemVAEConfig(
        feature_channels=24, hidden_size=24, num_heads=2, encoder_depth=1, decoder_depth=1, latent_channels=3
    )
    save_model(shared / "semvae", SemVAE(config))
    write_tree(shared / "images", {"china": 3, "flower": 2})
    save_dinov2(shared / "vfm")
    save_autoencoder(shared / "texture_codec")


PARTS = {
    "train": Part(
        lambda shared: write_data(shared / "data"), train, run_outcome,
        lambda place: Checkpoints(place / "run" / "checkpoints", keep=1).latest(),
    ),
    "export": Part(
        lambda shared: (write_data(shared / "data"), train(shared, shared)), export, bytes_of("model"), look_at_model
    ),
    "sample": Part(prepare_samples, sample, bytes_of("out")),
    "encode": Part(prepare_images, encode, bytes_of("out")),
}  # fmt: skip


def main() -> None:
    name, folder, every = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(sweep(PARTS[name], Path(folder), int(every))))


if __name__ == "__main__":
    main()
