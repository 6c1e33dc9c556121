"""SemVAE: equality with the released network, its variants, PCA against scikit-learn, the loss."""

import pytest
import torch
from harness.support import load_golden
from sklearn.decomposition import PCA as ReferencePCA
from torch.distributions import Normal, kl_divergence

from sfd_fast.config import SemVAEConfig
from sfd_fast.diffusion.posterior import sample_posterior
from sfd_fast.models import semvae
from sfd_fast.models.semvae import SemVAE, semvae_loss

GOLDEN_CONFIG = SemVAEConfig(
    feature_channels=24, hidden_size=48, num_heads=6, encoder_depth=2, decoder_depth=2, latent_channels=4
)
ARCHITECTURES = ["transformer", "linear", "mlp", "resnet"]


def variant(architecture, **changes):
    return SemVAEConfig(**{**vars(GOLDEN_CONFIG), "architecture": architecture, "num_layers": 3, **changes})


@pytest.fixture
def golden_semvae():
    model = SemVAE(GOLDEN_CONFIG)
    model.load_state_dict(load_golden("semvae.weights"))
    return model, load_golden("semvae.golden")


@pytest.mark.golden
def test_encoder_and_decoder_equal_the_released_ones(golden_semvae):
    model, tensors = golden_semvae
    mean, logvar = model.encode(tensors["features"])
    torch.testing.assert_close(mean, tensors["mean"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logvar, tensors["logvar"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(tensors["mean"]), tensors["decode_mean"], rtol=1e-4, atol=1e-5)
    kl = semvae.kl_divergence(tensors["mean"], tensors["logvar"])
    torch.testing.assert_close(kl, tensors["kl_per_sample"], rtol=1e-4, atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("kl_weight, suffix, prefix", [(1e-7, "kl1e-7", "grad."), (1e-2, "kl1e-2", "grad_kl1e-2.")])
def test_loss_and_all_gradients_equal_the_golden_ones(golden_semvae, kl_weight, suffix, prefix):
    model, tensors = golden_semvae
    reconstruction, mean, logvar = model(tensors["features"])
    total, terms = semvae_loss(reconstruction, tensors["features"], mean, logvar, kl_weight=kl_weight)
    total.backward()
    for value, key in ((terms["mse"].mean(), "mse"), (terms["cosine"].mean(), "cosine"), (total, f"total_{suffix}")):
        torch.testing.assert_close(value, tensors[key], rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, tensors[prefix + name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.golden
def test_layout_is_the_released_one():
    released, ours = load_golden("semvae.weights"), SemVAE(GOLDEN_CONFIG).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in released.items()}


def test_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = semvae.SelfAttention(24, 6), torch.nn.MultiheadAttention(24, 6, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 16, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-5, atol=1e-6)


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        model = SemVAE(SemVAEConfig())
    assert sum(p.numel() for p in model.encoder.parameters()) / 1e6 == pytest.approx(28.97, abs=0.005)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(57.92, abs=0.005)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_reconstructs_better_after_training(architecture):
    torch.manual_seed(0)
    model = SemVAE(variant(architecture))
    features = torch.randn(8, 16, 3) @ torch.randn(3, 24)  # of rank 3, below the 4 latent channels
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(150):
        reconstruction, mean, logvar = model(features)
        loss = semvae_loss(reconstruction, features, mean, logvar, kl_weight=0.0)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "pca"])
def test_shapes_of_every_variant(architecture):
    model = SemVAE(variant(architecture))
    reconstruction, mean, logvar = model(torch.randn(2, 9, 24), torch.randn(2, 9, 4))
    assert reconstruction.shape == (2, 9, 24)
    assert mean.shape == logvar.shape == (2, 9, 4)
    assert logvar.min() >= -30 and logvar.max() <= 20


def test_logvar_is_clamped():
    model = SemVAE(variant("linear"))
    with torch.no_grad():
        model.encoder[0].bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 0.0])
        model.encoder[0].weight.zero_()
    _, logvar = model.encode(torch.randn(1, 2, 24))
    assert logvar[0, 0].tolist() == [-30.0, 20.0, 0.0, 0.0]


def test_posterior_is_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = SemVAE(GOLDEN_CONFIG).encode(torch.randn(1, 4, 24))
    assert mean.dtype == logvar.dtype == torch.float32


def test_sample_is_mean_plus_std_times_noise():
    mean, logvar, noise = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 2.0]), torch.tensor([0.5, -1.0])
    expected = Normal(mean, (logvar / 2).exp()).icdf(Normal(0.0, 1.0).cdf(noise))
    torch.testing.assert_close(sample_posterior(mean, logvar, noise), expected)


def test_kl_equals_that_of_torch_distributions():
    mean, logvar = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(semvae.kl_divergence(mean, logvar), expected)


def test_pca_equals_scikit_learn_in_one_pass_over_batches():
    torch.manual_seed(0)
    features = torch.randn(40, 9, 24) * torch.linspace(3, 0.1, 24) + torch.arange(24.0)
    model = SemVAE(variant("pca"))
    model.pca.fit(features.split(7))
    reference = ReferencePCA(4, svd_solver="full").fit(features.reshape(-1, 24).numpy())
    mean, logvar = model.encode(features)
    projected = torch.from_numpy(reference.transform(features.reshape(-1, 24).numpy())).view(40, 9, 4)
    signs = (mean * projected).sum((0, 1)).sign()
    torch.testing.assert_close(mean, (projected * signs).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.decode(mean).reshape(-1, 24),
        torch.from_numpy(reference.inverse_transform(projected.reshape(-1, 4).numpy())).float(),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    assert (logvar == -30).all()


def test_pca_does_not_depend_on_how_the_data_are_batched():
    features = torch.randn(30, 4, 24) * torch.linspace(3, 0.1, 24)
    fitted = []
    for size in (30, 7):
        model = SemVAE(variant("pca"))
        model.pca.fit(features.split(size))
        fitted.append(model.pca.components)
    torch.testing.assert_close(*fitted, rtol=1e-5, atol=1e-6)


def test_pca_without_features_is_refused():
    with pytest.raises(ValueError, match="needs features to fit"):
        SemVAE(variant("pca")).pca.fit([])


def test_features_and_latents_of_another_width_are_refused():
    model = SemVAE(GOLDEN_CONFIG)
    with pytest.raises(ValueError, match=r"features of shape \(2, 16, 25\) were given; this SemVAE takes \(B, N, 24\)"):
        model.encode(torch.randn(2, 16, 25))
    with pytest.raises(ValueError, match=r"latents of shape \(2, 4\) were given; this SemVAE takes \(B, N, 4\)"):
        model.decode(torch.randn(2, 4))


def test_the_cosine_along_tokens_is_that_of_the_released_script():
    """docs/METHOD.md 2: torch's cosine_similarity with its default axis, which is the tokens."""
    reconstruction, features = torch.randn(3, 9, 24), torch.randn(3, 9, 24)
    mean = logvar = torch.zeros(3, 9, 4)
    _, terms = semvae_loss(reconstruction, features, mean, logvar, kl_weight=0.0, cosine_axis="tokens")
    expected = 1 - torch.nn.functional.cosine_similarity(reconstruction, features).mean()
    torch.testing.assert_close(terms["cosine"].mean(), expected)
    _, paper = semvae_loss(reconstruction, features, mean, logvar, kl_weight=0.0)
    assert abs(paper["cosine"].mean() - expected) > 1e-4
