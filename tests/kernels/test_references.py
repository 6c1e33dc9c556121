"""References against closed forms, published test vectors and torch's own functions."""

import math

import pytest
import sfd_kernels
import torch
from harness.kernel_cases import example
from sfd_kernels.ops.philox import philox4x32
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def references():
    with sfd_kernels.reference_only():
        yield


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rms_norm_modulate_is_torch_rms_norm_with_an_affine_map_per_sample():
    x, weight, shift, scale = randn(2, 5, 8), randn(8, seed=1), randn(2, 8, seed=2), randn(2, 8, seed=3)
    norm = F.rms_norm(x, (8,), weight, 1e-6)
    ours = sfd_kernels.rms_norm_modulate(x, weight, shift, scale, 1e-6)
    torch.testing.assert_close(ours, norm * (1 + scale[:, None]) + shift[:, None])
    without = sfd_kernels.rms_norm_modulate(x, weight, None, scale, 1e-6)
    torch.testing.assert_close(without, norm * (1 + scale[:, None]))


def test_gated_residual_norm_modulate_returns_the_sum_and_its_modulated_norm():
    x, branch, gate = randn(2, 5, 8), randn(2, 5, 8, seed=1), randn(2, 8, seed=2)
    weight, shift, scale = randn(8, seed=3), randn(2, 8, seed=4), randn(2, 8, seed=5)
    x_new, y = sfd_kernels.gated_residual_norm_modulate(x, branch, gate, weight, shift, scale, 1e-6)
    total = torch.addcmul(x, gate[:, None].expand_as(x), branch)
    torch.testing.assert_close(x_new, total)
    torch.testing.assert_close(y, F.rms_norm(total, (8,), weight, 1e-6) * (1 + scale[:, None]) + shift[:, None])


def test_swiglu_gates_the_second_half_by_silu_of_the_first():
    x = randn(3, 4, 10)
    torch.testing.assert_close(sfd_kernels.swiglu(x), F.silu(x[..., :5]) * x[..., 5:])


def test_condition_joins_semantic_and_texture_clocks_in_this_order():
    sem, tex, label = randn(2, 3), randn(2, 3, seed=1), randn(2, 6, seed=2)
    ours = sfd_kernels.condition_silu(sem, tex, label)
    torch.testing.assert_close(ours[:, :3], F.silu(sem + label[:, :3]))
    torch.testing.assert_close(ours[:, 3:], F.silu(tex + label[:, 3:]))
    torch.testing.assert_close(sfd_kernels.condition_silu(label, None, label), F.silu(2 * label))


def test_timestep_features_are_cosines_then_sines_of_geometric_frequencies():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    ours = sfd_kernels.timestep_features(t, 4)
    expected = [[math.cos(v), math.cos(v / 100), math.sin(v), math.sin(v / 100)] for v in t.tolist()]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    assert sfd_kernels.timestep_features(t.float(), 256).dtype == torch.float32


def test_odd_number_of_timestep_features_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        sfd_kernels.timestep_features(torch.zeros(2), 5)


def test_qk_norm_rope_is_multiplication_of_complex_pairs():
    qkv, weight = randn(2, 5, 3, 2, 6), randn(6, seed=1)
    angles = randn(5, 3, seed=2)
    cos, sin = (f(angles).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin))
    q, k = sfd_kernels.qk_norm_rope(qkv, weight, weight, cos, sin, 1e-6)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    for ours, head in ((q, qkv[:, :, 0]), (k, qkv[:, :, 1])):
        normed = F.rms_norm(head, (6,), weight, 1e-6)
        turned = torch.view_as_complex(normed.unflatten(-1, (3, 2)).contiguous()) * turn
        torch.testing.assert_close(ours, torch.view_as_real(turned).flatten(-2))


def test_qk_norm_rope_without_weight_and_tables_passes_heads_through():
    qkv = randn(1, 2, 3, 2, 4)
    q, k = sfd_kernels.qk_norm_rope(qkv, None, None, None, None, 1e-6)
    assert torch.equal(q, qkv[:, :, 0]) and torch.equal(k, qkv[:, :, 1])


