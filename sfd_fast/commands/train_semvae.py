"""`sfd train-semvae`: trains the semantic autoencoder, or shows what the run would do."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sfd_fast.config import SemVAETrainingConfig

if TYPE_CHECKING:
    from sfd_fast.training.loop import TrainResult


@dataclass(frozen=True)
class TrainSemVAEOptions(SemVAETrainingConfig):
    """Every field of a run's configuration, and what to do with it."""

    dry_run: bool = False
    """show the whole plan of the run and train nothing"""


def run(options: TrainSemVAEOptions) -> "TrainResult | None":
    """Trains; with dry_run prints the plan of the run instead. Raises as run_train_semvae."""
    from sfd_fast.planning.description import show
    from sfd_fast.training.semvae import check_used, run_train_semvae, semvae_job

    kept = {field.name: getattr(options, field.name) for field in fields(SemVAETrainingConfig)}
    config = SemVAETrainingConfig(**kept)
    if not options.dry_run:
        return run_train_semvae(config)
    check_used(config)
    return show(semvae_job(config))
