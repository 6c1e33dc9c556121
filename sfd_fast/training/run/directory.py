"""The directory of a run: taken, resumed from, or refused because it belongs to another run."""

import json
from collections.abc import Mapping
from pathlib import Path

from sfd_fast.config import to_dict
from sfd_fast.config.checks import changeable, flatten
from sfd_fast.files.atomic import write_atomically
from sfd_fast.training.checkpoints import Checkpoints, read_state
from sfd_fast.training.engines.interface import Engine, together
from sfd_fast.training.job import Job
from sfd_fast.training.run.stop import STOP_FILE


def prepare_directory(
    folder: Path, config: object, *, resume: bool, write: bool, files: Mapping[str, str] | None = None
) -> None:
    """Creates the run directory with config.json and the engine's `files` (name -> text).

    OSError where it cannot be written, ValueError where it is taken.
    """
    if not resume and (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{folder} already holds a run; resume it (resume=True), choose another run.out, or delete the folder"
        )
    if not write:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", json.dumps(to_dict(config), indent=1) + "\n")
        for name, text in (files or {}).items():
            write_atomically(folder / name, text)
        (folder / STOP_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"the run directory {folder} cannot be written ({error}); choose another run.out") from error


def check_resumable(job: Job, state: dict) -> None:
    """Raises ValueError where a checkpoint belongs to another configuration or other data.

    A key that the checkpoint does not know yet had the effect of its default.
    """
    default, new = (flatten(json.loads(json.dumps(to_dict(c)))) for c in (type(job.config)(), job.config))
    old = default | flatten(state["config"])
    keys = sorted((old.keys() | new.keys()) - changeable(type(job.config)))
    different = [k for k in keys if old.get(k) != new.get(k)]
    if different:
        pairs = ", ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in different)
        raise ValueError(
            f"the checkpoint in {job.run.out} belongs to another configuration: {pairs}; set them back, or choose "
            "another run.out (train.init_from starts a new run from these weights)"
        )
    for key, value in job.identity.items():
        if state["identity"].get(key) != value:
            raise ValueError(
                f"the checkpoint in {job.run.out} was trained on other data: {key} was {state['identity'].get(key)} "
                f"and is {value}; give the data it was trained on, or choose another run.out"
            )


def resume_point(job: Job, engine: Engine, checkpoints: Checkpoints) -> tuple[Path | None, dict]:
    """(checkpoint to go on from, its state), or (None, {}) at the start; the same on every rank.

    ValueError where it belongs to another run, OSError where ranks see different ones.
    """

    def find() -> tuple[Path | None, dict]:
        latest = checkpoints.latest()
        if latest is None:
            return None, {}
        state = read_state(latest)
        check_resumable(job, state)
        return latest, state

    latest, state = together(engine, f"resume the run in {job.run.out}", find)
    step = state["step"] if state else 0
    first, last = -int(engine.max_over_ranks(-step)), int(engine.max_over_ranks(step))
    if first != last:
        raise OSError(
            f"ranks see different checkpoints in {job.run.out}: of steps {first} to {last}, this rank "
            f"({engine.rank}) {step}; run.out must be a folder that all nodes share"
        )
    return latest, state
