"""Files of models that are malformed, but can be parsed: one line that names the file, at once."""

import json
import pickle
import struct
import time
from collections import OrderedDict

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sfd_fast.config import ModelConfig, SemVAEConfig, TextureConfig
from sfd_fast.formats.marked_folder import MARK
from sfd_fast.formats.model_folder import read_config, read_statistics, save_model
from sfd_fast.formats.released_model import convert_released, load_model, load_released, load_semvae
from sfd_fast.formats.texture import load_codec, save_codec, to_ldm
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.semvae import SemVAE
from sfd_fast.models.texture import IdentityCodec, TextureCodec

TINY = ModelConfig(
    hidden_size=32, depth=2, num_heads=2, grid_size=4, texture_channels=3, semantic_channels=2, num_classes=10,
    repa_channels=8, repa_depth=1, repa_hidden=16,
)  # fmt: skip
CONFIG = {"model": {"semantic_chans": 2, "semfirst_delta_t": 0.3}}
SMALL_CODEC = TextureConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4)


def refused(path, load, message=""):
    """Loading raises a ValueError of one line that names the file, within seconds."""
    begun = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        load()
    assert path.name in str(error.value) and "\n" not in str(error.value), error.value
    assert time.monotonic() - begun < 20


def described(folder, change):
    """A folder of ours with another description in its weights, and without the mark that would notice."""
    from safetensors import safe_open

    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["sfd_fast"])
    text = change(description)
    save_file(load_file(path), path, {"sfd_fast": text if isinstance(text, str) else json.dumps(description)})
    (folder / MARK).unlink()
    return folder


def put(*keys, value):
    def change(description):
        place = description
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda d: "[]", lambda d: "7", lambda d: "[" * 100_000, lambda d: "{", lambda d: '{"format": 1}',
        lambda d: '{"format": 1, "kind": "dit"}', put("config", value=None), put("config", value=[1]),
        put("config", "model", value=None), put("config", "model", "depth", value=10**9),
        put("config", "model", "depth", value="two"), put("config", "model", "depth", value=-1),
        put("config", "model", "hidden_size", value=10**15), put("config", "model", "grid_size", value=10**9),
        put("config", "model", "num_heads", value=0), put("config", "model", "unheard_of", value=1),
        put("config", "model", "num_classes", value=10**18), put("kind", value={}),
    ],
)  # fmt: skip
def test_descriptions_of_networks(tmp_path, change):
    save_model(tmp_path / "model", LightningDiT(TINY))
    folder = described(tmp_path / "model", change)
    refused(folder, lambda: load_model(folder))


@pytest.mark.parametrize(
    "change",
    [put("config", value=None), put("config", "encoder_depth", value=10**9), put("config", "num_layers", value=10**9),
     put("config", "architecture", value="giant"), put("config", "num_heads", value=7),
     put("config", "latent_channels", value=10**12)],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["transformer", "mlp"])
def test_descriptions_of_semvaes(tmp_path, change, architecture):
    config = SemVAEConfig(
        architecture, feature_channels=24, hidden_size=48, latent_channels=4, encoder_depth=1, decoder_depth=1
    )
    save_model(tmp_path / "model", SemVAE(config))
    folder = described(tmp_path / "model", change)
    refused(folder, lambda: load_semvae(folder))


@pytest.mark.parametrize(
    "change",
    [put("config", value=None), put("config", "latent_channels", value="four"), put("config", "downsampling", value=0),
     put("config", "downsampling", value=[1]), put("config", "more", value=1)],
)  # fmt: skip
def test_descriptions_of_codecs(tmp_path, change):
    save_codec(tmp_path / "codec", IdentityCodec(4, 2))
    folder = described(tmp_path / "codec", change)
    refused(folder, lambda: load_codec(folder))


@pytest.mark.parametrize(
    "change", [put("config", "train", value={"seed": "one"}), put("statistics", value={"texture_mean": [0.0]}),
               put("statistics", value=[1]), put("config", value={"optimizer": 3})]
)  # fmt: skip
def test_descriptions_of_runs_and_statistics(tmp_path, change):
    save_model(tmp_path / "model", LightningDiT(TINY))
    folder = described(tmp_path / "model", change)

    def read():
        read_config(folder)
        read_statistics(folder)

    refused(folder, read)


def changed_weights(tmp_path, name, change, suffix=".safetensors"):
    """A released file whose weights were changed: dit, semvae or codec."""
    weights = {
        "dit": lambda: LightningDiT(TINY).state_dict(),
        "semvae": lambda: SemVAE(SemVAEConfig(feature_channels=24, hidden_size=48, latent_channels=4)).state_dict(),
        "codec": lambda: to_ldm(TextureCodec(SMALL_CODEC).autoencoder.state_dict(), SMALL_CODEC),
    }[name]()
    weights = {key: value.clone() for key, value in weights.items()}
    change(weights)
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"ema": OrderedDict(weights), "config": CONFIG}, path)
    return path


