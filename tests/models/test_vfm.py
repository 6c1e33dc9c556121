"""Features equal what transformers itself computes from the same preprocessed pixels."""

import contextlib
import json
import time

import numpy as np
import pytest
import torch
import transformers
from harness.image_trees import photographs
from harness.tiny_encoders import save, save_dinov2
from safetensors.torch import load_file, save_file

from sfd_fast.data.images.decode import square, to_tensor
from sfd_fast.evaluation.features import DinoV2Features
from sfd_fast.models.vfm import NAMES, load_vfm

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def real_images(size=64):
    return torch.stack([to_tensor(square(image, size)) for image in photographs().values()])


def small(kind, **more):
    base = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 16
    }  # fmt: skip
    return kind(**base, **more)


ENCODERS = {
    "dinov2": lambda p: save_dinov2(p),
    "mae": lambda p: save(transformers.ViTMAEModel, small(transformers.ViTMAEConfig, image_size=64), p),
    "clip": lambda p: save(transformers.CLIPVisionModel, small(transformers.CLIPVisionConfig, image_size=64), p),
    "siglip": lambda p: save(transformers.SiglipVisionModel, small(transformers.SiglipVisionConfig, image_size=64), p),
}


def own_features(kind, folder, pixels):
    """Patch tokens by plain calls to transformers."""
    with torch.no_grad():
        if kind == "dinov2":
            model = transformers.Dinov2WithRegistersModel.from_pretrained(folder)
            return model(pixels).last_hidden_state[:, 5:]
        if kind == "mae":
            # the same weights as a plain ViT run: embedding without masking, blocks, LayerNorm
            model = transformers.ViTMAEModel.from_pretrained(folder, mask_ratio=0.0)
            out = model(pixels, noise=torch.linspace(0, 1, 16).repeat(len(pixels), 1))
            return out.last_hidden_state[:, 1:]
        if kind == "clip":
            return transformers.CLIPVisionModel.from_pretrained(folder)(pixels).last_hidden_state[:, 1:]
        return transformers.SiglipVisionModel.from_pretrained(folder)(pixels).last_hidden_state


