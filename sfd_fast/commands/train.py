"""`sfd train`: trains the diffusion transformer, or shows what the run would do."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sfd_fast.config import SFDConfig

if TYPE_CHECKING:
    from sfd_fast.training.loop import TrainResult


@dataclass(frozen=True)
class TrainOptions(SFDConfig):
    """Every field of a run's configuration, and what to do with it."""

    dry_run: bool = False
    """show the whole plan of the run and train nothing"""


def run(options: TrainOptions) -> "TrainResult | None":
    """Trains; with dry_run prints the plan of the run instead. Raises as run_train."""
    from sfd_fast.planning.description import show
    from sfd_fast.training.diffusion import diffusion_job, run_train

    config = SFDConfig(**{field.name: getattr(options, field.name) for field in fields(SFDConfig)})
    return show(diffusion_job(config)) if options.dry_run else run_train(config)
