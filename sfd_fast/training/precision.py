"""train.precision 'auto': the one that is fastest where the run is."""

import logging
from typing import TypeVar

import torch

from sfd_fast.config import SemVAETrainingConfig, SFDConfig, overlaid
from sfd_fast.models.processor import has_bf16_units
from sfd_fast.ranks import Ranks

log = logging.getLogger(__name__)
Config = TypeVar("Config", SFDConfig, SemVAETrainingConfig)


def settled(config: Config, device: torch.device | str | None = None) -> Config:
    """config with train.precision 'auto' as what it stands for on the device (None: CUDA where there is one).

    parity on a GPU and on a CPU with bf16 units, else fp32, which is said once: such a CPU takes more than twice as
    long with bf16 (7.3 against 17.3 steps/s).
    """
    if config.train.precision != "auto":
        return config
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    precision = "parity" if cuda or has_bf16_units() else "fp32"
    if precision == "fp32" and Ranks.read().first:
        log.info("precision: fp32, as this CPU has no bf16 units; --train.precision parity computes as a GPU would")
    return overlaid(config, {"train.precision": precision})
