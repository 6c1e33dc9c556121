"""Without a network: one line that names the option to give a downloaded copy with, and no minutes of waiting."""

import huggingface_hub.constants
import numpy as np
import pytest
from harness.image_trees import write_tree
from harness.tiny_encoders import save_autoencoder

from sfd_fast import cli


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    images = write_tree(tmp_path / "images", {"china": 2})
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    codec = save_autoencoder(tmp_path / "codec")
    return {
        "features": ["--images", images, "--out", tmp_path / "f"],
        "encode": ["--images", images, "--out", tmp_path / "l", "--texture_codec", codec, "--features", "true"],
        "evaluate": ["--samples", tmp_path / "a.npz", "--reference", tmp_path / "a.npz", "--features", "dinov2",
                     "--output", tmp_path / "m.json"],
    }  # fmt: skip


@pytest.mark.parametrize(("command", "option"), [("features", "--vfm"), ("encode", "--vfm"), ("evaluate", "--weights")])
def test_the_option_for_a_downloaded_copy_is_named(offline, capsys, command, option):
    with pytest.raises(SystemExit):
        cli.main([command, *map(str, offline[command]), "--device", "cpu"])
    said = capsys.readouterr().err.strip().splitlines()
    assert f"without a network give the folder of a downloaded copy: {option} FOLDER" in said[-1]
    assert not any("Traceback" in line or "thrown while" in line for line in said)


def test_a_name_that_is_no_folder_and_none_of_the_hub_names_the_option(offline, capsys):
    with pytest.raises(SystemExit):
        cli.main(["features", *map(str, offline["features"]), "--vfm", "dinov2-base-typo"])
    assert "give a directory saved by transformers (--vfm FOLDER)" in capsys.readouterr().err
