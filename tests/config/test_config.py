"""Settings are checked when they are made, and every message says what to do."""

import pytest

from sfd_fast.config import (
    GuidanceConfig,
    ModelConfig,
    OptimizerConfig,
    SFDConfig,
    TrainConfig,
    TransportConfig,
    from_dict,
    to_dict,
)
from sfd_fast.config.presets import PRESETS, preset


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(hidden_size=100), "hidden_size 100 must be divisible by 4 \\* num_heads = 64"),
        (lambda: ModelConfig(patch_size=3), "grid_size 16 must be divisible by patch_size 3"),
        (lambda: ModelConfig(repa_depth=29), "repa_depth 29 must be a block number, 1 to depth = 28"),
        (lambda: ModelConfig(class_dropout=1.0), "class_dropout 1.0 must be in \\[0, 1\\)"),
        (lambda: TransportConfig(delta_t=1.2), "delta_t 1.2 must be in \\[0, 1\\]"),
        (lambda: TransportConfig(velocity_loss=False, cosine_loss=False), "at least one of them must train"),
        (lambda: GuidanceConfig(scale=2.0), "set guidance.mode \\(`sfd sample`: --guidance_mode\\) to 'cfg' or 'auto"),
        (lambda: OptimizerConfig(lr=0), "optimizer.lr 0 must be greater than 0"),
        (lambda: TrainConfig(global_batch_size=10, micro_batch_size=4), "must be a multiple of micro_batch_size 4"),
        (lambda: SFDConfig(transport=TransportConfig(delta_t=0.0)), "delta_t = 0 has one clock"),
        (lambda: SFDConfig(model=ModelConfig(repa_channels=0)), "there is no REPA head to train"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="unknown key 'model.dept'; did you mean 'model.depth'"):
        from_dict(ModelConfig, {"dept": 3})


@pytest.mark.parametrize("name", PRESETS)
def test_dictionaries_round_trip(name):
    config = SFDConfig(model=preset(name), optimizer=OptimizerConfig(extra_ema_decays=(0.9, 0.99)))
    assert from_dict(SFDConfig, to_dict(config)) == config


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="unknown preset 'XXXL'; presets: S, B, L, XL"):
        preset("XXXL")


@pytest.mark.parametrize(("name", "millions"), [("B", 137.6), ("XL", 682.8), ("XXL", 1037.2)])
def test_sizes_have_the_published_number_of_parameters(name, millions):
    import torch

    from sfd_fast.models.dit import LightningDiT

    with torch.device("meta"):
        model = LightningDiT(preset(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
