"""Released YAML files and constructor arguments in our terms, and back."""

import copy

import pytest
import torch
import yaml
from harness.support import GOLDEN, load_golden_config

from sfd_fast.commands.sample import SampleConfig
from sfd_fast.config import GuidanceConfig, ModelConfig, SamplerConfig, SFDConfig, TransportConfig
from sfd_fast.config.presets import PRESETS, RELEASED_NAMES, XL
from sfd_fast.formats.released_config import read_config, read_settings, sample_settings, to_released
from sfd_fast.formats.released_model import load_released
from sfd_fast.formats.released_network import model_config
from sfd_fast.models.dit import LightningDiT

# A training and sampling file as released, with settings that have no counterpart here.
RELEASED = yaml.safe_load("""
ckpt_path: outputs/train/sfd_xl/checkpoints/4000000.pt
data:
  data_path: outputs/latents
  fid_reference_file: outputs/VIRTUAL_imagenet256_labeled.npz
  image_size: 256
  num_classes: 1000
  num_workers: 8
  latent_norm: true
  latent_sv_norm: true
  latent_multiplier: 1.0
vae: {model_name: sdvae_f16d32, downsample_ratio: 16}
model:
  model_type: LightningDiT-XL/1
  use_qknorm: true
  use_swiglu: true
  use_rope: true
  use_rmsnorm: true
  wo_shift: false
  in_chans: 48
  semantic_chans: 16
  semfirst_delta_t: 0.3
  semantic_weight: 2.0
  use_repa: true
  repa_dino_version: dinov2_vitb14_reg
  repa_feat_depth: 2
train:
  max_steps: 4000000
  global_batch_size: 256
  global_seed: 3
  output_dir: outputs/train
  exp_name: sfd_xl
  ckpt: null
  log_every: 100
  ckpt_every: 80000
optimizer: {lr: 0.0002, beta2: 0.95}
transport:
  path_type: Linear
  prediction: velocity
  loss_weight: null
  sample_eps: null
  train_eps: null
  use_cosine_loss: true
  use_lognorm: true
sample:
  mode: ODE
  sampling_method: dopri5
  atol: 0.000001
  rtol: 0.001
  reverse: false
  likelihood: false
  num_sampling_steps: 250
  cfg_scale: 1.5
  per_proc_batch_size: 4
  fid_num: 50000
  cfg_interval_start: 0.2
  timestep_shift: 0
  balanced_sampling: true
  autoguidance: true
  autoguidance_config: configs/b.yaml
""")
TINY = ModelConfig(
    hidden_size=32, depth=3, num_heads=2, grid_size=4, texture_channels=3, semantic_channels=2, num_classes=10,
    repa_channels=384, repa_depth=2, repa_hidden=16,
)  # fmt: skip


def changed(section, **values):
    tree = copy.deepcopy(RELEASED)
    tree[section] |= values
    return tree


def weights_of(config):
    with torch.device("meta"):
        return LightningDiT(config).state_dict()


def test_a_released_file_becomes_our_configuration():
    config = read_config(RELEASED).config
    assert config.model == XL
    assert config.transport == TransportConfig(delta_t=0.3, time_distribution="logit_normal", semantic_weight=2.0)
    assert (config.optimizer.lr, config.optimizer.beta2, config.optimizer.max_grad_norm) == (2e-4, 0.95, 0)
    assert (config.data.path, config.data.latent_multiplier) == ("outputs/latents", 1.0)
    assert (config.train.max_steps, config.train.global_batch_size, config.train.seed) == (4_000_000, 256, 3)
    assert (config.run.out, config.run.checkpoint_every) == ("outputs/train/sfd_xl", 80_000)
    assert config.sampler == SamplerConfig(solver="dopri5", num_inference_steps=249, grid="released")
    assert config.guidance == GuidanceConfig(mode="autoguidance", scale=1.5, interval_start=0.2)


def test_settings_without_a_counterpart_are_listed():
    ignored = read_config(RELEASED).ignored
    assert {line.split(" = ")[0] for line in ignored} == {"vae.model_name", "sample.autoguidance_config", "ckpt_path"}


def test_unlisted_switches_are_off():
    """docs/METHOD.md 6: and the latent multiplier is 0.18215 where a file leaves it out."""
    bare = {"model": {"model_type": "LightningDiT-B/1", "in_chans": 32, "use_swiglu": True, "use_rmsnorm": True}}
    config = read_config(bare).config
    model, transport = config.model, config.transport
    assert not (model.two_clocks or model.use_qk_norm or model.use_rope or model.repa_channels)
    assert not (transport.cosine_loss or transport.repa_weight)
    assert model.use_shift and transport.time_distribution == "uniform"
    assert (transport.delta_t, transport.semantic_weight) == (0.0, 1.0)
    assert config.data.latent_multiplier == 0.18215
    assert config.guidance == GuidanceConfig()


