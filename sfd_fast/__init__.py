"""sfd_fast: Semantics-First Diffusion (SFD, arXiv 2512.04926), trained and sampled fast.

    from sfd_fast import SFDPipeline, load_released, LightningDiT, SemVAE, training_loss, sample, PRESETS

Each is imported when it is first asked for: `import sfd_fast` alone loads nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfd_fast.config.presets import PRESETS
    from sfd_fast.diffusion.transport import training_loss
    from sfd_fast.formats.released_model import load_released
    from sfd_fast.models.dit import LightningDiT
    from sfd_fast.models.semvae import SemVAE
    from sfd_fast.sampling.pipeline import SFDPipeline
    from sfd_fast.sampling.sampler import sample

__version__ = "0.1.0"
__all__ = ["PRESETS", "LightningDiT", "SFDPipeline", "SemVAE", "load_released", "sample", "training_loss"]

HOMES = {
    "PRESETS": "config.presets",
    "LightningDiT": "models.dit",
    "SFDPipeline": "sampling.pipeline",
    "SemVAE": "models.semvae",
    "load_released": "formats.released_model",
    "sample": "sampling.sampler",
    "training_loss": "diffusion.transport",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
