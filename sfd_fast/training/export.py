"""A training checkpoint, of any engine and ZeRO stage, as a model directory or as a file in the released format."""

import tempfile
from pathlib import Path

from torch import Tensor, nn

from sfd_fast.config import SemVAEConfig, SFDConfig, from_dict, require
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.files.home import with_home
from sfd_fast.files.messages import first_line
from sfd_fast.formats.model_folder import CARD, save_model
from sfd_fast.formats.released_model import export_released, write_released_dit
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.semvae import SemVAE
from sfd_fast.training.checkpoints import POINTER, STATE, Checkpoints, damage, read_state
from sfd_fast.training.state import WEIGHT, consolidated


@with_home
def is_checkpoint(path: str | Path) -> bool:
    """Whether path is a run directory, its checkpoints folder, or one checkpoint."""
    path = Path(path)
    return any((path / part).is_file() for part in (STATE, POINTER, f"checkpoints/{POINTER}"))


@with_home
def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a run directory, its checkpoints folder or a checkpoint stands for. ValueError if none."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / POINTER).is_file():
            latest = Checkpoints(folder, keep=1).latest()
            require(latest is not None, f"{path} has no checkpoint yet")
            return latest
    problem = damage(path)
    require(problem is None, f"{path} is no intact training checkpoint: {problem}")
    return path


@with_home
def export_checkpoint(source: str | Path, target: str | Path, *, weights: str = "ema") -> None:
    """Writes a checkpoint's averages (weights "ema", "ema_1", ...) or raw weights ("model") as a model directory.

    source: a run directory or one checkpoint, saved by any number of ranks. Needs no process group and no GPU.
    Raises ValueError where the checkpoint is damaged or has no such average.
    """
    folder = find_checkpoint(source)
    model, options = untrained(folder)
    values = stored_weights(folder, model, weights)
    state = read_state(folder)
    card = {"step": state["step"], "weights": weights} | {name: state["record"].get(name) for name in CARD}
    save_model(target, model, weights=values, card=card, **options)


@with_home
def export_released_checkpoint(source: str | Path, target: str | Path, *, weights: str = "ema") -> None:
    """Writes a checkpoint as a file that the released code loads: raw weights as "model", the average `weights` as
    "ema"; no optimizer state. A SemVAE's format has one set of weights: those asked for.

    Source: docs/METHOD.md 6. Raises as export_checkpoint, and OSError where the place cannot be written.
    """
    folder = find_checkpoint(source)
    model, options = untrained(folder)
    if isinstance(model, SemVAE):
        with tempfile.TemporaryDirectory() as scratch:
            export_checkpoint(folder, scratch, weights=weights)
            export_released(scratch, target)
    else:
        raw, average = (stored_weights(folder, model, name) for name in ("model", weights))
        write_released_dit(target, options["config"], raw=raw, average=average)


def untrained(folder: Path) -> tuple[LightningDiT | SemVAE, dict]:
    """The network that a checkpoint's state describes, with fresh weights, and what save_model stores beside it."""
    state = read_state(folder)
    try:
        settings = state["config"]
        if "semvae" in settings:
            return SemVAE(from_dict(SemVAEConfig, settings["semvae"])), {}
        config = from_dict(SFDConfig, settings)
        statistics = LatentStatistics.from_json(state["record"]["statistics"])
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / STATE} describes no model of ours: {first_line(error)}") from None
    return LightningDiT(config.model), {"config": config, "statistics": statistics}


def stored_weights(folder: Path, model: nn.Module, weights: str) -> dict[str, Tensor]:
    """Every tensor of the model's state dict, in its order: the checkpoint's, and constants (buffers) as they are.

    ValueError where the checkpoint has no such average, or lacks a trained parameter.
    """
    flat = consolidated(folder, WEIGHT if weights == "model" else weights)
    absent = [name for name, p in model.named_parameters() if p.requires_grad and name not in flat]
    require(not absent, f"checkpoint {folder} lacks {', '.join(absent[:3])}: it belongs to another model")
    return {name: flat[name].view(value.shape) if name in flat else value for name, value in model.state_dict().items()}