@pytest.mark.parametrize("name", RELEASED_NAMES)
def test_every_released_model_type_is_known(name):
    config = read_config(changed("model", model_type=f"LightningDiT-{name}")).config
    assert config.model == RELEASED_NAMES[name]


def test_guidance_of_at_most_one_is_none():
    """docs/METHOD.md 5: the released sampler skips guidance when w <= 1."""
    tree = changed("sample", autoguidance=False, cfg_scale=1.0, cfg_interval_start=0)
    assert not read_config(tree).config.guidance.active
    tree = changed("sample", autoguidance=False, cfg_scale=2.5)
    assert read_config(tree).config.guidance.mode == "cfg"


def test_a_released_shift_of_zero_changes_nothing_and_others_are_kept():
    assert read_config(changed("sample", timestep_shift=0)).config.sampler.timestep_shift == 1.0
    assert read_config(changed("sample", timestep_shift=0.3)).config.sampler.timestep_shift == 0.3


@pytest.mark.parametrize("theirs, ours", [("euler", "euler"), ("heun2", "heun"), ("rk4", "rk4"), ("dopri5", "dopri5")])
def test_released_points_become_steps(theirs, ours):
    sampler = read_config(changed("sample", sampling_method=theirs, num_sampling_steps=11)).config.sampler
    assert (sampler.solver, sampler.num_inference_steps) == (ours, 10)


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("transport", {"path_type": "VP"}, "transport.path_type: VP is not supported; only Linear is"),
        ("transport", {"prediction": "noise"}, "transport.prediction: noise is not supported; only velocity is"),
        ("data", {"latent_sv_norm": "yes"}, "data.normalise_semantic 'yes' must be true or false"),
        ("model", {"repa_mode": "cosine"}, "transport.repa_mode 'cosine' is unknown; choose cos, mse or cos_mse"),
        ("model", {"semfirst_infer_interval_mode": "texture"}, "guidance.interval_mode 'texture' is unknown"),
        ("model", {"repa_dino_version": "dinov2_vitb14_regg"}, "did you mean dinov2_vitb14_reg"),
        ("model", {"repa_dino_version": None}, "repa_dino_version: None is unknown"),
        ("optimizer", {"lr": "fast"}, "optimizer.lr 'fast' must be a finite number"),
        ("model", {"use_swiglu": False}, "use_swiglu: False is not supported"),
        ("model", {"learn_sigma": True}, "learn_sigma: True is not supported"),
        ("sample", {"sampling_method": "dopri8"}, "sampling_method: dopri8 is unknown; known: euler, midpoint, heun2"),
        ("model", {"model_type": "LightningDiT-Giant/1"}, "the network's hidden_size is unknown"),
    ],
)
def test_settings_that_would_be_computed_otherwise_are_refused(section, values, message):
    with pytest.raises(ValueError, match=message):
        read_config(changed(section, **values))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["sfd", "sync", "noshift", "patch2"])
def test_constructor_arguments_and_weights_agree_on_the_golden_models(name):
    arguments = load_golden_config(name)
    model = load_released(GOLDEN / f"{name}.weights.safetensors", arguments)
    assert model_config(arguments) == model.config


@pytest.mark.parametrize(
    "config",
    [TINY, *(PRESETS[name] for name in ("S", "XXL")), ModelConfig(**{**vars(TINY), "two_clocks": False}),
     ModelConfig(**{**vars(TINY), "use_shift": False, "patch_size": 2}),
     ModelConfig(**{**vars(TINY), "use_rope": False}),
     ModelConfig(**{**vars(TINY), "repa_channels": 0, "repa_hidden": 2048})],
    ids=["tiny", "S", "XXL", "one clock", "no shift", "no rope", "no repa"],
)  # fmt: skip
def test_shapes_of_weights_tell_the_network(config):
    assert model_config({"semantic_chans": config.semantic_channels, "repa_depth": 2}, weights_of(config)) == config


