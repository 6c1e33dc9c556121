"""The torch engine on CUDA against the CPU: the same steps from the same weights; nothing in a step waits."""

import pytest
import torch
from harness.tiny_run import MODEL

from sfd_fast.config import OptimizerConfig, SFDConfig, TrainConfig
from sfd_fast.diffusion.transport import training_loss
from sfd_fast.models.dit import LightningDiT
from sfd_fast.training.engines.torch import TorchEngine

pytestmark = pytest.mark.gpu
BATCH, STEPS = 8, 20


def batch(step):
    generator = torch.Generator().manual_seed(step)
    side = MODEL.grid_size // MODEL.patch_size
    return {
        "latents": torch.randn(BATCH, MODEL.channels, MODEL.grid_size, MODEL.grid_size, generator=generator),
        "labels": torch.randint(MODEL.num_classes, (BATCH,), generator=generator),
        "sample_ids": torch.arange(step * BATCH, (step + 1) * BATCH),
        "features": torch.randn(BATCH, MODEL.repa_channels, side, side, generator=generator),
    }


def engine(device, precision):
    config = SFDConfig(
        model=MODEL,
        optimizer=OptimizerConfig(lr=1e-3, ema_decay=0.9, max_grad_norm=1.0),
        train=TrainConfig(global_batch_size=BATCH, precision=precision),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LightningDiT(MODEL)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return TorchEngine(
        model.train(), lambda network, b: training_loss(network, b, config, seed=3), optimizer=config.optimizer,
        train=config.train, device=torch.device(device),
    )  # fmt: skip


def train(device, precision):
    """(losses, gradient norms, averaged weights) of STEPS steps."""
    trainer = engine(device, precision)
    results = []
    for step in range(STEPS):
        moved = {name: value.to(device) for name, value in batch(step).items()}
        results.append(trainer.train_step([moved], 1e-3))
    losses, norms = (torch.stack([getattr(r, name) for r in results]).cpu() for name in ("loss", "grad_norm"))
    return losses, norms, trainer.export()


# fp32: sums in another order; 16 bits: 8 bits of mantissa, which twenty steps of AdamW carry on
@pytest.mark.parametrize(("precision", "rtol", "atol"), [("fp32", 1e-4, 1e-4), ("parity", 3e-2, 3e-2),
                                                         ("bf16", 3e-2, 3e-2)])  # fmt: skip
def test_steps_equal_those_on_the_cpu(precision, rtol, atol):
    found, expected = train("cuda", precision), train("cpu", precision)
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=10 * rtol, atol=0)
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=10 * rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("precision", ["fp32", "parity", "bf16"])
def test_a_step_waits_for_nothing(precision):
    trainer = engine("cuda", precision)
    batches = [{name: value.cuda() for name, value in batch(step).items()} for step in range(4)]
    for ready in batches[:3]:
        trainer.train_step([ready], 1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step([batches[3]], 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
