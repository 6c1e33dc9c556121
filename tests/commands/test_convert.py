"""`sfd convert`: in and out of the released formats, and several parts into one pipeline folder."""

from dataclasses import replace

import pytest
import torch
import yaml
from harness.support import GOLDEN, load_golden
from harness.tiny_run import tiny_config, write_data
from safetensors.torch import load_file

from sfd_fast import cli
from sfd_fast.commands.convert import ConvertConfig, run_convert
from sfd_fast.config import FeatureDataConfig, RunConfig, SemVAEConfig, SemVAETrainingConfig, TrainConfig
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.formats.model_folder import read_config
from sfd_fast.formats.released_model import load_model, load_released, load_semvae
from sfd_fast.sampling.pipeline import SFDPipeline
from sfd_fast.training.diffusion import run_train
from sfd_fast.training.semvae import run_train_semvae


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
            texture_codec=str(GOLDEN / "sdvae.weights.safetensors"),
        )
    )  # fmt: skip
    pipeline = SFDPipeline.from_pretrained(tmp_path / "pipeline", device="cpu", micro_batch_size=2)
    assert pipeline.sampler.grid == "exact"
    images = pipeline([1, 2], num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 128, 128, 3)
    weights = load_golden("sfd.weights")
    name = "final_layer.linear.weight"
    assert torch.equal(pipeline.transformer.state_dict()[name], weights[name])


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
    config = cli.parse("train", ["--config", str(tmp_path / "ours.yaml")])
    assert (config.model.hidden_size, config.model.depth) == (1152, 28)
    assert (config.optimizer.lr, config.optimizer.beta2, config.transport.delta_t) == (0.0002, 0.95, 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "absent.pt"}, "source absent.pt does not exist"),
        ({"source": "absent.pt", "texture_codec": "c"}, "needs both --texture_codec and --statistics"),
        ({"source": "absent.pt", "guide": "g"}, "a guide belongs to a whole pipeline"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises((ValueError, OSError), match=message):
        run_convert(ConvertConfig(target="out", **options))


def test_two_folders_do_not_convert(tmp_path):
    with pytest.raises(ValueError, match="name a .pt file as target to export"):
        run_convert(ConvertConfig(source=str(tmp_path), target=str(tmp_path / "b")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one process with a second average, and its last checkpoint (ZeRO stages: test_deepspeed.py)."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(write_data(folder / "data"), folder / "run", max_steps=4)
    config = replace(config, optimizer=replace(config.optimizer, extra_ema_decays=(0.5,)))
    run_train(config, device="cpu", progress=False)
    saved = {}
    for path in (folder / "run" / "checkpoints" / "00000004").glob("*.safetensors"):
        saved |= load_file(path)
    return folder / "run", config, saved


def stored(saved: dict, name: str, field: str) -> torch.Tensor:
    """A tensor of a checkpoint of one process, flattened, whichever of its layouts it has."""
    whole = name if field == "param" else f"{name}.{field}"
    keys = [key for key in (f"{name}|{field}", f"model.{whole}", f"optimizer.{whole}", whole) if key in saved]
    return saved[keys[0]].flatten()


@pytest.mark.parametrize(("weights", "field"), [("ema", "ema"), ("ema_1", "ema_1"), ("model", "param")])
def test_a_run_becomes_a_folder_with_the_weights_asked_for(run, tmp_path, weights, field):
    folder, config, saved = run
    cli.main(["convert", "--source", str(folder), "--target", str(tmp_path / "m"), "--weights", weights])
    name = "blocks.0.mlp.w3.weight"
    assert torch.equal(load_model(tmp_path / "m").state_dict()[name].flatten(), stored(saved, name, field))
    assert read_config(tmp_path / "m") == config


def test_a_checkpoint_becomes_the_released_file_with_raw_weights_and_average(run, tmp_path):
    folder, _, saved = run
    checkpoint = folder / "checkpoints" / "00000004"
    cli.main(["convert", "--source", str(checkpoint), "--target", str(tmp_path / "4.pt"), "--weights", "ema_1"])
    tree = torch.load(tmp_path / "4.pt", weights_only=False)
    assert list(tree) == ["model", "ema", "opt", "config"]
    assert list(tree["model"]) == list(tree["ema"]) == list(load_model(folder / "model").state_dict())
    name = "blocks.1.attn.qkv.weight"
    assert torch.equal(tree["model"][name].flatten(), stored(saved, name, "param"))
    assert torch.equal(tree["ema"][name].flatten(), stored(saved, name, "ema_1"))
    assert torch.equal(load_released(tmp_path / "4.pt").state_dict()[name], tree["ema"][name])


def test_a_run_of_semvae_becomes_the_released_file(tmp_path):
    """Which has one set of weights: those asked for."""
    data = write_data(tmp_path / "data")
    config = SemVAETrainingConfig(
        semvae=SemVAEConfig(feature_channels=8, hidden_size=12, num_heads=2, encoder_depth=1, decoder_depth=1),
        data=FeatureDataConfig(path=str(data)),
        train=TrainConfig(max_steps=2, global_batch_size=4, precision="fp32"),
        run=RunConfig(out=str(tmp_path / "run"), sample_every=0, tensorboard=False),
    )  # fmt: skip
    run_train_semvae(config, device="cpu", progress=False)
    cli.main(["convert", "--source", str(tmp_path / "run"), "--target", str(tmp_path / "s.pt"), "--weights", "model"])
    ours, again = load_semvae(tmp_path / "run" / "model").state_dict(), load_semvae(tmp_path / "s.pt").state_dict()
    assert all(torch.equal(again[name], value) for name, value in ours.items())  # its average has decay 0


def test_a_checkpoint_that_lacks_a_parameter_is_refused(run, tmp_path):
    """Never a freshly initialised tensor under a trained one's name."""
    from sfd_fast.models.dit import LightningDiT
    from sfd_fast.training.export import stored_weights

    folder, config, _ = run
    larger = LightningDiT(replace(config.model, depth=3))
    with pytest.raises(ValueError, match="lacks blocks.2.*it belongs to another model"):
        stored_weights(folder / "checkpoints" / "00000004", larger, "ema")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "out", "weights": "ema_7"}, "has no 'ema_7'; it has ema, ema_1"),
        ({"target": "out", "weights": "averages"}, "weights 'averages' is unknown; choose ema, model, or ema_1"),
        ({"target": "out.safetensors"}, "name a folder to get model.safetensors"),
    ],
)
def test_exports_that_cannot_be_are_refused(run, options, message):
    with pytest.raises(ValueError, match=message):
        run_convert(ConvertConfig(source=str(run[0]), **options))