def test_heads_without_rotary_tables_and_qk_norm_must_be_said():
    weights = weights_of(ModelConfig(**{**vars(TINY), "use_rope": False, "use_qk_norm": False}))
    with pytest.raises(ValueError, match="the network's num_heads is unknown"):
        model_config({"semantic_chans": 2}, weights)
    assert model_config({"semantic_chans": 2, "num_heads": 2}, weights).num_heads == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"semantic_chans": 2, "hidden_size": 64}, "the configuration says hidden_size = 64, the weights have 32"),
        ({"semantic_chans": 2, "depth": 4}, "the configuration says depth = 4, the weights have 3"),
        ({"semantic_chans": 2, "semfirst_delta_t": 0.0}, "says two_clocks = False, the weights have True"),
        ({"semantic_chans": 2, "wo_shift": True}, "says use_shift = False, the weights have True"),
        ({"semantic_chans": 2, "in_channels": 48}, "says channels = 48, the weights have 5"),
        ({"semantic_chans": 2, "num_classes": 1000}, "says num_classes = 1000, the weights have 10"),
        ({}, r"semantic_channels are unknown; pass config=\{'semantic_chans': ...\}"),
    ],
)
def test_contradictions_between_settings_and_weights_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_config(arguments, weights_of(TINY))


def test_constructor_arguments_say_nothing_about_the_latents():
    settings, _ = read_config({"semantic_chans": 2, "semfirst_delta_t": 0.3}, weights_of(TINY))
    assert settings.data.latent_multiplier == 1.0


def test_foreign_weights_are_named():
    with pytest.raises(ValueError, match="not the weights of a LightningDiT: 'x_embedder.proj.weight' is missing"):
        model_config({}, {"encoder.0.weight": torch.zeros(1)})
    weights = weights_of(TINY)
    del weights["blocks.0.mlp.w12.weight"]
    with pytest.raises(ValueError, match="no SwiGLU"):
        model_config({}, weights)


def test_two_clocks_without_their_distance_are_refused():
    with pytest.raises(ValueError, match="two clocks, but semfirst_delta_t is not given"):
        read_config({"semantic_chans": 2}, weights_of(TINY))


@pytest.mark.parametrize(
    "config",
    [
        read_config(RELEASED).config,
        SFDConfig(sampler=SamplerConfig(solver="heun", num_inference_steps=20, grid="released", timestep_shift=0.5)),
        SFDConfig(model=ModelConfig(two_clocks=False), transport=TransportConfig(delta_t=0.0, repa_mode="cos_mse"),
                  sampler=SamplerConfig(solver="midpoint", grid="released"),
                  guidance=GuidanceConfig(mode="cfg", scale=2.5)),
    ],
    ids=["released", "solver", "one clock"],
)  # fmt: skip
def test_our_configuration_survives_the_way_to_a_released_file_and_back(config):
    again = read_config(yaml.safe_load(yaml.safe_dump(to_released(config))))
    for part in ("model", "transport", "optimizer", "sampler", "guidance"):
        assert getattr(again.config, part) == getattr(config, part)
    assert again.config.run.out == config.run.out


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.yaml does not exist"):
        read_settings(tmp_path / "gone.yaml")
    (tmp_path / "a.yaml").write_text("model: [")
    with pytest.raises(ValueError, match="a.yaml is no valid YAML"):
        read_settings(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="b.yaml holds a list, not keys with values"):
        read_settings(tmp_path / "b.yaml")


@pytest.mark.parametrize("size, width", [("s", 384), ("b", 768), ("l", 1024)])
@pytest.mark.parametrize("suffix", ["", "_reg"])
def test_vision_models_with_and_without_registers_are_known(size, width, suffix):
    """docs/METHOD.md 6"""
    tree = changed("model", repa_dino_version=f"dinov2_vit{size}14{suffix}")
    assert read_config(tree).config.model.repa_channels == width


def test_a_rate_in_scientific_notation_is_a_number(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(RELEASED).replace("lr: 0.0002", "lr: 1e-4"))
    assert read_config(read_settings(tmp_path / "a.yaml")).config.optimizer.lr == 1e-4


def test_normalisation_that_is_left_out_is_off():
    """docs/METHOD.md 6"""
    tree = copy.deepcopy(RELEASED)
    del tree["data"]["latent_norm"], tree["data"]["latent_sv_norm"]
    data = read_config(tree).config.data
    assert (data.normalise_texture, data.normalise_semantic) == (False, False)
    data = read_config(changed("data", latent_sv_norm=False)).config.data
    assert (data.normalise_texture, data.normalise_semantic) == (True, False)
    assert to_released(read_config(changed("data", latent_sv_norm=False)).config)["data"]["latent_sv_norm"] is False


