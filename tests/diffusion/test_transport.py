"""Clocks, masks, randomness by sample id and training losses."""

from dataclasses import replace

import pytest
import torch
from harness.support import GOLDEN, load_golden, load_golden_config
from scipy import stats

from sfd_fast.config import ModelConfig, SFDConfig, TransportConfig
from sfd_fast.diffusion import random_numbers, transport

TINY = ModelConfig(
    hidden_size=16, depth=1, num_heads=2, grid_size=4, texture_channels=3, semantic_channels=2, num_classes=10,
    repa_channels=6, repa_depth=1, repa_hidden=8,
)  # fmt: skip
MODELS = ["sfd", "sync", "noshift", "patch2"]


def golden_model(name):
    from sfd_fast.formats.released_model import load_released

    return load_released(GOLDEN / f"{name}.weights.safetensors", load_golden_config(name))


def golden_loss(name, model, **changes):
    tensors, config = load_golden(f"{name}.golden"), load_golden_config(name)
    delta_t = config["semfirst_delta_t"]
    return transport.loss(
        model,
        tensors["train.x1"],
        tensors["train.x0"],
        tensors["t"] * (1 + delta_t),
        tensors["y"],
        config=TransportConfig(delta_t=delta_t, **changes),
        num_texture_channels=config["in_channels"] - config["semantic_chans"],
        features=tensors["train.vfm_features"],
    )


class PointwiseModel(torch.nn.Module):
    """A differentiable stand-in whose output depends on nothing but the same sample: v = a x + t_tex + 2 t_sem +
    label."""

    def __init__(self, tokens=16, width=6):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.7))
        self.shape = (tokens, width)

    def forward(self, x, t_tex, t_sem, labels, return_features=False):
        rest = t_tex + 2 * t_sem + 0.1 * labels
        velocity = self.a * x + rest[:, None, None, None]
        features = (self.a * x).flatten(1)[:, :1, None].expand(-1, *self.shape) + torch.arange(self.shape[1])
        return (velocity, features) if return_features else velocity


def test_clocks_follow_the_formula_and_semantics_lead():
    tau = torch.tensor([0.0, 0.2, 0.3, 0.65, 1.0, 1.2, 1.3], dtype=torch.float64)
    t_tex, t_sem = transport.clocks(tau, 0.3)
    torch.testing.assert_close(t_tex, torch.tensor([0, 0, 0, 0.35, 0.7, 0.9, 1.0], dtype=torch.float64))
    torch.testing.assert_close(t_sem, torch.tensor([0, 0.2, 0.3, 0.65, 1, 1, 1], dtype=torch.float64))
    assert (t_sem >= t_tex).all()


def test_one_clock_when_delta_t_is_zero():
    tau = torch.linspace(0, 1, 11)
    t_tex, t_sem = transport.clocks(tau, 0.0)
    assert torch.equal(t_tex, tau)
    assert torch.equal(t_sem, tau)


def test_texture_channels_come_first():
    x = torch.arange(5.0).view(1, 5, 1, 1)
    texture, semantic = transport.split_latents(x, 3)
    assert texture.flatten().tolist() == [0, 1, 2]
    assert semantic.flatten().tolist() == [3, 4]
    assert torch.equal(transport.join_latents(texture, semantic), x)
    assert torch.equal(transport.split_latents(x, TINY)[0], texture)


@pytest.mark.parametrize(
    "start, end, delta_t, moves",
    [
        (0.0, 0.3, 0.3, (False, True)),
        (0.3, 1.0, 0.3, (True, True)),
        (1.0, 1.3, 0.3, (True, False)),
        (0.0, 1.0, 0.0, (True, True)),
        (0.0, 1.0, 1.0, (False, True)),
        (1.0, 2.0, 1.0, (True, False)),
    ],
)
def test_stage_mask_belongs_to_the_interval(start, end, delta_t, moves):
    assert transport.stage_mask(start, end, delta_t) == moves


