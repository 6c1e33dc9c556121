"""Training state by parameter name: read by any number of ranks from the files of any number."""

import pytest
import safetensors
import torch

from sfd_fast.files.tensors import write_safetensors
from sfd_fast.training.state import Piece, StateReader, consolidated, write_pieces


def test_pieces_of_three_ranks_are_read_across_their_borders(tmp_path):
    whole = torch.arange(10.0)
    for rank, (start, stop) in enumerate([(0, 4), (4, 5), (5, 10)]):
        fields = {"param": whole[start:stop], "ema": -whole[start:stop], "step": torch.tensor(3.0)}
        write_pieces(tmp_path / f"state-{rank:05d}.safetensors", [Piece("w", start, 10, fields)])
    with StateReader(tmp_path) as reader:
        assert torch.equal(reader.read("w", "ema", 3, 9), -whole[3:9])
        assert reader.size("w") == 10 and float(reader.step("w")) == 3
        assert sorted(reader.fields("w")) == ["ema", "step"]
    (tmp_path / "state-00001.safetensors").unlink()
    with StateReader(tmp_path) as reader, pytest.raises(ValueError, match="has 5 of the elements 3 to 9 of ema of w"):
        reader.read("w", "ema", 3, 9)


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that are opened, in order."""
    names, safe_open = [], safetensors.safe_open

    def watched(path, framework):
        names.append(path.name)
        return safe_open(path, framework)

    monkeypatch.setattr(safetensors, "safe_open", watched)
    return names


def write_ranks(folder, count):
    """A parameter `w` of 4 elements a rank; the first rank also holds one that is not sharded."""
    for rank in range(count):
        whole = [Piece("whole", 0, 2, {"param": torch.ones(2)})] if rank == 0 else []
        piece = Piece("w", 4 * rank, 4 * count, {"param": torch.arange(4.0 * rank, 4 * rank + 4)})
        write_pieces(folder / f"state-{rank:05d}.safetensors", [piece, *whole])


def test_a_rank_opens_its_own_file_and_that_of_the_unsharded(tmp_path, opened):
    write_ranks(tmp_path, 6)
    with StateReader(tmp_path, share=(4, 6)) as reader:
        reader.check_size("w", torch.Size([24]))
        assert torch.equal(reader.read("w", "param", 16, 20), torch.arange(16.0, 20))
        assert opened == ["state-00004.safetensors"]
        assert torch.equal(reader.read("whole", "param", 0, 2), torch.ones(2))
        assert opened == ["state-00004.safetensors", "state-00000.safetensors"]


def test_other_world_sizes_open_what_lies_around_their_share(tmp_path, opened):
    write_ranks(tmp_path, 6)
    with StateReader(tmp_path, share=(1, 2)) as reader:
        assert torch.equal(reader.read("w", "param", 12, 24), torch.arange(12.0, 24))
    assert sorted(opened) == [f"state-0000{rank}.safetensors" for rank in (3, 4, 5)]


def test_a_parameter_that_is_not_there_is_named(tmp_path):
    write_ranks(tmp_path, 2)
    with StateReader(tmp_path) as reader:
        with pytest.raises(ValueError, match="has no parameter v"):
            reader.fields("v")
        with pytest.raises(ValueError, match="has 8 elements of w, the model 9: it belongs to a model of another size"):
            reader.check_size("w", torch.Size([3, 3]))


HALF = torch.zeros(2)
MALFORMED = {
    "no description": (None, {"w|param": HALF}),
    "a description that is a list": ([1], {"w|param": HALF}),
    "a range that is text": ({"w": "all"}, {"w|param": HALF}),
    "a range of two": ({"w": [0, 2]}, {"w|param": HALF}),
    "a range of fractions": ({"w": [0.0, 2.0, 2.0]}, {"w|param": HALF}),
    "a range that goes back": ({"w": [2, 0, 2]}, {"w|param": torch.zeros(0)}),
    "a range beyond the end": ({"w": [1, 3, 2]}, {"w|param": HALF}),
    "another length": ({"w": [0, 3, 3]}, {"w|param": HALF}),
    "another shape": ({"w": [0, 2, 2]}, {"w|param": torch.zeros(1, 2)}),
    "whole numbers": ({"w": [0, 2, 2]}, {"w|param": torch.zeros(2, dtype=torch.int64)}),
    "a moment of another length": (
        {"w": [0, 2, 2]}, {"w|param": HALF, "w|exp_avg": torch.zeros(3), "w|step": torch.tensor(1.0)},
    ),
    "a step of three": ({"w": [0, 2, 2]}, {"w|param": HALF, "w|step": torch.zeros(3)}),
    "moments without a step": ({"w": [0, 2, 2]}, {"w|param": HALF, "w|exp_avg": HALF + 1}),
    "no weight": ({"w": [0, 2, 2]}, {"w|ema": HALF, "w|step": torch.tensor(1.0)}),
    "a tensor that is not listed": ({"w": [0, 2, 2]}, {"w|param": HALF, "v|param": HALF + 1}),
    "an absurd size": ({"w": [0, 2, 10**18]}, {"w|param": HALF}),
    "another size elsewhere": ({"w": [0, 2, 9]}, {"w|param": HALF}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_pieces_are_one_line_with_their_name(tmp_path, kind):
    description, values = MALFORMED[kind]
    write_safetensors(tmp_path / "state-00001.safetensors", values, description)
    if kind == "another size elsewhere":
        write_pieces(tmp_path / "state-00000.safetensors", [Piece("w", 2, 4, {"param": HALF})])
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        consolidated(tmp_path, "param")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_no_safetensors_file_is_named(tmp_path):
    for content in (b"", b"text", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"):
        (tmp_path / "state-00000.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="state-00000.safetensors is damaged or no part of a checkpoint"):
            consolidated(tmp_path)