def test_every_checkpoint_is_kept_as_the_released_trainer_does():
    assert read_config(RELEASED).config.run.keep_checkpoints == 0


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("autoguidance", [False, True])
def test_a_scale_of_at_most_one_is_no_guidance_whatever_the_mode(scale, autoguidance):
    tree = changed("sample", autoguidance=autoguidance, cfg_scale=scale, cfg_interval_start=0)
    assert not read_config(tree).config.guidance.active


def test_missing_semantic_channels_are_none():
    """docs/METHOD.md 6: a missing semantic_chans is 0, and then there is one clock."""
    tree = copy.deepcopy(RELEASED)
    del tree["model"]["semantic_chans"]
    model = read_config(tree).config.model
    assert (model.texture_channels, model.semantic_channels, model.two_clocks) == (48, 0, False)
    network = ModelConfig(**{**vars(TINY), "two_clocks": False, "texture_channels": 5, "semantic_channels": 0})
    assert model_config({"depth": 3, "repa_depth": 2}, weights_of(network)) == network
    with pytest.raises(ValueError, match="semantic_channels are unknown"):
        model_config({"depth": 3}, weights_of(TINY))


def test_without_label_dropout_there_is_no_null_row():
    """docs/METHOD.md 6"""
    assert read_config(changed("model", class_dropout_prob=0)).config.model.num_labels == 1000
    network = ModelConfig(**{**vars(TINY), "class_dropout": 0.0})
    weights = weights_of(network)
    assert weights["y_embedder.embedding_table.weight"].shape[0] == 10
    for said in ({"class_dropout_prob": 0}, {"num_classes": 10}):
        assert model_config({"semantic_chans": 2, "repa_depth": 2} | said, weights) == network
    with pytest.raises(ValueError, match="says num_classes = 9"):
        model_config({"semantic_chans": 2, "num_classes": 9, "class_dropout_prob": 0}, weights)
    tree = changed("sample", autoguidance=False, cfg_scale=2.0)
    tree["model"]["class_dropout_prob"] = 0
    with pytest.raises(ValueError, match="guidance mode 'cfg' needs a null class"):
        read_config(tree)


def test_settings_of_lightningdit_have_counterparts():
    tree = changed("train", weight_init="pretrained.pt")
    tree["data"]["valid_path"] = "held/out"
    tree["model"]["use_checkpoint"] = True
    config, ignored = read_config(tree)
    assert config.train.init_from == "pretrained.pt" and config.train.checkpoint_activations == 1.0
    assert config.data.validation_path == "held/out"
    assert config.run.eval_images == 50_000 and config.run.eval_reference.endswith("labeled.npz")
    assert not {"train.weight_init", "data.valid_path", "model.use_checkpoint"} & {i.split(" = ")[0] for i in ignored}
    del tree["train"]["weight_init"]
    tree["train"]["load_ckpt"] = "other.pt"
    assert read_config(tree).config.train.init_from == "other.pt"


def test_guidance_of_three_channels_is_said_to_be_of_all():
    """docs/METHOD.md 5: LightningDiT's own configurations apply CFG to the first three channels only."""
    tree = changed("sample", autoguidance=False, cfg_scale=2.0)
    assert not any("three channels" in line for line in read_config(tree).ignored)
    del tree["model"]["semantic_chans"], tree["model"]["semfirst_delta_t"]
    assert any("three channels" in line for line in read_config(tree).ignored)


def test_options_of_sampling():
    (options, ignored) = sample_settings(changed("sample", class_label=207))
    assert options == {
        "model": "outputs/train/sfd_xl/checkpoints/4000000.pt", "num_images": 50_000, "labels": [207],
        "micro_batch_size": 4, "seed": 3, "solver": "dopri5", "num_inference_steps": 249, "time_grid": "released",
        "timestep_shift": 1.0, "atol": 1e-6, "rtol": 1e-3, "guidance_mode": "autoguidance", "guidance_scale": 1.5,
        "interval_start": 0.2, "interval_mode": "both",
    }  # fmt: skip
    assert {line.split(" = ")[0] for line in ignored} == {"vae.model_name", "sample.autoguidance_config"}
    SampleConfig(**options)  # every name and value is one of `sfd sample`


def test_the_guide_is_the_model_of_the_autoguidance_file(tmp_path):
    (tmp_path / "b.yaml").write_text("ckpt_path: outputs/b/0070000.pt\n")
    options, ignored = sample_settings(changed("sample", autoguidance_config=str(tmp_path / "b.yaml")))
    assert options["guide"] == "outputs/b/0070000.pt"
    assert not any("autoguidance_config" in line for line in ignored)