def test_released_mask_belongs_to_the_time():
    assert transport.evaluation_mask(0.3, 0.3) == (True, True)
    assert transport.evaluation_mask(0.29, 0.3) == (False, True)
    assert transport.evaluation_mask(1.01, 0.3) == (True, False)
    assert transport.evaluation_mask(1.01, 0.0) == (True, True)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_times_have_their_distribution(distribution):
    config = TransportConfig(delta_t=0.3, time_distribution=distribution)
    tau = transport.sample_tau(torch.arange(20_000), config, seed=3)
    assert tau.dtype == torch.float32
    assert tau.min() >= 0
    assert tau.max() <= 1.3
    u = tau.double().numpy() / 1.3
    reference = stats.uniform.cdf if distribution == "uniform" else lambda v: stats.norm.cdf(stats.logistic.ppf(v))
    assert stats.kstest(u, reference).pvalue > 0.01


def test_randomness_is_a_function_of_seed_and_sample_id_alone():
    config = TransportConfig()
    ids = torch.tensor([5, 2**40 + 1, 17])
    alone = torch.tensor([17])
    assert torch.equal(transport.sample_tau(ids, config, 1)[2:], transport.sample_tau(alone, config, 1))
    assert torch.equal(
        transport.noise(ids, (3, 4, 4), 1, random_numbers.TRAIN_NOISE)[2:],
        transport.noise(alone, (3, 4, 4), 1, random_numbers.TRAIN_NOISE),
    )
    assert not torch.equal(
        transport.noise(ids, (3, 4, 4), 1, random_numbers.TRAIN_NOISE),
        transport.noise(ids, (3, 4, 4), 2, random_numbers.TRAIN_NOISE),
    )


def test_noise_is_standard_normal():
    values = transport.noise(torch.arange(64), (3, 16, 16), 0, random_numbers.SAMPLE_NOISE)
    assert stats.kstest(values.flatten().numpy(), stats.norm.cdf).pvalue > 0.01


def test_streams_are_distinct_and_uncorrelated():
    numbers = [v for k, v in vars(random_numbers).items() if k.isupper()]
    assert len(numbers) == len(set(numbers)) >= 10
    ids = torch.arange(2000)
    a = transport.noise(ids, (1,), 0, random_numbers.TRAIN_NOISE)[:, 0]
    b = transport.noise(ids, (1,), 0, random_numbers.TRAIN_TIME)[:, 0]
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.1


def test_permutation_holds_every_index_once_and_depends_on_the_seed():
    order = random_numbers.permutation(1000, seed=4, stream=random_numbers.OUTPUT_ORDER)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order, random_numbers.permutation(1000, seed=5, stream=random_numbers.OUTPUT_ORDER))


