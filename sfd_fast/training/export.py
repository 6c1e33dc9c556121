"""A training checkpoint, of any engine and ZeRO stage, as a model directory that samples and converts."""

from pathlib import Path

import torch

from sfd_fast.checkpoint import save_model
from sfd_fast.config import SemVAEConfig, SFDConfig, from_dict
from sfd_fast.data.statistics import LatentStatistics
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.semvae import SemVAE
from sfd_fast.training.checkpoints import POINTER, STATE, damage, read_state
from sfd_fast.training.sharded import consolidated


def is_checkpoint(path: str | Path) -> bool:
    """Whether path is a run directory, its checkpoints folder, or one checkpoint."""
    path = Path(path)
    return any((path / part).is_file() for part in (STATE, POINTER, f"checkpoints/{POINTER}"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a run directory, its checkpoints folder or a checkpoint stands for. ValueError if none."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / POINTER).is_file():
            path = folder / (folder / POINTER).read_text().strip()
            break
    problem = damage(path)
    if problem:
        raise ValueError(f"{path} is no intact training checkpoint: {problem}")
    return path


def export_checkpoint(source: str | Path, target: str | Path, *, weights: str = "ema") -> None:
    """Writes a checkpoint's averages (weights "ema", "ema_1", ...) or raw weights ("param") as a model directory.

    source: a run directory or one checkpoint, saved by any number of ranks. Needs no process group and no GPU; `sfd
    convert` makes the released .pt from the result.
    Raises ValueError where the checkpoint is damaged or has no such average.
    """
    folder = find_checkpoint(source)
    state = read_state(folder)
    flat = consolidated(folder, weights)
    settings = state["config"]
    if "semvae" in settings:
        config = from_dict(SemVAEConfig, settings["semvae"])
        model, options = SemVAE(config), {}
    else:
        config = from_dict(SFDConfig, tuples(settings))
        model, options = LightningDiT(config.model), {"config": config}
        kept = state["record"]["statistics"]
        kept = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in kept.items()}
        options["statistics"] = LatentStatistics(**kept)
    wanted = model.state_dict()
    values = {name: flat[name].view(value.shape) if name in flat else value for name, value in wanted.items()}
    save_model(target, model, weights=values, card={"step": state["step"], "weights": weights}, **options)


def tuples(value: object) -> object:
    """JSON has no tuples; a config has no lists."""
    if isinstance(value, list):
        return tuple(tuples(item) for item in value)
    return {key: tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
