"""Fixed tables of token positions and the modules that embed patches, clocks and labels."""

import pytest
import torch
from harness.support import load_golden

from sfd_fast.config import ModelConfig
from sfd_fast.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    RotaryEmbedding,
    position_embedding,
    rotary_tables,
)

TINY = ModelConfig(hidden_size=32, num_heads=2, depth=1, patch_size=2, grid_size=4, num_classes=5, repa_channels=0)


@pytest.mark.golden
@pytest.mark.parametrize("name, grid", [("sfd", 8), ("patch2", 4)])
def test_position_tables_are_the_released_ones_to_the_bit(name, grid):
    weights = load_golden(f"{name}.weights")
    cos, sin = rotary_tables(grid, 16)
    assert torch.equal(position_embedding(grid, 64)[None], weights["pos_embed"])
    assert torch.equal(cos, weights["feat_rope.freqs_cos"])
    assert torch.equal(sin, weights["feat_rope.freqs_sin"])


def test_first_half_of_a_head_turns_with_the_row_and_the_second_with_the_column():
    cos, sin = rotary_tables(4, 8)
    angle = torch.atan2(sin, cos).view(4, 4, 8)
    row, column, frequencies = 2, 1, torch.tensor([1.0, 1.0, 0.01, 0.01])
    assert torch.allclose(angle[row, column], torch.cat([row * frequencies, column * frequencies]), atol=1e-6)


def test_position_embedding_holds_the_column_first_then_the_row():
    table = position_embedding(4, 8).view(4, 4, 8)
    frequencies = torch.tensor([1.0, 0.01])
    for row, column in ((0, 3), (2, 1)):
        expected = [f(p * frequencies) for p in (column, row) for f in (torch.sin, torch.cos)]
        assert torch.allclose(table[row, column], torch.cat(expected), atol=1e-6)


def test_patches_become_tokens_in_row_major_order():
    embed = PatchEmbed(TINY)
    latents = torch.randn(2, 48, 4, 4)
    tokens = embed(latents)
    patch = latents[:, :, 2:4, 0:2].reshape(2, -1)  # row 1, column 0: token 2
    expected = patch @ embed.proj.weight.reshape(32, -1).t() + embed.proj.bias
    assert tokens.shape == (2, 4, 32)
    assert torch.allclose(tokens[:, 2], expected, atol=1e-5)


def test_the_null_class_has_the_row_after_the_classes():
    embed = LabelEmbedder(TINY)
    assert torch.equal(embed(torch.tensor([5]))[0], embed.embedding_table.weight[5])
    assert embed.embedding_table.num_embeddings == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_tables_stay_fp32_when_the_model_is_cast(dtype):
    rope = RotaryEmbedding(TINY)
    exact = rope.freqs_sin.clone()
    rope.to(dtype)
    assert rope.freqs_cos.dtype == torch.float32
    assert torch.equal(rope.freqs_sin, exact)


def test_rotary_tables_follow_a_cast_to_fp64():
    assert RotaryEmbedding(TINY).double().freqs_cos.dtype == torch.float64