def test_labels_drop_to_the_null_class_at_the_given_rate():
    ids, labels = torch.arange(20_000), torch.full((20_000,), 3)
    dropped = transport.drop_labels(labels, ids, probability=0.1, num_classes=10, seed=0)
    assert set(dropped.tolist()) == {3, 10}
    assert abs((dropped == 10).float().mean() - 0.1) < 0.01
    assert torch.equal(transport.drop_labels(labels, ids, probability=0.0, num_classes=10, seed=0), labels)


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_all_gradients_equal_the_released_code(name):
    tensors, model = load_golden(f"{name}.golden"), golden_model(name).eval()
    total, terms = golden_loss(name, model)
    for term in ("velocity", "cosine", "repa"):
        torch.testing.assert_close(terms[term], tensors[f"train.{term}_loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, tensors["train.total"], rtol=1e-4, atol=1e-5)
    total.backward()
    checked = 0
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, tensors[f"grad.{key}"], rtol=1e-3, atol=1e-6)
            checked += 1
    assert checked == sum(key.startswith("grad.") for key in tensors)


@pytest.mark.golden
@pytest.mark.parametrize("mode", ["mse", "cos_mse"])
@pytest.mark.parametrize("name", MODELS)
def test_other_repa_modes_equal_the_released_code(name, mode):
    with torch.no_grad():
        _, terms = golden_loss(name, golden_model(name).eval(), repa_mode=mode, repa_weight=0.5)
    expected = load_golden(f"{name}.golden")[f"train.repa_loss_{mode}_lambda0.5"]
    torch.testing.assert_close(terms["repa"], expected, rtol=1e-4, atol=1e-5)


def batch_of(ids, features=True):
    ids = torch.as_tensor(ids)
    made = {
        "latents": transport.noise(ids, (5, 4, 4), 9, random_numbers.TEXTURE_POSTERIOR),
        "labels": ids % 10,
        "sample_ids": ids,
    }
    if features:
        made["features"] = transport.noise(ids, (16, 6), 9, random_numbers.SEMANTIC_POSTERIOR)
    return made


def test_terms_are_independent_of_each_other():
    model, batch = PointwiseModel(), batch_of(range(4))
    everything = SFDConfig(model=TINY)
    _, full = transport.training_loss(model, batch, everything, seed=0)
    for velocity, cosine, repa in [(1, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1), (0, 1, 1)]:
        changes = replace(
            everything.transport, velocity_loss=bool(velocity), cosine_loss=bool(cosine), repa_weight=float(repa)
        )
        total, terms = transport.training_loss(model, batch, replace(everything, transport=changes), seed=0)
        wanted = [name for name, on in zip(("velocity", "cosine", "repa"), (velocity, cosine, repa)) if on]
        assert list(terms) == wanted
        for name in wanted:
            assert torch.equal(terms[name], full[name])
        torch.testing.assert_close(total, sum(full[name] for name in wanted).mean())


def test_repa_stays_when_the_cosine_loss_is_off():
    changes = TransportConfig(cosine_loss=False)
    _, terms = transport.training_loss(
        PointwiseModel(), batch_of(range(3)), SFDConfig(model=TINY, transport=changes), seed=0
    )
    assert terms["repa"].requires_grad
    assert (terms["repa"] > 0).all()


def test_repa_without_features_is_an_error():
    with pytest.raises(ValueError, match=r"repa_weight is 1\.0 but the batch has no VFM features.*set transport"):
        transport.training_loss(PointwiseModel(), batch_of(range(3), features=False), SFDConfig(model=TINY), seed=0)


def test_repa_features_of_another_width_are_an_error():
    batch = batch_of(range(3))
    batch["features"] = batch["features"][..., :4]
    with pytest.raises(ValueError, match=r"\(3, 16, 6\) with VFM features \(3, 16, 4\)"):
        transport.training_loss(PointwiseModel(), batch, SFDConfig(model=TINY), seed=0)


def test_loss_of_a_sample_does_not_depend_on_its_batch():
    model, config = PointwiseModel(), SFDConfig(model=TINY)
    _, many = transport.training_loss(model, batch_of([3, 40, 7, 11]), config, seed=5)
    _, one = transport.training_loss(model, batch_of([7]), config, seed=5)
    for name in many:
        torch.testing.assert_close(many[name][2:3], one[name], rtol=1e-6, atol=0)


def test_validation_keeps_all_labels():
    seen = []

    def model(x, t_tex, t_sem, labels):
        seen.append(labels)
        return x

    config = SFDConfig(model=replace(TINY, class_dropout=0.9), transport=TransportConfig(repa_weight=0.0))
    batch = batch_of(range(50))
    transport.training_loss(model, batch, config, seed=0, drop=False)
    transport.training_loss(model, batch, config, seed=0)
    assert torch.equal(seen[0], batch["labels"])
    assert (seen[1] == 10).sum() > 30


def test_clamped_streams_contribute():
    x1, x0 = torch.ones(1, 5, 4, 4), torch.zeros(1, 5, 4, 4)
    prediction = torch.zeros(1, 5, 4, 4, requires_grad=True)
    transport.loss(
        lambda x, t_tex, t_sem, labels: prediction,
        x1,
        x0,
        torch.tensor([0.1]),  # t_tex = 0
        torch.tensor([0]),
        config=TransportConfig(repa_weight=0.0, cosine_loss=False),
        num_texture_channels=3,
    )[0].backward()
    assert (prediction.grad[:, :3] != 0).all()
    torch.testing.assert_close(prediction.grad[:, 3:], 2 * prediction.grad[:, :2])
