"""The directory of a run: taken by one launch, resumed from, or refused because it belongs to another run."""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from sfd_fast.config import require, to_dict
from sfd_fast.config.checks import PATH, changeable, flatten, marked
from sfd_fast.files.atomic import sweep, write_atomically
from sfd_fast.files.digest import settings_digest
from sfd_fast.files.documents import read_json, require_kinds
from sfd_fast.files.lock import FolderLock
from sfd_fast.formats.marked_folder import strangers
from sfd_fast.training.checkpoints import POINTER, STATE, Checkpoints, is_ours, read_state
from sfd_fast.training.engines.interface import Engine, together
from sfd_fast.training.job import Job
from sfd_fast.training.run.log import METRICS
from sfd_fast.training.run.stop import STOP_FILE

MODEL, CONFIG = "model", "config.json"
STORED = {
    "config": dict, "identity": dict, "record": dict, "world_size": int, "threads": list, "changes": list,
    "bad_in_row": int, "skipped": int, "wall_s": (int, float), "interval": dict, "recent_norms": list,
}  # fmt: skip
"""what a run keeps in state.json beside what every checkpoint has"""


def lock(folder: Path) -> FolderLock:
    """Keeps other launches out of a run's directory while it is entered, and sweeps what a killed one left there."""
    return FolderLock(folder, command="training", advice="choose another run.out", clean=partial(sweep, folder))


def is_run(path: Path) -> bool:
    """Whether a file is the config.json of a run of ours."""
    try:
        return {"train", "run", "optimizer", "data"} <= read_json(path).keys()
    except (OSError, ValueError):
        return False


def require_ours(folder: Path, step: int, names: Iterable[str]) -> None:
    """Raises ValueError where the directory of a run that is at `step` holds files of others in the place of ours."""
    for path in sorted((folder / "checkpoints").glob("[0-9]*")):
        later = path.name.isdecimal() and path.name == f"{int(path.name):08d}" and int(path.name) > step
        require(not later or is_ours(path), f"{path} is there already and is no checkpoint: move it away")
    if (folder / "checkpoints" / POINTER).is_file():
        return
    advice = "choose another run.out, or move it away to start anew"
    if is_run(folder / CONFIG):
        log = folder / METRICS
        lost = log.is_file() and log.stat().st_size > 0
        require(not lost, f"{log} is the log of a run whose checkpoints are gone: {advice}")
        return
    for path in (folder / name for name in (CONFIG, METRICS, *names)):
        require(not path.exists(), f"{path} is there already and was not written by this command: {advice}")


def prepare_directory(
    folder: Path, config: object, *, resume: bool, write: bool, step: int = 0, files: Mapping[str, str] | None = None
) -> None:
    """Creates the run directory with config.json and the engine's `files` (name -> text). step: where the run is.

    OSError where it cannot be written, ValueError where it is taken.
    """
    if not resume and Checkpoints(folder / "checkpoints", keep=1).steps():
        raise ValueError(
            f"{folder} already holds a run; resume it (resume=True), choose another run.out, or delete the folder"
        )
    if not write:
        return
    require_ours(folder, step, files or ())
    strangers(folder / MODEL)  # raises where the model could not take its place at the end
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, json.dumps(to_dict(config), indent=1) + "\n")
        for name, text in (files or {}).items():
            write_atomically(folder / name, text)
        (folder / STOP_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"the run directory {folder} cannot be written ({error}); choose another run.out") from error


def launch_settings(job: Job, engine: Engine) -> dict:
    """What all ranks of a launch must have in common: not names of files and folders, of which nodes have copies."""
    places = marked(type(job.config), PATH) | {"data.num_workers"}
    settings = {key: value for key, value in flatten(to_dict(job.config)).items() if key not in places}
    return json.loads(json.dumps(settings | {"data": job.identity | {"samples": job.fingerprint}} | engine.files()))