@pytest.mark.parametrize(
    "counter,key,expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    # Source: Random123 1.14, tests/kat_vectors, philox4x32 10
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(word.item() for word in words) == expected


def test_philox_bits_place_seed_stream_and_id_in_key_and_counter():
    seed, stream, sample_id = (7 << 32) + 3, 5, (11 << 32) + 2
    words = sfd_kernels.philox_bits(torch.tensor([sample_id]), seed, stream, 6)
    expected = []
    for block in (0, 1):
        expected += [w.item() for w in philox4x32(tuple(torch.tensor([c]) for c in (block, stream, 2, 11)), (3, 7))]
    assert words.tolist() == [expected[:6]]


def test_philox_normal_of_a_sample_does_not_depend_on_its_neighbours_or_on_count():
    ids = torch.tensor([4, 9, 2])
    many = sfd_kernels.philox_normal(ids, 1, 0, 40)
    assert torch.equal(sfd_kernels.philox_normal(ids[1:2], 1, 0, 40)[0], many[1])
    assert torch.equal(sfd_kernels.philox_normal(ids, 1, 0, 7), many[:, :7])
    assert not torch.equal(sfd_kernels.philox_normal(ids, 1, 1, 40), many)


def test_philox_normal_is_normal():
    normals = sfd_kernels.philox_normal(torch.arange(64), 0, 0, 4096).flatten().double().sort().values
    cdf = torch.special.ndtr(normals)
    steps = (torch.arange(cdf.numel()) + 0.5) / cdf.numel()
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand true samples
    assert (cdf - steps).abs().max() < 1.95 / math.sqrt(cdf.numel())


def test_noise_latents_is_noise_at_zero_and_data_at_one_for_each_stream():
    x1, x0 = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = sfd_kernels.noise_latents(x1, x0, t, 1 - t, 2)
    assert torch.equal(x[0, :2], x0[0, :2]) and torch.equal(x[0, 2:], x1[0, 2:])
    assert torch.equal(x[1, :2], x1[1, :2]) and torch.equal(x[1, 2:], x0[1, 2:])
    half = torch.full((2,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(sfd_kernels.noise_latents(x1, x0, half, half, 2), torch.lerp(x0, x1, 0.25))


def test_flow_matching_loss_weighs_semantic_channels_and_matches_torch_cosine():
    pred, x0, x1 = randn(2, 5, 3, 3), randn(2, 5, 3, 3, seed=1), randn(2, 5, 3, 3, seed=2)
    velocity, cosine = sfd_kernels.flow_matching_loss(pred, x0, x1, 3, 2.0)
    error = F.mse_loss(pred, x1 - x0, reduction="none")
    error[:, 3:] *= 2
    torch.testing.assert_close(velocity, error.flatten(1).mean(1))
    torch.testing.assert_close(cosine, (1 - F.cosine_similarity(pred, x1 - x0, dim=1)).flatten(1).mean(1))


def test_feature_alignment_loss_matches_torch_mse_and_cosine():
    pred, target = randn(2, 4, 6), randn(2, 4, 6, seed=1)
    mse, cosine = sfd_kernels.feature_alignment_loss(pred, target)
    torch.testing.assert_close(mse, F.mse_loss(pred, target, reduction="none").flatten(1).mean(1))
    torch.testing.assert_close(cosine, (1 - F.cosine_similarity(pred, target, dim=2)).mean(1))


def test_adamw_ema_step_follows_torch_adamw_for_several_steps():
    shapes = [(4, 5), (7,)]
    ours = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    theirs = [p.clone().requires_grad_() for p in ours]
    optimizer = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    m, s, emas = ([torch.zeros_like(p) for p in ours] for _ in range(3))
    expected_ema = [torch.zeros_like(p) for p in ours]
    scalars = {"lr": 0.01, "ema_decay": 0.9, "grad_scale": 0.5, "skip": 0.0}
    for step in range(1, 6):
        grads = [randn(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)]
        lr, decay, scale, skip = (torch.tensor(value, dtype=torch.float64) for value in scalars.values())
        count = torch.tensor(float(step), dtype=torch.float64)
        copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in ours]
        sfd_kernels.adamw_ema_step(
            ours, grads, m, s, emas, copies, lr, decay, count, scale, skip, 0.9, 0.95, 1e-8, 0.1
        )
        for p, grad in zip(theirs, grads):
            p.grad = grad * 0.5
        optimizer.step()
        expected_ema = [torch.lerp(p.detach(), ema, 0.9) for ema, p in zip(expected_ema, theirs)]
        torch.testing.assert_close(ours, [p.detach() for p in theirs])
        torch.testing.assert_close(emas, expected_ema)
        assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(copies, ours))


def test_masked_velocity_update_moves_each_stream_by_its_own_coefficient():
    x, v = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    sfd_kernels.masked_velocity_update(
        x, None, None, v, None, None, torch.tensor([[0.25], [0.5]]), None, None, 2
    )
    assert torch.equal(x[:, :2], torch.full((1, 2, 2, 2), 0.25))
    assert torch.equal(x[:, 2:], torch.full((1, 1, 2, 2), 0.5))


def test_masked_velocity_update_is_adams_bashforth_with_history():
    x, history = torch.zeros(1, 2, 1, 1), torch.full((1, 1, 2, 1, 1), 2.0)
    v, slot = torch.full((1, 2, 1, 1), 6.0), torch.tensor([0])
    coefficients = torch.tensor([[1.5, -0.5], [1.5, -0.5]]) * 0.1
    sfd_kernels.masked_velocity_update(x, None, history, v, None, None, coefficients, slot, None, 1)
    torch.testing.assert_close(x, torch.full_like(x, 0.1 * (1.5 * 6 - 0.5 * 2)))
    assert torch.equal(history[0], v)


def test_masked_velocity_update_guides_each_stream_and_commits_the_base():
    x, base = torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), 10.0)
    v, weak = torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 1.0)
    ones = torch.ones(2, 1)
    sfd_kernels.masked_velocity_update(
        x, base, None, v, weak, torch.tensor([1.5, 2.0]), ones, None, torch.tensor([1]), 1
    )
    assert x.flatten().tolist() == [10 + 1 + 1.5 * 2, 10 + 1 + 2.0 * 2]
    assert torch.equal(base, x)


def test_examples_are_reproducible_from_their_seed():
    first, second = (example(sfd_kernels.rms_norm_modulate, seed=3)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, example(sfd_kernels.rms_norm_modulate, seed=4)[0])
