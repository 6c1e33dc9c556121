"""Training state by parameter name: read by any number of ranks from the files of any number."""

import pytest
import torch

from sfd_fast.training import state as sharded
from sfd_fast.training.state import Piece, StateReader, write_pieces


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
    names, safe_open = [], sharded.safe_open

    def watched(path, framework):
        names.append(path.name)
        return safe_open(path, framework)

    monkeypatch.setattr(sharded, "safe_open", watched)
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