DIT_CHANGES = {
    "flat": lambda w: w.update({"x_embedder.proj.weight": torch.zeros(3)}),
    "scalar": lambda w: w.update({"pos_embed": torch.tensor(1.0)}),
    "empty": lambda w: w.update({"x_embedder.proj.weight": torch.zeros(0, 5, 1, 1)}),
    "no heads": lambda w: w.update({"feat_rope.freqs_cos": torch.zeros(16, 0)}),
    "far block": lambda w: w.update({"blocks.1000000000.norm1.weight": torch.zeros(2)}),
    "block without number": lambda w: w.update({"blocks.first.norm1.weight": torch.zeros(2)}),
    "block without end": lambda w: w.update({"blocks.": torch.zeros(2)}),
    "flat head": lambda w: w.update({"repa_projector.4.weight": torch.zeros(2)}),
    "another shape": lambda w: w.update({"final_layer.linear.weight": torch.zeros(2)}),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("change", DIT_CHANGES.values(), ids=DIT_CHANGES)
def test_weights_of_networks(tmp_path, change, suffix):
    path = changed_weights(tmp_path, "dit", change, suffix)
    refused(path, lambda: load_released(path, CONFIG))
    refused(path, lambda: convert_released(path, tmp_path / "out", config=CONFIG))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.update({"encoder.0.weight": torch.zeros(3)}),
        lambda w: w.pop("encoder.0.weight"),
        lambda w: w.update({"decoder.x.weight": torch.zeros(2, 2)}),
        lambda w: w.update({"encoder.1000000000.mlp.0.weight": torch.zeros(2, 2)}),
        lambda w: [w.pop(key) for key in list(w) if key.startswith("decoder")],
    ],
)
def test_weights_of_semvaes(tmp_path, change):
    path = changed_weights(tmp_path, "semvae", change)
    refused(path, lambda: load_semvae(path, {"num_heads": 6}))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.update({"encoder.conv_in.weight": torch.tensor(1.0)}),
        lambda w: w.update({"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}),
        lambda w: w.update({"encoder.down.1000000000.block.0.conv2.weight": torch.zeros(2)}),
        lambda w: w.update({"encoder.down.0.block.1000000000.conv2.weight": torch.zeros(2)}),
        lambda w: w.update({"post_quant_conv.weight": torch.zeros(3)}),
        lambda w: [w.pop(key) for key in list(w) if key.startswith("encoder.down")],
    ],
)
def test_weights_of_codecs(tmp_path, change):
    path = changed_weights(tmp_path, "codec", change)
    refused(path, lambda: load_codec(path))


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**15]}},
        {"w": {"dtype": "F32", "shape": [0, 10**17], "data_offsets": [0, 0]}},
        {"w": {"dtype": "complex", "shape": [1], "data_offsets": [0, 4]}},
        {"w": [1]},
        {"__metadata__": {"sfd_fast": 7}},
        [],
    ],
    ids=["huge", "overflow", "negative", "far", "huge and empty", "dtype", "list", "metadata", "no object"],
)
def test_headers_of_safetensors(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    for load in (load_released, load_codec, lambda path: load_semvae(path, {"num_heads": 6})):
        refused(path, lambda load=load: load(path))


def semvae_file(path, config):
    weights = SemVAE(SemVAEConfig(feature_channels=24, hidden_size=48, latent_channels=4)).state_dict()
    torch.save({"model_state_dict": weights, "iteration": 1, "config": config}, path)
    return path


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "[" * 10_000, "{a: " * 10_000, "a: &a [*a]", "!!python/object/apply:os.system ['true']", "\x00", "- 1", "7",
     "model: {params: {transformer_heads: six}}", "model: {params: {transformer_heads: 7}}",
     "model: {params: {transformer_heads: 1.0e+300}}", "transformer_heads: 6\ntraining: {loss: {kl_weight: much}}"],
)  # fmt: skip
def test_yaml_text_inside_a_semvae_checkpoint(tmp_path, text):
    path = semvae_file(tmp_path / "semvae.pt", text)
    refused(path, lambda: load_semvae(path))
    refused(path, lambda: convert_released(path, tmp_path / "out"))


def test_settings_of_a_checkpoint_that_are_deep_or_no_settings(tmp_path):
    deep: dict = {"num_heads": 6}
    for _ in range(100):
        deep = {"model": deep}
    path = semvae_file(tmp_path / "deep.pt", deep)
    load_semvae(path)  # looked for at every depth
    for config in (7, [1], (), b"bytes"):
        path = semvae_file(tmp_path / "odd.pt", config)
        refused(path, lambda path=path: load_semvae(path))


def test_trees_that_are_no_checkpoints(tmp_path):
    for tree in ({}, {1: 2}, {"ema": {}}, {"ema": {"w": [1]}}, {"ema": None, "model": 3}, {"config": {}}):
        path = tmp_path / "odd.pt"
        torch.save(tree, path)
        for load in (load_released, load_codec, load_semvae):
            refused(path, lambda load=load, path=path: load(path))
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(path, lambda: load_released(path))


def test_yaml_settings_beside_a_file(tmp_path):
    path = changed_weights(tmp_path, "dit", lambda w: None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    load_released(path, tmp_path / "run.yaml")
    for text in (BOMB, "[1]", "model: 3", "model: {semantic_chans: many}", "model: {semantic_chans: -1}", "{"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ValueError) as error:
            load_released(path, tmp_path / "run.yaml")
        assert "\n" not in str(error.value)
