"""The released network's golden tensors on CUDA: forward, losses and all gradients in fp32, by our kernels."""

import pytest
import sfd_kernels
import torch
from harness.support import GOLDEN, load_golden, load_golden_config

from sfd_fast.formats.released_model import load_released

pytestmark = [pytest.mark.gpu, pytest.mark.golden]
MODELS = pytest.mark.parametrize("name", ["sfd", "sync", "noshift", "patch2"])


def golden_case(name):
    """(model, tensors of NAME.golden, clocks of the training tensors), all on CUDA."""
    config = load_golden_config(name)
    tensors = {key: value.cuda() for key, value in load_golden(f"{name}.golden").items()}
    model = load_released(GOLDEN / f"{name}.weights.safetensors", config).cuda()
    tau = tensors["t"] * (1 + config["semfirst_delta_t"])
    return model, tensors, (tau - config["semfirst_delta_t"]).clamp(min=0), tau.clamp(max=1)


@MODELS
def test_forward_equals_the_released_network(name):
    model, tensors, _, _ = golden_case(name)
    t_tex, t_sem = tensors.get("t_tex", tensors["t"]), tensors.get("t_sem", tensors["t"])
    velocity = model(tensors["x"], t_tex, t_sem, tensors["y"])
    torch.testing.assert_close(velocity, tensors["forward"], rtol=1e-4, atol=1e-5)


@MODELS
def test_losses_and_all_gradients_equal_the_released_ones(name):
    model, tensors, t_tex, t_sem = golden_case(name)
    model.train()
    x0, x1, count = tensors["train.x0"], tensors["train.x1"], model.config.texture_channels
    x = sfd_kernels.noise_latents(x1, x0, t_tex, t_sem, count)
    prediction, features = model(x, t_tex, t_sem, tensors["y"], return_features=True)
    velocity, cosine = sfd_kernels.flow_matching_loss(prediction, x0, x1, count, 2.0)
    target = tensors["train.vfm_features"].flatten(2).transpose(1, 2)
    mse, repa = sfd_kernels.feature_alignment_loss(features, target)
    total = velocity.mean() + cosine.mean() + repa.mean()
    total.backward()
    found = {"pred": prediction, "velocity_loss": velocity, "cosine_loss": cosine, "repa_loss": repa,
             "repa_loss_mse_lambda0.5": 0.5 * mse, "total": total}  # fmt: skip
    for key, value in found.items():
        expected = tensors[f"train.{key}"]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = tensors[f"grad.{key}"]
            torch.testing.assert_close(
                parameter.grad, expected, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )
