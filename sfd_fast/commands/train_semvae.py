"""`sfd train-semvae`: trains the semantic autoencoder, or shows what the run would do."""

from dataclasses import dataclass, fields
from pathlib import Path

from sfd_fast.config import SemVAETrainingConfig
from sfd_fast.planning.description import show
from sfd_fast.training.loop import TrainResult
from sfd_fast.training.semvae import check_used, run_train_semvae, semvae_job


@dataclass(frozen=True)
class TrainSemVAEOptions(SemVAETrainingConfig):
    """Every field of a run's configuration, and what to do with it."""

    dry_run: bool = False
    """show the whole plan of the run and train nothing"""


def run(options: TrainSemVAEOptions) -> TrainResult:
    """Trains; with dry_run prints the plan of the run instead. Raises as run_train_semvae."""
    kept = {field.name: getattr(options, field.name) for field in fields(SemVAETrainingConfig)}
    config = SemVAETrainingConfig(**kept)
    if options.dry_run:
        check_used(config)
        show(semvae_job(config))
        return TrainResult(Path(config.run.out), 0, None)
    return run_train_semvae(config)
