"""`sfd train`: trains the diffusion transformer, or shows what the run would do."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sfd_fast.config import SFDConfig

if TYPE_CHECKING:
    from sfd_fast.training.loop import TrainResult


@dataclass(frozen=True)
class TrainOptions(SFDConfig):
    """Every field of a run's configuration, and what to do with it."""

    dry_run: bool = False
    """show the whole plan of the run and train nothing"""


def sizes_of_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the model that the cache at data.path tells: defaults for what is not given, {full key: value}.

    Nothing where no cache is named. Raises as data.cache.describe.
    """
    place = {name: os.path.expanduser(str(given.get(f"data.{name}") or "")) for name in ("path", "cache_folder")}
    if not place["path"] or not ("://" in place["path"] or os.path.exists(place["path"])):
        return {}  # the run itself says what is missing
    from sfd_fast.data.cache.describe import describe

    sizes = describe(place["path"], place["cache_folder"] or None)
    if not sizes.texture_channels:
        return {}  # features alone
    told = {
        "model.texture_channels": sizes.texture_channels,
        "model.semantic_channels": sizes.semantic_channels,
        "model.grid_size": sizes.grid_size,
        "model.num_classes": sizes.num_classes,
    }
    return told | ({"model.repa_channels": sizes.feature_channels} if sizes.feature_channels else {})


def run(options: TrainOptions) -> "TrainResult | None":
    """Trains; with dry_run prints the plan of the run instead. Raises as run_train."""
    from sfd_fast.planning.description import show
    from sfd_fast.training.diffusion import diffusion_job, run_train

    config = SFDConfig(**{field.name: getattr(options, field.name) for field in fields(SFDConfig)})
    return show(diffusion_job(config)) if options.dry_run else run_train(config)
