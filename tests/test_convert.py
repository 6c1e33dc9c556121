"""`sfd convert`: in and out of the released formats, and several parts into one pipeline folder."""

import pytest
import torch
import yaml
from support import GOLDEN, load_golden

from sfd_fast.convert import ConvertConfig, run_convert
from sfd_fast.data.statistics import LatentStatistics
from sfd_fast.pipeline import SFDPipeline


@pytest.mark.golden
def test_a_released_checkpoint_comes_back_identical(tmp_path):
    source = GOLDEN / "sfd.official.pt"
    run_convert(ConvertConfig(source=str(source), target=str(tmp_path / "ours")))
    run_convert(ConvertConfig(source=str(tmp_path / "ours"), target=str(tmp_path / "back.pt")))
    first, second = (torch.load(p, weights_only=False) for p in (source, tmp_path / "back.pt"))
    assert list(first) == list(second)
    assert first["config"] == second["config"]
    for part in ("model", "ema"):
        assert list(first[part]) == list(second[part])
        for name, tensor in first[part].items():
            assert tensor.dtype == second[part][name].dtype
            assert torch.equal(tensor, second[part][name])


@pytest.mark.golden
def test_released_parts_become_a_pipeline_that_samples(tmp_path):
    statistics = tmp_path / "statistics"
    statistics.mkdir()
    LatentStatistics.identity(32, 16).save(statistics)
    run_convert(
        ConvertConfig(
            source=str(GOLDEN / "sfd.official.pt"), target=str(tmp_path / "pipeline"), statistics=str(statistics),
            codec=str(GOLDEN / "sdvae.weights.safetensors"),
        )
    )  # fmt: skip
    pipeline = SFDPipeline.from_pretrained(tmp_path / "pipeline", device="cpu", micro_batch_size=2)
    assert pipeline.sampler.grid == "exact"
    images = pipeline([1, 2], num_steps=3, output_type="np").images
    assert images.shape == (2, 128, 128, 3)
    weights = load_golden("sfd.weights")
    assert torch.equal(pipeline.model.state_dict()["final_layer.linear.weight"], weights["final_layer.linear.weight"])


def test_a_released_yaml_becomes_one_of_ours(tmp_path):
    released = {
        "model": {
            "model_type": "LightningDiT-XL/1", "in_chans": 48, "semantic_chans": 16, "semfirst_delta_t": 0.3,
            "use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "use_repa": True,
            "repa_dino_version": "dinov2_vitb14_reg",
        },
        "data": {"image_size": 256, "num_classes": 1000, "latent_norm": True, "latent_sv_norm": True,
                 "latent_multiplier": 1.0},
        "vae": {"downsample_ratio": 16},
        "train": {"max_steps": 400000, "global_batch_size": 256},
        "optimizer": {"lr": 0.0002, "beta2": 0.95},
        "transport": {"path_type": "Linear", "prediction": "velocity", "use_cosine_loss": True, "use_lognorm": True},
    }  # fmt: skip
    (tmp_path / "released.yaml").write_text(yaml.safe_dump(released))
    run_convert(ConvertConfig(source=str(tmp_path / "released.yaml"), target=str(tmp_path / "ours.yaml")))
    from sfd_fast import cli

    config = cli.parse("train", ["--config", str(tmp_path / "ours.yaml")])
    assert (config.model.hidden_size, config.model.depth) == (1152, 28)
    assert (config.optimizer.lr, config.optimizer.beta2, config.transport.delta_t) == (0.0002, 0.95, 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "absent.pt"}, "source absent.pt does not exist"),
        ({"source": "absent.pt", "codec": "c"}, "needs both --codec and --statistics"),
        ({"source": "absent.pt", "guide": "g"}, "a guide belongs to a whole pipeline"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises((ValueError, OSError), match=message):
        run_convert(ConvertConfig(target="out", **options))


def test_two_folders_do_not_convert(tmp_path):
    with pytest.raises(ValueError, match="name a .pt file as target to export"):
        run_convert(ConvertConfig(source=str(tmp_path), target=str(tmp_path / "b")))