def check_alike(job: Job, engine: Engine) -> None:
    """Raises ValueError on every rank where ranks were started with other settings, seeds or data.

    Costs one small message of each rank.
    """
    mine = launch_settings(job, engine)
    digests = engine.gather(settings_digest(mine))
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not different:
        return
    everyone = engine.gather(mine)
    first, other = everyone[0], everyone[different[0]]
    pairs = [f"{key} is {first[key]!r} on rank 0 and {other[key]!r} on rank {different[0]}"
             for key in first if first[key] != other.get(key)]  # fmt: skip
    ranks = ", ".join(map(str, different[:8])) + (", ..." if len(different) > 8 else "")
    raise ValueError(
        f"rank {ranks} was started otherwise than rank 0: {'; '.join(pairs)[:500]}; start all ranks with the same "
        "settings, on copies of the same data"
    )


def check_resumable(job: Job, state: dict) -> list[dict]:
    """What train.change lets differ from the checkpoint: {key, was, is} each.

    Raises ValueError where the checkpoint belongs to another configuration or other data.
    """
    old, new = (flatten(json.loads(json.dumps(c))) for c in (state["config"], to_dict(job.config)))
    keys = sorted((old.keys() | new.keys()) - changeable(type(job.config)))
    different = [key for key in keys if old.get(key) != new.get(key)]
    refused = [key for key in different if key not in job.train.change]
    if refused:
        pairs = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in refused)
        raise ValueError(
            f"the checkpoint in {job.run.out} belongs to another configuration: {pairs}; set them back, or choose "
            "another run.out (train.init_from starts a new run from these weights, train.change allows to change "
            "settings of the optimizer)"
        )
    for key, value in job.identity.items():
        if state["identity"].get(key) != value:
            raise ValueError(
                f"the checkpoint in {job.run.out} was trained on other data: {key} was {state['identity'].get(key)} "
                f"and is {value}; give the data it was trained on, or choose another run.out"
            )
    return [{"key": key, "was": old.get(key), "is": new.get(key)} for key in different]


def resume_point(job: Job, engine: Engine, checkpoints: Checkpoints) -> tuple[Path | None, dict]:
    """(checkpoint to go on from, its state), or (None, {}) at the start; the same on every rank.

    What train.change changes is added to the state's "changes". ValueError where the checkpoint is damaged or belongs
    to another run, OSError where ranks see different ones.
    """

    def find() -> tuple[Path | None, dict]:
        latest = checkpoints.latest()
        if latest is None:
            return None, {}
        state = read_state(latest, verify=False)  # its digest was compared a moment ago
        require_kinds(state, STORED, latest / STATE)
        state["changes"] += [{"step": state["step"]} | change for change in check_resumable(job, state)]
        return latest, state

    latest, state = together(engine, f"resume the run in {job.run.out}", find)
    steps = engine.gather(state.get("step", 0))
    if len(set(steps)) > 1:
        raise OSError(
            f"ranks see different checkpoints in {job.run.out}: of steps {min(steps)} to {max(steps)}, this rank "
            f"({engine.rank}) {steps[engine.rank]}; run.out must be a folder that all nodes share"
        )
    return latest, state


def num_threads() -> list[int]:
    """Threads of torch within an operation and between operations: sums round by their number."""
    return [torch.get_num_threads(), torch.get_num_interop_threads()]


def resume_notes(engine: Engine, latest: Path, state: dict) -> list[str]:
    """What is worth saying of a checkpoint that is resumed."""
    notes = [f"resumed from {latest}"]
    if state["world_size"] != engine.world_size:
        notes.append(
            f"saved by {state['world_size']} ranks, resumed by {engine.world_size}: equal to rounding, not to the bit"
        )
    if engine.device.type == "cpu" and state["threads"] != num_threads():
        notes.append(
            f"saved with {state['threads'][0]} threads, resumed with {num_threads()[0]}: equal to rounding (4 against "
            "1 differ by 2e-6), not to the bit; OMP_NUM_THREADS sets their number"
        )
    if engine.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        notes.append("resumed on CUDA: equal to rounding, not to the bit; train.deterministic gives the same bits")
    changes = [change for change in state["changes"] if change["step"] == state["step"]]
    return notes + [f"{c['key']} was {c['was']!r} and is {c['is']!r}, as train.change allows" for c in changes]
