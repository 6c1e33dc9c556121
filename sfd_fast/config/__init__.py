"""Every setting of the system as frozen dataclasses, validated on construction; defaults stand only here.

Times are on the clock t = 0 noise, t = 1 data; the global time tau runs over [0, 1 + delta_t].
"""

from sfd_fast.config.checks import Precision, Settings, from_dict, overlaid, require, to_dict
from sfd_fast.config.data import DataConfig, FeatureDataConfig
from sfd_fast.config.model import ModelConfig, SemVAEConfig, TextureConfig
from sfd_fast.config.optimizer import OptimizerConfig
from sfd_fast.config.run import RunConfig
from sfd_fast.config.sampling import (
    GuidanceConfig,
    SamplerConfig,
    SamplingBackend,
    SamplingPrecision,
    SingleSettings,
    with_settings,
)
from sfd_fast.config.training import (
    DeepSpeedConfig,
    SemVAETrainingConfig,
    SFDConfig,
    TrainConfig,
    TrainingPrecision,
    TransportConfig,
)

__all__ = [
    "DataConfig",
    "DeepSpeedConfig",
    "FeatureDataConfig",
    "GuidanceConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "RunConfig",
    "SFDConfig",
    "SamplerConfig",
    "SamplingBackend",
    "SamplingPrecision",
    "SemVAEConfig",
    "SemVAETrainingConfig",
    "Settings",
    "SingleSettings",
    "TextureConfig",
    "TrainConfig",
    "TrainingPrecision",
    "TransportConfig",
    "from_dict",
    "overlaid",
    "require",
    "to_dict",
    "with_settings",
]
