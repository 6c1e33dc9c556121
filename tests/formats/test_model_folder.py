"""Model directories: what they carry, atomic writes, damaged and unwritable places."""

import errno
import json
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from sfd_fast.files.atomic import write_atomically
from sfd_fast.formats import model_folder as directory
from sfd_fast.formats.model_folder import read_description, read_directory, write_directory

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "c": torch.tensor(0.5, dtype=torch.bfloat16)}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_disk():
    """Lets no file grow beyond a limit, as a full disk does; write errors come back as OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(num_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_directory_gives_back_kind_content_and_every_bit(tmp_path):
    write_directory(tmp_path / "new" / "model", "dit", TENSORS, {"config": {"depth": 2}, "card": {"step": 7}})
    kind, content, tensors = read_directory(tmp_path / "new" / "model", "dit")
    assert kind == "dit"
    assert content == {"config": {"depth": 2}, "card": {"step": 7}}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())


def test_the_config_travels_inside_the_weights_file(tmp_path):
    write_directory(tmp_path / "a", "dit", TENSORS, {"config": {"depth": 2}})
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "b" / "model.safetensors")
    assert read_description(tmp_path / "b") == ("dit", {"config": {"depth": 2}})


def test_the_readable_copy_holds_the_same_settings(tmp_path):
    write_directory(tmp_path, "semvae", {}, {"config": {"x": [1, 2]}})
    copy = json.loads((tmp_path / "config.json").read_text())
    assert copy == {"config": {"x": [1, 2]}, "format": 1, "kind": "semvae"}


def test_equal_models_are_equal_files(tmp_path):
    for name, config in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        write_directory(tmp_path / name, "dit", dict(TENSORS), {"config": config})
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_no_temporary_files_are_left(tmp_path):
    write_directory(tmp_path, "dit", TENSORS, {})
    assert files(tmp_path) == ["config.json", "model.safetensors", "sfd_fast.json"]


def test_a_full_disk_while_saving_leaves_the_previous_model(tmp_path, small_disk):
    write_directory(tmp_path, "dit", TENSORS, {"card": {"step": 1}})
    small_disk(4096)
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}: .*; the previous file is intact"):
        write_directory(tmp_path, "dit", {"a": torch.zeros(100_000)}, {"card": {"step": 2}})
    small_disk(1 << 20)
    assert read_directory(tmp_path).content == {"card": {"step": 1}}
    assert files(tmp_path) == ["config.json", "model.safetensors", "sfd_fast.json"]


def test_a_write_that_fails_for_lack_of_space_names_the_file(tmp_path):
    def write(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*out.bin: No space left on device; nothing was left"):
        write_atomically(tmp_path / "out.bin", write)
    assert files(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(OSError, match="cannot write .*file/model: "):
        write_directory(tmp_path / "file" / "model", "dit", TENSORS, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot write"):
        write_directory(tmp_path, "dit", TENSORS, {})


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no model directory: it has no model.safetensors"):
        read_directory(tmp_path / "nowhere")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, share):
    write_directory(tmp_path, "dit", {"a": torch.zeros(1000)}, {})
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged"):
        read_directory(tmp_path)


def test_safetensors_of_others_are_refused_with_the_way_in(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="carries no config of this system .* use `sfd convert`"):
        read_directory(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path):
    write_directory(tmp_path, "semvae", TENSORS, {})
    with pytest.raises(ValueError, match="holds a model of kind 'semvae', not 'dit'"):
        read_directory(tmp_path, "dit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    write_directory(tmp_path, "dit", {"fine": torch.zeros(2), "broken": torch.tensor([0.0, value])}, {})
    with pytest.raises(ValueError, match="NaN or infinity .first in 'broken'."):
        read_directory(tmp_path)


def test_descriptions_are_read_without_the_weights(tmp_path, monkeypatch):
    write_directory(tmp_path, "dit", {"broken": torch.tensor([float("nan")])}, {"card": {"step": 3}})
    monkeypatch.setattr(directory, "require_finite", None)
    assert read_description(tmp_path)[1]["card"] == {"step": 3}
