"""Whole models: the fused operators against `reference_only()`, plain PyTorch, on the same weights and data."""

import contextlib
from dataclasses import replace

import pytest
import sfd_kernels
import torch
from harness.tiny_run import MODEL

from sfd_fast.config import GuidanceConfig, OptimizerConfig, SamplerConfig, SFDConfig, TrainConfig
from sfd_fast.diffusion.transport import training_loss
from sfd_fast.models.dit import LightningDiT
from sfd_fast.sampling.guidance import autoguidance, bind_labels
from sfd_fast.sampling.sampler import sample
from sfd_fast.training.engines.torch import TorchEngine

BATCH = 8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FUSED = contextlib.nullcontext
REFERENCE = sfd_kernels.reference_only


def config(**model: object) -> SFDConfig:
    return SFDConfig(
        model=replace(MODEL, **model),
        optimizer=OptimizerConfig(lr=1e-3, ema_decay=0.9, max_grad_norm=1.0),
        train=TrainConfig(global_batch_size=BATCH, precision="fp32"),
    )


def network(settings: SFDConfig, device: str, seed: int = 0) -> LightningDiT:
    """Random everywhere: a fresh model's zero gates would hide its blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LightningDiT(settings.model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.to(device)


def batch(settings: SFDConfig, device: str, step: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    model, side = settings.model, settings.model.grid_size // settings.model.patch_size
    made = {
        "latents": torch.randn(BATCH, model.channels, model.grid_size, model.grid_size, generator=generator),
        "labels": torch.randint(model.num_classes, (BATCH,), generator=generator),
        "sample_ids": torch.arange(step * BATCH, (step + 1) * BATCH),
        "features": torch.randn(BATCH, model.repa_channels, side, side, generator=generator),
    }
    return {name: value.to(device) for name, value in made.items()}


def losses_and_gradients(settings: SFDConfig, device: str, mode, *, autocast: bool = False):
    model = network(settings, device).train()
    with mode(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        total, terms = training_loss(model, batch(settings, device), settings, seed=3)
        total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"total": total.detach()} | {k: v.detach() for k, v in terms.items()}, gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", [{}, {"use_shift": False}, {"use_qk_norm": False}, {"use_rope": False}])
def test_losses_and_every_gradient_agree_in_fp32(device, variant):
    settings = config(**variant)
    fused, reference = (losses_and_gradients(settings, device, mode) for mode in (FUSED, REFERENCE))
    for name, expected in reference[0].items():
        torch.testing.assert_close(fused[0][name], expected, rtol=1e-5, atol=1e-6)
    assert fused[1].keys() == reference[1].keys()
    for name, expected in reference[1].items():
        torch.testing.assert_close(fused[1][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("device", DEVICES)
def test_losses_and_gradients_agree_in_the_bf16_mix(device):
    """bf16 has 8 bits: losses to 1 %, each gradient to 5 % of its norm (measured: about 0.1 % and 2 %)."""
    settings = config()
    fused, reference = (losses_and_gradients(settings, device, mode, autocast=True) for mode in (FUSED, REFERENCE))
    for name, expected in reference[0].items():
        torch.testing.assert_close(fused[0][name], expected, rtol=1e-2, atol=1e-3)
    for name, expected in reference[1].items():
        difference = (fused[1][name] - expected).norm()
        assert difference <= 0.05 * expected.norm() + 1e-6, f"{name}: {difference / expected.norm():.3f}"


@pytest.mark.parametrize("device", DEVICES)
def test_fifty_training_steps_have_the_same_losses(device):
    settings = config()
    runs = []
    for mode in (FUSED, REFERENCE):
        with mode():
            engine = TorchEngine(
                network(settings, device),
                lambda model, b: training_loss(model, b, settings, seed=3),
                optimizer=settings.optimizer,
                train=settings.train,
                device=torch.device(device),
            )
            losses = [float(engine.train_step([batch(settings, device, step)], 1e-3).loss) for step in range(50)]
            runs.append((losses, engine.export()))
    torch.testing.assert_close(torch.tensor(runs[0][0]), torch.tensor(runs[1][0]), rtol=1e-4, atol=0)
    assert runs[0][0][-1] < runs[0][0][0]
    for name, expected in runs[1][1].items():
        torch.testing.assert_close(runs[0][1][name], expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "rk4"])
def test_sampling_trajectories_agree(device, solver):
    settings = config()
    main, guide = network(settings, device).eval(), network(settings, device, seed=1).eval()
    labels = torch.arange(BATCH, device=device) % settings.model.num_classes
    noise = torch.randn(BATCH, 4, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    paths = []
    for mode in (FUSED, REFERENCE):
        states = []
        with mode():
            velocity = autoguidance(
                bind_labels(main, labels), bind_labels(guide, labels), GuidanceConfig(mode="autoguidance", scale=1.5),
                num_texture_channels=2, delta_t=0.3,
            )  # fmt: skip
            sample(
                velocity, noise, delta_t=0.3, config=SamplerConfig(solver=solver, num_inference_steps=9),
                num_texture_channels=2,
                callback=lambda step, tau, x, states=states: states.append(x.clone()),
            )  # fmt: skip
        paths.append(torch.stack(states))
    assert len(paths[0]) == 9
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-4, atol=1e-5)


def test_the_reference_runs_no_fused_operator():
    """reference_only() turns the whole system into plain PyTorch: no sfd operator is dispatched."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.namespace)
            return function(*args, **(kwargs or {}))

    settings = config()
    found = []
    for mode in (FUSED, REFERENCE):
        seen: set[str] = set()
        model = network(settings, "cpu")
        with mode(), Names():
            training_loss(model, batch(settings, "cpu"), settings, seed=3)[0].backward()
        found.append({name for name in seen if name.startswith("sfd")})
    assert found == [{"sfd"}, set()]
