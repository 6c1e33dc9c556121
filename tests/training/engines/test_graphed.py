"""A whole step as a CUDA graph: what it reads stands still, its results do not, and it is refused where it cannot hold.

On a CPU a stand-in for the capture runs the recorded step again, which is what a replay does on the device.
"""

import pytest
import torch
from harness.tiny_run import MODEL

from sfd_fast.config import OptimizerConfig, SFDConfig, TrainConfig
from sfd_fast.diffusion.transport import training_loss
from sfd_fast.models.dit import LightningDiT
from sfd_fast.training.engines.graphed import WARM_UP_STEPS, GraphedStep, check_capturable
from sfd_fast.training.engines.interface import StepResult
from sfd_fast.training.engines.torch import TorchEngine

BATCH, STEPS, CPU = 4, 8, torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def batch(step, device, size=BATCH):
    generator = torch.Generator().manual_seed(step)
    side = MODEL.grid_size // MODEL.patch_size
    made = {
        "latents": torch.randn(size, MODEL.channels, MODEL.grid_size, MODEL.grid_size, generator=generator),
        "labels": torch.randint(MODEL.num_classes, (size,), generator=generator),
        "sample_ids": torch.arange(step * size, (step + 1) * size),
        "features": torch.randn(size, MODEL.repa_channels, side, side, generator=generator),
    }
    return {name: value.to(device) for name, value in made.items()}


def engine(device, precision="fp32"):
    config = SFDConfig(
        model=MODEL,
        optimizer=OptimizerConfig(lr=1e-3, ema_decay=0.9, max_grad_norm=1.0),
        train=TrainConfig(global_batch_size=BATCH, precision=precision),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LightningDiT(MODEL).train()
    return TorchEngine(
        model, lambda network, b: training_loss(network, b, config, seed=3), optimizer=config.optimizer,
        train=config.train, device=torch.device(device),
    )  # fmt: skip


class Recorder:
    """Stands in for the capture on a CPU: counts, and replays by running the step again."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, step):
        self.captures += 1

        def replay():
            self.replays += 1
            return step()

        return replay


def graphed(trainer, device, recorder):
    options = {"capture": recorder} if device == "cpu" else {}
    return GraphedStep(trainer.step, torch.device(device), **options)


def train(step, device):
    """(losses, norms) with a learning rate and a batch of its own at every step, each in two pieces."""
    found = []
    for number in range(STEPS):
        whole = batch(number, device)
        pieces = [{name: value[i : i + BATCH // 2] for name, value in whole.items()} for i in (0, BATCH // 2)]
        found.append(step(pieces, 1e-3 / (number + 1)))
    return torch.stack([r.loss for r in found]).cpu(), torch.stack([r.grad_norm for r in found]).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "parity", "bf16"])
def test_captured_steps_give_the_bits_of_eager_ones(device, precision):
    plain, whole, recorder = engine(device, precision), engine(device, precision), Recorder()
    step = graphed(whole, device, recorder)
    expected, found = train(plain.step, device), train(step, device)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)
    one, other = plain.export(), whole.export()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    if device == "cpu":
        assert (recorder.captures, recorder.replays) == (1, STEPS - WARM_UP_STEPS)


def test_a_step_reads_only_tensors_that_stand_still():
    seen = []

    def step(batches, lr):
        seen.append((lr.data_ptr(), *[value.data_ptr() for b in batches for value in b.values()], float(lr)))
        return StepResult(torch.zeros(()), [{}], torch.zeros(()), torch.zeros(()))

    run = GraphedStep(step, CPU, Recorder())
    for number in range(6):
        run([batch(number, "cpu")], 0.5 + number)
    assert len({addresses[:-1] for addresses in seen}) == 1
    assert [addresses[-1] for addresses in seen] == [0.5 + number for number in range(6)]


def test_results_outlive_the_next_replay():
    """The graph writes the same tensors at every replay."""
    static = StepResult(torch.zeros(()), [{"velocity": torch.zeros(2)}], torch.zeros(()), torch.zeros(()))

    def step(batches, lr):
        for value in (static.loss, static.terms[0]["velocity"], static.grad_norm, static.skipped):
            value.add_(1)
        return static

    run = GraphedStep(step, CPU, Recorder())
    results = [run([{"x": torch.zeros(1)}], 0.0) for _ in range(WARM_UP_STEPS + 2)][-2:]
    assert [float(r.loss) for r in results] == [4.0, 5.0]
    assert [r.terms[0]["velocity"].tolist() for r in results] == [[4.0, 4.0], [5.0, 5.0]]
    assert [float(r.grad_norm) for r in results] == [float(r.skipped) for r in results] == [4.0, 5.0]


def test_a_batch_of_another_shape_is_refused():
    run = graphed(engine("cpu"), "cpu", Recorder())
    run([batch(0, "cpu")], 1e-3)
    with pytest.raises(ValueError, match="batches of one shape"):
        run([batch(1, "cpu", size=2)], 1e-3)


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("adamw_ema", "cpu", "train.cuda_graph needs a CUDA device, and this run is on cpu"),
        ("torch_fused", "cuda", "needs optimizer.name 'adamw_ema'.*'torch_fused' takes them from the host"),
        ("apex", "cuda", "needs optimizer.name 'adamw_ema'"),
    ],
)
def test_it_is_refused_with_a_reason_where_it_cannot_hold(name, device, message):
    with pytest.raises(ValueError, match=message):
        check_capturable(OptimizerConfig(name=name), torch.device(device))
    check_capturable(OptimizerConfig(), torch.device("cuda"))


def test_deepspeed_and_a_graph_contradict():
    with pytest.raises(ValueError, match="train.cuda_graph needs train.engine 'torch'"):
        TrainConfig(cuda_graph=True, engine="deepspeed")


def test_a_run_on_a_cpu_with_it_says_why_not():
    config = TrainConfig(global_batch_size=BATCH, precision="fp32", cuda_graph=True)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        TorchEngine(LightningDiT(MODEL), None, optimizer=OptimizerConfig(), train=config, device=CPU)
