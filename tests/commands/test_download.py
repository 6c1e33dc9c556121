"""`sfd download` against a stand-in of the hub: every name it knows gives something that the other commands take."""

from typing import get_args, get_type_hints

import numpy as np
import pytest
from harness.hub_stand_in import COMMIT, HubStandIn
from harness.tiny_pipelines import STATISTICS
from harness.tiny_released import CODEC, GUIDE, write_repositories

from sfd_fast.cli import main, parse
from sfd_fast.commands.download import DownloadConfig, run_download
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.formats import released_weights
from sfd_fast.formats.released_model import load_model
from sfd_fast.formats.released_weights import GUIDES, VARIANTS
from sfd_fast.formats.texture import load_codec

NAMES = get_args(get_type_hints(DownloadConfig)["what"])


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    found = write_repositories(root)
    np.savez(root / "VIRTUAL_imagenet256_labeled.npz", mu=np.zeros(3), sigma=np.eye(3))
    return found | {"reference": root}


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    with HubStandIn(repositories) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        reference = f"{hub.address}/reference/resolve/{COMMIT}/VIRTUAL_imagenet256_labeled.npz"
        monkeypatch.setattr(released_weights, "REFERENCE_URL", reference)
        yield hub


def get(what, tmp_path, **options):
    run_download(DownloadConfig(what, cache_dir=str(tmp_path / "cache"), **options))
    return tmp_path / "released" / what


def test_a_pipeline_samples(hub, tmp_path, capsys):
    folder = get("xxl-80ep", tmp_path)
    assert "released/xxl-80ep is ready: sfd sample --model released/xxl-80ep" in capsys.readouterr().out
    words = ["--labels", "1,2", "--num_inference_steps", "3", "--out", "out", "--progress", "false"]
    main(["sample", "--model", str(folder), *words])
    assert (tmp_path / "out" / "grid.png").is_file()


def test_parts_are_what_other_commands_take(hub, tmp_path):
    assert load_model(get("guide-60k", tmp_path)).config == GUIDE
    assert load_codec(get("codec", tmp_path)).config == CODEC
    assert LatentStatistics.load(get("statistics", tmp_path)).digest() == STATISTICS.digest()
    with np.load(get("reference", tmp_path) / "VIRTUAL_imagenet256_labeled.npz") as reference:
        assert reference["sigma"].shape == (3, 3)


def test_a_second_time_fetches_nothing(hub, tmp_path):
    for _ in range(2):
        get("codec", tmp_path)
    assert sum("/resolve/" in path for _, path, _ in hub.asked) == 1


def test_what_there_is_is_named(capsys):
    with pytest.raises(ValueError, match=r"what 'xl' is unknown; choose xl-80ep, .* or reference"):
        DownloadConfig("xl")
    with pytest.raises(SystemExit):
        main(["download"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sfd download: error: ")
    assert "what" in line


def test_every_published_model_and_guide_has_its_name():
    assert (*VARIANTS, *GUIDES, "codec", "statistics", "reference") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_name_needs_no_flag(name):
    assert parse("download", [name, "--out", "o"]) == DownloadConfig(what=name, out="o")
