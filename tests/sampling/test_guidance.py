"""Guidance: golden values, intervals, and evaluations that make no difference."""

import pytest
import torch
from harness.support import GOLDEN, load_golden, load_golden_config

from sfd_fast.config import GuidanceConfig
from sfd_fast.sampling import guidance

MODELS = ["sfd", "sync", "noshift", "patch2"]


def golden_parts(name):
    from sfd_fast.formats.released_model import load_released

    config, tensors = load_golden_config(name), load_golden(f"{name}.golden")
    model = load_released(GOLDEN / f"{name}.weights.safetensors", config).eval()
    small = config | {"depth": 2, "repa_depth": 1}
    guide = load_released(GOLDEN / f"{name}.guide.weights.safetensors", small).eval()
    labels = tensors["y"]
    common = {
        "num_texture_channels": config["in_channels"] - config["semantic_chans"],
        "delta_t": config["semfirst_delta_t"],
    }
    return (
        tensors,
        guidance.bind_labels(model, labels),
        guidance.bind_null(model, labels, config["num_classes"]),
        guidance.bind_labels(guide, labels),
        common,
    )


def clocks_of(tensors, t_tex=None, t_sem=None):
    if t_tex is None:
        return (tensors["t_tex"], tensors["t_sem"]) if "t_tex" in tensors else (tensors["t"], tensors["t"])
    return torch.full((len(tensors["y"]),), t_tex), torch.full((len(tensors["y"]),), t_sem)


def constant(value):
    return lambda x, t_tex, t_sem: torch.full_like(x, value)


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cfg_and_autoguidance_equal_the_released_code(name):
    tensors, main, null, guide, common = golden_parts(name)
    x, times = tensors["x"], clocks_of(tensors)
    close = {"rtol": 1e-4, "atol": 1e-5}
    mixed = guidance.cfg(main, null, GuidanceConfig(mode="cfg", scale=2.5), **common)
    torch.testing.assert_close(mixed(x, *times), tensors["cfg_2.5"], **close)
    mixed = guidance.autoguidance(main, guide, GuidanceConfig(mode="autoguidance", scale=1.5), **common)
    torch.testing.assert_close(mixed(x, *times), tensors["autoguidance_1.5"], **close)
    if "autoguidance_sem1.8_tex1.3" in tensors:
        config = GuidanceConfig(mode="autoguidance", semantic_scale=1.8, texture_scale=1.3)
        mixed = guidance.autoguidance(main, guide, config, **common)
        torch.testing.assert_close(mixed(x, *times), tensors["autoguidance_sem1.8_tex1.3"], **close)


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_guidance_intervals_equal_the_released_code(name):
    tensors, main, null, _, common = golden_parts(name)
    times = clocks_of(tensors, 0.1, 0.3) if common["delta_t"] else clocks_of(tensors, 0.2, 0.2)
    compared = 0
    for key in tensors:
        if key.startswith("cfg_2.5_interval"):
            _, _, _, start, mode = key.split("_")
            config = GuidanceConfig(mode="cfg", scale=2.5, interval_start=float(start), interval_mode=mode)
            mixed = guidance.cfg(main, null, config, **common)
            torch.testing.assert_close(mixed(tensors["x"], *times), tensors[key], rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared == (6 if common["delta_t"] else 2)


def test_weight_one_never_evaluates_the_weak_velocity():
    main = constant(1.0)
    for build in (guidance.cfg, guidance.autoguidance):
        for config in (GuidanceConfig(), GuidanceConfig(mode="cfg", scale=1.0)):
            assert build(main, constant(float("nan")), config, num_texture_channels=1, delta_t=0.3) is main


def test_weights_are_strict_at_the_interval_start_and_use_each_streams_own_clock():
    config = GuidanceConfig(mode="cfg", scale=3.0, interval_start=0.25)
    t_tex, t_sem = torch.tensor([0.2, 0.25, 0.0]), torch.tensor([0.5, 0.55, 0.2])
    texture, semantic = guidance.stream_weights(t_tex, t_sem, config, 0.3)
    assert texture.tolist() == [1, 3, 1]
    assert semantic.tolist() == [3, 3, 1]


def test_one_clock_has_one_interval_whatever_the_mode():
    config = GuidanceConfig(mode="cfg", scale=3.0, interval_start=0.25, interval_mode="sem")
    time = torch.tensor([0.2])
    assert [w.item() for w in guidance.stream_weights(time, time, config, 0.0)] == [1, 1]
    assert [w.item() for w in guidance.stream_weights(time, time, config, 0.3)] == [3, 1]


def test_an_unguided_stream_keeps_the_bits_of_the_main_velocity():
    config = GuidanceConfig(mode="autoguidance", texture_scale=1.0, semantic_scale=2.0)
    x, t = torch.zeros(2, 3, 1, 1), torch.tensor([0.5, 0.5])
    mixed = guidance.autoguidance(constant(0.3), constant(float("nan")), config, num_texture_channels=2, delta_t=0.3)
    out = mixed(x, t, t)
    assert torch.equal(out[:, :2], torch.full((2, 2, 1, 1), 0.3))
    assert out[:, 2].isnan().all()


def test_each_sample_has_the_weight_of_its_own_time():
    config = GuidanceConfig(mode="cfg", scale=2.0, interval_start=0.5)
    t = torch.tensor([0.4, 0.6])
    mixed = guidance.cfg(constant(1.0), constant(0.0), config, num_texture_channels=1, delta_t=0.3)
    assert mixed(torch.zeros(2, 2, 1, 1), t, t).flatten(1).tolist() == [[1, 1], [2, 2]]


def test_separate_scales_with_one_clock_are_an_error():
    config = GuidanceConfig(mode="autoguidance", texture_scale=1.3, semantic_scale=1.8)
    with pytest.raises(ValueError, match=r"texture 1\.3, semantic 1\.8.*delta_t is 0"):
        guidance.autoguidance(constant(1.0), constant(0.0), config, num_texture_channels=1, delta_t=0.0)


def test_the_main_velocity_suffices_where_no_moving_stream_is_guided():
    config = GuidanceConfig(mode="autoguidance", texture_scale=1.0, semantic_scale=2.0, interval_start=0.2)
    main = constant(1.0)
    mixed = guidance.autoguidance(main, constant(0.0), config, num_texture_channels=1, delta_t=0.3)
    assert mixed.needed(torch.tensor(0.25), (False, True)) is mixed
    assert mixed.needed(torch.tensor(0.15), (False, True)) is main  # before the interval
    assert mixed.needed(torch.tensor(0.5), (True, True)) is mixed
    assert mixed.needed(torch.tensor(1.2), (True, False)) is main  # texture alone, of weight 1