NORMALISATION = {
    "dinov2": IMAGENET, "mae": IMAGENET, "siglip": ([0.5] * 3, [0.5] * 3),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_are_the_librarys_own(tmp_path, kind):
    folder = ENCODERS[kind](tmp_path)
    images = real_images()
    mean, std = (np.array(v, np.float32) for v in NORMALISATION[kind])
    pixels = torch.from_numpy((images.numpy().astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    resolution = 56 if kind == "dinov2" else 64
    if kind == "dinov2":
        pixels = torch.nn.functional.interpolate(pixels, (56, 56), mode="bicubic")
    vfm = load_vfm(folder, grid_size=4)
    assert vfm.resolution == resolution
    features = vfm.features(images)
    assert features.shape == (3, 16, vfm.width) and vfm.width == 24
    torch.testing.assert_close(features, own_features(kind, folder, pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mae", "clip", "siglip"])
def test_another_grid_interpolates_positions(tmp_path, kind):
    vfm = load_vfm(ENCODERS[kind](tmp_path), grid_size=3)
    assert vfm.features(real_images()).shape == (3, 9, 24)


def test_tokens_run_row_by_row(tmp_path):
    vfm = load_vfm(ENCODERS["mae"](tmp_path), grid_size=4)
    images = real_images()
    changed = images.clone()
    changed[:, 16:32, 48:64] = 255 - changed[:, 16:32, 48:64]  # row 1, column 3: token 7
    difference = (vfm.features(changed) - vfm.features(images)).abs().sum(dim=(0, 2))
    assert difference.argmax() == 7


def test_float_images_in_0_1_are_the_same_as_uint8(tmp_path):
    vfm = load_vfm(save_dinov2(tmp_path), grid_size=4)
    images = real_images()
    torch.testing.assert_close(vfm.features(images.permute(0, 3, 1, 2) / 255), vfm.features(images))


def test_an_encoder_is_frozen(tmp_path):
    vfm = load_vfm(save_dinov2(tmp_path), grid_size=4)
    assert not any(parameter.requires_grad for parameter in vfm.parameters())
    assert not vfm.model.training
    assert torch.equal(vfm.features(real_images()), vfm.features(real_images()))


def test_a_local_directory_makes_no_network_attempt(tmp_path, monkeypatch):
    import socket

    folder = save_dinov2(tmp_path)
    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("network attempt"))
    load_vfm(folder, grid_size=4)


def test_mistakes_are_clear(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere is no directory.*dinov2-b"):
        load_vfm(tmp_path / "nowhere")
    bert = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    save(transformers.BertModel, bert, tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert; vision encoders supported: dinov2_with_registers"):
        load_vfm(tmp_path / "bert")
    vfm = load_vfm(save_dinov2(tmp_path / "dino"), grid_size=4)
    with pytest.raises(ValueError, match=r"images \(1, 3, 64, 64\), torch.uint8: give uint8 \(B, H, W, 3\) or"):
        vfm.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_the_released_encoder_has_a_short_name():
    assert NAMES["dinov2-b"] == "facebook/dinov2-with-registers-base"


def changed_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change == "layers missing":
        tensors = {key: value for key, value in tensors.items() if ".layer.1." not in key}
    elif change == "prefixed":
        tensors = {f"module.{key}": value for key, value in tensors.items()}
    elif change == "another shape":
        tensors["layernorm.weight"] = torch.ones(7)
    elif change == "further layers":
        tensors |= {key.replace(".1.", ".2."): value.clone() for key, value in tensors.items() if ".layer.1." in key}
    elif change == "nan":
        tensors["layernorm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        ("layers missing", r"lacks \d+ weights of its Dinov2WithRegistersModel, the first is 'encoder.layer.1"),
        ("prefixed", r"lacks \d+ weights of its Dinov2WithRegistersModel"),
        ("another shape", "has in another shape 1 weights .* the first is 'layernorm.weight'"),
        ("further layers", r"has beyond its config \d+ weights .* the first is 'encoder.layer.2"),
        ("nan", "hold NaN or infinity .first in 'layernorm.weight'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line_and_not_filled_with_random_numbers(
    tmp_path, change, message, capfd
):
    folder = changed_weights(save_dinov2(tmp_path), change)
    with pytest.raises(ValueError, match=message) as error:
        load_vfm(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert "REPORT" not in capfd.readouterr().err


def test_evaluation_refuses_weights_that_do_not_fit(tmp_path):
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70)
    folder = changed_weights(save(transformers.Dinov2Model, config, tmp_path), "layers missing")
    with pytest.raises(ValueError, match=r"lacks \d+ weights of its Dinov2Model"):
        DinoV2Features(str(folder))


def test_decoders_and_text_towers_of_whole_models_are_left_aside(tmp_path):
    mae = small(transformers.ViTMAEConfig, image_size=64, decoder_hidden_size=16, decoder_num_attention_heads=2,
                decoder_num_hidden_layers=1, decoder_intermediate_size=16)  # fmt: skip
    save(transformers.ViTMAEForPreTraining, mae, tmp_path / "mae")
    small_text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                  "vocab_size": 9}  # fmt: skip
    vision = small(transformers.CLIPVisionConfig, image_size=64).to_dict()
    clip = transformers.CLIPConfig(text_config=small_text, vision_config=vision)
    save(transformers.CLIPModel, clip, tmp_path / "clip")
    for kind in ("mae", "clip"):
        assert load_vfm(tmp_path / kind, grid_size=4).features(real_images()).shape == (3, 16, 24)


def test_no_code_from_a_models_folder_runs_and_nobody_is_asked(tmp_path, monkeypatch):
    folder = save_dinov2(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    for more in ({}, {"model_type": "unheard-of"}):
        auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto} | more))
        if not more:
            assert load_vfm(folder, grid_size=4).width == 24
        else:
            with pytest.raises(ValueError, match="is a unheard-of; vision encoders supported"):
                load_vfm(folder, grid_size=4)
        with pytest.raises(ValueError) if more else contextlib.nullcontext():
            DinoV2Features(str(folder))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '"text"', "{}", "[" * 100_000, '{"a":' * 100_000, "\x00\xff", '{"model_type": 7}',
     '{"model_type": "dinov2_with_registers", "num_hidden_layers": 1000000000}',
     '{"model_type": "dinov2_with_registers", "hidden_size": 1099511627776}',
     '{"model_type": "dinov2_with_registers", "hidden_size": "wide"}',
     '{"model_type": "dinov2_with_registers", "hidden_size": -24}',
     '{"model_type": "dinov2_with_registers", "patch_size": 0}',
     '{"model_type": "dinov2_with_registers", "hidden_size": 1000000, "intermediate_size": 1000000}'],
)  # fmt: skip
def test_malformed_configs_are_one_line_at_once(tmp_path, content):
    folder = save_dinov2(tmp_path)
    (folder / "config.json").write_text(content)
    begun = time.monotonic()
    for load in (load_vfm, DinoV2Features):
        with pytest.raises(ValueError, match=str(folder)) as error:
            load(str(folder))
        assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_bit(tmp_path, dtype):
    folder, images = save_dinov2(tmp_path), real_images()
    expected = load_vfm(folder, grid_size=4).features(images)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(load_vfm(folder, grid_size=4).features(images), expected)
    finally:
        torch.set_default_dtype(before)
